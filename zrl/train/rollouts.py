"""Where the batches of a training run come from, by its config."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

import torch

from zrl.config import TrainConfig
from zrl.data.batch import Batch
from zrl.rollout import cluster, multi, same
from zrl.train.named import EnvFactory
from zrl.train.run_folder import RunFolder

SLOTS = 2  # of each worker: one is filled while the other waits or is copied


class Rollout(Protocol):
    """What every collector can do."""

    @property
    def version(self) -> int: ...
    def __next__(self) -> Batch: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def make_rollout(
    config: TrainConfig, actor: torch.nn.Module, folder: RunFolder | None = None, listen: str = ""
) -> Rollout:
    """The collector for a resolved config. A batch has ``n_envs`` columns, however many workers make it.

    Args:
        config: resolved.
        actor: the learner's.
        folder: gets the logs of the workers.
        listen: URL for workers of other hosts; empty: workers of our own.

    Raises:
        ZrlError: environment, actor, device or address will not do.
    """
    assert config.n_envs is not None
    assert config.n_steps is not None
    max_lag = None if config.max_lag == -1 else config.max_lag
    if not config.workers and not listen:
        return same.rollout(
            EnvFactory(config.env), actor, config.n_steps, config.n_envs, entropy=config.seed, device=config.device
        )
    workers = max(1, config.workers)
    if listen:
        return cluster.rollout(
            config.env,
            actor,
            config.n_steps,
            config.n_envs // workers,
            SLOTS,
            workers,
            bind=listen,
            actor_name=config.actor,
            n_actors=workers,
            entropy=config.seed,
            max_lag=max_lag,
            device=config.device,
        )
    return multi.rollout(
        EnvFactory(config.env),
        actor,
        config.n_steps,
        workers,
        config.n_envs // workers,
        SLOTS * workers,
        workers,
        entropy=config.seed,
        max_lag=max_lag,
        device=config.device,
        log_dir=None if folder is None else folder.workers,
    )
