"""The settings of a training run: one frozen dataclass, from which the command line makes its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zrl.errors import ConfigError

#: One step on each batch: a gradient that is not bounded tightly undoes what was learnt (A2C solved CartPole-v1 for 2
#: of 10 seeds with a norm of 10, for 9 or 10 with 0.5, for 10 of 10 with 0.25).
_ACTOR_CRITIC = {"c_entropy": 0.005, "max_grad_norm": 0.25, "max_lag": 0}

#: What a setting is where neither the user nor the general default says so; measured by ``scripts/bench_solve.py``.
ALGO_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ppo": {
            "n_envs": 32,
            "n_steps": 32,
            "lr": 1e-3,
            "gamma": 0.98,
            "lam": 0.9,
            "c_entropy": 0.0,
            "max_grad_norm": 0.5,
            "max_lag": 0,
        },
        "a2c": {"n_envs": 16, "n_steps": 16, "lr": 2e-3, "gamma": 0.99, "lam": 0.95, **_ACTOR_CRITIC},
        "impala": {"n_envs": 16, "n_steps": 16, "lr": 2e-3, "gamma": 0.99, "lam": 1.0, **_ACTOR_CRITIC, "max_lag": -1},
        "reinforce": {
            "n_envs": 16,
            "n_steps": 128,
            "lr": 2e-3,
            "gamma": 0.99,
            "lam": 1.0,
            "max_lag": 0,
            **_ACTOR_CRITIC,
        },
    }
)
ALGORITHMS = tuple(ALGO_DEFAULTS)


def setting(default: Any, text: str, *, least: float | None = None, most: float | None = None) -> Any:
    """A field of a config: its default, what it is for, and its bounds."""
    return dataclasses.field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of ``zrl train``. A ``None`` that the algorithm has a default for is filled in by `resolved`.

    Raises:
        ConfigError: a value out of its bounds, or an unknown algorithm; names the setting.
    """

    env: str = setting("CartPole-v1", "Gymnasium id of the environment, or module:id")
    algo: str = setting("ppo", f"algorithm: {', '.join(ALGORITHMS)}")
    steps: int = setting(200_000, "environment steps in all, such as 500k", least=1)
    n_envs: int | None = setting(None, "environments in all: columns of a batch, shared out to the workers", least=1)
    n_steps: int | None = setting(None, "steps of a fragment", least=1)
    workers: int = setting(2, "worker processes; each makes one fragment of a batch; 0: collect in-process", least=0)
    max_lag: int | None = setting(
        None, "updates by which a fragment may be behind; 0: none, and reproducible; -1: any number", least=-1
    )
    seed: int | None = setting(
        None, "seed of everything random; drawn and printed, if not given", least=0, most=2**63 - 1
    )
    lr: float | None = setting(None, "learning rate at the start; falls linearly to 0 over the steps", least=0.0)
    gamma: float | None = setting(None, "discount", least=0.0, most=1.0)
    lam: float | None = setting(None, "lambda of the advantages", least=0.0, most=1.0)
    clip: float = setting(0.2, "clipping of the importance ratio (ppo)", least=0.0)
    epochs: int = setting(10, "passes over each batch (ppo)", least=1)
    minibatch: int = setting(256, "steps of a minibatch (ppo)", least=1)
    c_value: float = setting(0.5, "weight of the value loss", least=0.0)
    c_entropy: float | None = setting(None, "weight of the entropy bonus", least=0.0)
    max_grad_norm: float | None = setting(None, "greatest norm of the gradient", least=0.0)
    stop_at_return: float | None = setting(None, "stop once the mean return of the last 100 episodes is at least this")
    checkpoint_every: int = setting(100_000, "environment steps between checkpoints", least=1)
    device: str = setting("cpu", "device of the learner: cpu, cuda, cuda:1")
    actor: str = setting(
        "zrl.zoo:default_actor", "module:function that makes the actor, called with the two spaces of the environment"
    )
    threads: int = setting(1, "threads of torch", least=1)
    runs: str = setting("runs", "folder for run folders")

    def __post_init__(self) -> None:
        if self.algo not in ALGO_DEFAULTS:
            raise ConfigError(f"algo: expected one of {', '.join(ALGORITHMS)}, not {self.algo!r}")
        for field in dataclasses.fields(self):
            value, least, most = getattr(self, field.name), field.metadata["least"], field.metadata["most"]
            if value is None or (least is None and most is None):
                continue
            if (least is not None and not value >= least) or (most is not None and not value <= most):
                bounds = f"at least {least}" if most is None else f"{least} to {most}"
                raise ConfigError(f"{field.name}: expected {bounds}, not {value}")

    def resolved(self, seed: int) -> TrainConfig:
        """The same with the algorithm's defaults in place of every None, and `seed` if none was given.

        Raises:
            ConfigError: environments that cannot be shared out evenly.
        """
        gaps = {name: x for name, x in ALGO_DEFAULTS[self.algo].items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **gaps, seed=seed if self.seed is None else self.seed)
        if config.workers and (config.n_envs or 0) % config.workers:
            raise ConfigError(f"n_envs: expected a multiple of the {config.workers} workers, not {config.n_envs}")
        return config

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From what `as_dict` gave.

        Raises:
            ConfigError: unknown settings.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"unknown settings: {', '.join(unknown)}")
        return cls(**values)
