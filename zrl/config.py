"""The settings of a training run: one frozen dataclass, from which the command line makes its options.

A setting may come from a flag, from the environment (``ZRL_STEPS``), from a TOML file, or from the run that is resumed.
`layered` puts them together: the first source that names a setting wins, and what it says is checked under its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
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

ENV_PREFIX = "ZRL_"


def setting(default: Any, text: str, *, least: float | None = None, most: float | None = None, flag: str = "") -> Any:
    """A field of a config: its default, what it is for, its bounds, and its name for users, where that is another."""
    return dataclasses.field(default=default, metadata={"help": text, "least": least, "most": most, "flag": flag})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of ``zrl train``. A ``None`` that the algorithm has a default for is filled in by `resolved`.

    Raises:
        ConfigError: a value out of its bounds, or an unknown algorithm; names the setting.
    """

    env: str = setting("CartPole-v1", "Gymnasium id of the environment, or module:id")
    env_kwargs: Mapping[str, Any] | None = setting(None, "arguments of the environment, as a JSON object")
    algo: str = setting("ppo", f"algorithm: {', '.join(ALGORITHMS)}")
    actor: str = setting(
        "zrl.zoo:default_actor",
        "module:Class (or function) that makes the actor, called with the two spaces of the environment",
    )
    steps: int = setting(200_000, "environment steps in all, such as 500k", least=1)
    workers: int = setting(2, "worker processes; 0: collect in-process", least=0)
    n_envs: int | None = setting(
        None,
        "environments in all, shared out to the workers: columns of a batch of one fragment each",
        least=1,
        flag="envs",
    )
    n_steps: int | None = setting(None, "steps of a fragment", least=1)
    batch: int | None = setting(None, "fragments of a batch; by default one of each worker", least=1)
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
    eval_every: int = setting(0, "environment steps between evaluations beside training; 0: none", least=0)
    eval_episodes: int = setting(20, "greedy episodes of an evaluation, and at the end; 0: none at the end", least=0)
    checkpoint_every: int = setting(100_000, "environment steps between checkpoints", least=1)
    keep: int = setting(5, "checkpoints that are kept, besides the best", least=1)
    tensorboard: bool = setting(False, "write events for TensorBoard, too")
    device: str = setting("cpu", "device of the learner: cpu, cuda, cuda:1")
    threads: int = setting(1, "threads of torch", least=1)
    affinity: bool = setting(False, "keep each worker of this machine on one core")
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
                raise ConfigError(f"{name_of(field)}: expected {bounds}, not {value}")
        if self.eval_every and not self.eval_episodes:
            raise ConfigError("eval_every: needs eval_episodes, how many to play, to be at least 1")

    def resolved(self, seed: int) -> TrainConfig:
        """The same with the algorithm's defaults in place of every None, and `seed` if none was given.

        Raises:
            ConfigError: environments or fragments that cannot be shared out evenly.
        """
        gaps = {name: x for name, x in ALGO_DEFAULTS[self.algo].items() if getattr(self, name) is None}
        batch = max(1, self.workers) if self.batch is None else self.batch
        config = dataclasses.replace(self, **gaps, batch=batch, seed=seed if self.seed is None else self.seed)
        if config.workers and (config.n_envs or 0) % config.workers:
            raise ConfigError(f"envs: expected a multiple of the {config.workers} workers, not {config.n_envs}")
        if not config.workers and batch != 1:
            raise ConfigError(f"batch: without workers a batch is one fragment, not {batch}")
        if config.max_lag == 0 and config.workers and batch % config.workers:
            raise ConfigError(
                f"batch: with max_lag=0 every worker makes as many fragments as the others: expected a multiple of "
                f"the {config.workers} workers, not {batch}"
            )
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


def name_of(field: dataclasses.Field[Any]) -> str:
    """A setting's name for users."""
    return str(field.metadata["flag"] or field.name)


def kind_of(field: str) -> type:
    """What a value of this setting is: int, float, bool, str, or dict for a JSON object."""
    hint = typing.get_type_hints(TrainConfig)[field]
    kinds = (
        [t for t in typing.get_args(hint) if t is not types.NoneType] if isinstance(hint, types.UnionType) else [hint]
    )
    return dict if typing.get_origin(kinds[0]) is not None else kinds[0]


def whole_number(text: str) -> int:
    """A whole number, with k or M for thousands or millions: ``500k``, ``1.5M``.

    Raises:
        ValueError: it is none.
    """
    plain = text.strip().replace("_", "")
    if plain.lstrip("+-").isdecimal():  # a float has no room for all of them
        return int(plain)
    factor = {"k": 1_000, "m": 1_000_000}.get(plain[-1:].lower(), 1)
    number = float(plain[:-1] if factor > 1 else plain) * factor
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def value_of(field: str, given: object, source: str) -> Any:
    """What `source` gives for a setting, as a value of its kind.

    Raises:
        ConfigError: it is none; names the source, what was expected, and what came.
    """
    kind = kind_of(field)
    try:
        return _converted(kind, given)
    except (ValueError, OverflowError):
        expected = {
            int: "a whole number such as 500000, 500k or 1.5M",
            float: "a finite number",
            bool: "true or false",
            str: "a text",
            dict: 'a JSON object such as {"size": 5}',
        }[kind]
        raise ConfigError(f"{source}: expected {expected}, not {given!r}") from None


_BOOLS = MappingProxyType({"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False})


def _converted(kind: type, given: object) -> Any:
    if isinstance(given, str):
        if kind is int:
            return whole_number(given)
        if kind is bool:
            if given.lower() not in _BOOLS:
                raise ValueError(given)
            return _BOOLS[given.lower()]
        if kind is dict:
            given = json.loads(given)
        elif kind is float:
            given = float(given)
    if kind is float and isinstance(given, int) and not isinstance(given, bool):
        given = float(given)
    if type(given) is not kind or (kind is float and not math.isfinite(given)):  # type: ignore[arg-type]
        raise ValueError(given)
    return given


def layered(layers: Iterable[tuple[Callable[[str], str], Mapping[str, Any]]]) -> dict[str, Any]:
    """Settings from several sources; the first one that names a setting wins.

    Args:
        layers: of each source, what it calls the setting of that name, and what it says of which.

    Raises:
        ConfigError: an unknown setting, or a value that will not do, in any of the layers.
    """
    fields = {name_of(f): f.name for f in dataclasses.fields(TrainConfig)}
    fields.update({f.name: f.name for f in dataclasses.fields(TrainConfig)})
    settings: dict[str, Any] = {}
    for called, values in layers:
        for name, value in values.items():
            field = fields.get(name.replace("-", "_"))
            if field is None:
                raise ConfigError(f"{called(name)}: no such setting{_meant(name, fields)}")
            if value is not None:
                settings.setdefault(field, value_of(field, value, called(name)))
    return settings


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings among the environment's variables: ``ZRL_MAX_LAG`` is that of ``max_lag``. Others are not ours."""
    names = {name for f in dataclasses.fields(TrainConfig) for name in (f.name, name_of(f))}
    ours = {name: environment.get(ENV_PREFIX + name.upper()) for name in sorted(names)}
    return {name: value for name, value in ours.items() if value is not None}


def misspelt(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like a setting of ours and are none, each with what was probably meant."""
    known = {f"{ENV_PREFIX}{name_of(f).upper()}": f for f in dataclasses.fields(TrainConfig)}
    known.update({f"{ENV_PREFIX}{f.name.upper()}": f for f in dataclasses.fields(TrainConfig)})
    odd = [name for name in environment if name.startswith(ENV_PREFIX) and name not in known]
    close = {name: difflib.get_close_matches(name, known, 1, 0.8) for name in odd}
    return [f"{name}: no such setting; did you mean {found[0]}?" for name, found in close.items() if found]


def from_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, a key each; ``env_kwargs`` may be a table.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        with path.open("rb") as f:
            return tomllib.load(f)
    except OSError as e:
        raise ConfigError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{str(path)!r} is no TOML: {e}") from e
