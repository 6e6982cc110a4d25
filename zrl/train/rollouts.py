"""Where the batches of a training run come from, by its config."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch

from zrl.config import TrainConfig
from zrl.data.batch import Batch
from zrl.rollout import cluster, multi, same
from zrl.train.allowed import env_text
from zrl.train.listen import Listen
from zrl.train.named import EnvFactory
from zrl.train.run_folder import RunFolder

SLOTS = 2  # of each worker, at least: one is filled while the other waits or is copied


class Rollout(Protocol):
    """What every collector can do."""

    @property
    def version(self) -> int: ...
    def __next__(self) -> Batch: ...
    def stats(self) -> dict[str, Any]: ...
    def status(self) -> dict[str, Any]: ...
    def annotate(self, note: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def make_rollout(
    config: TrainConfig,
    actor: torch.nn.Module,
    folder: RunFolder | None = None,
    listen: Listen | None = None,
    first_version: int = 1,
) -> Rollout:
    """The collector for a resolved config. A batch has ``batch * envs / workers`` columns.

    Args:
        config: resolved.
        actor: the learner's.
        folder: gets the logs of the workers.
        listen: for workers of other hosts; None: workers of our own.
        first_version: of the weights as they are: a run that is resumed counts on.

    Raises:
        ZrlError: environment, actor, device or address will not do.
    """
    c = config
    assert c.n_envs is not None
    assert c.n_steps is not None
    assert c.batch is not None
    workers = max(1, c.workers)
    common: dict[str, Any] = {
        "entropy": entropy_of(c, first_version),
        "device": c.device,
        "max_lag": None if c.max_lag == -1 else c.max_lag,
        "first_version": first_version,
    }
    if not c.workers and not listen:
        return same.rollout(EnvFactory(c.env, c.env_kwargs), actor, c.n_steps, c.n_envs, **common)
    ahead = 0 if c.max_lag == 0 else 1  # a slot to fill while those of a batch wait for the others, or are copied
    slots = max(SLOTS, -(-c.batch // workers) + ahead)
    if listen:
        return cluster.rollout(
            env_text(c.env, c.env_kwargs),
            actor,
            c.n_steps,
            c.n_envs // workers,
            slots,
            c.batch,
            bind=listen.url,
            keys=listen.keys,
            insecure=listen.insecure,
            actor_name=c.actor,
            n_actors=workers,
            indices=listen.indices,
            redirect=listen.redirect,
            **common,
        )
    return multi.rollout(
        EnvFactory(c.env, c.env_kwargs),
        actor,
        c.n_steps,
        workers,
        c.n_envs // workers,
        slots * workers,
        c.batch,
        log_dir=None if folder is None else folder.workers,
        affinity=c.affinity,
        **common,
    )


def entropy_of(config: TrainConfig, first_version: int) -> int:
    """The seed of the workers: that of the run; where a run goes on, another one that follows from it, so that it does
    not meet the same episodes once more."""
    assert config.seed is not None
    if first_version == 1:
        return config.seed
    return int(np.random.SeedSequence([config.seed, first_version]).generate_state(1, np.uint64)[0])
