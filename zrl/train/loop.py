"""The training loop: collect, update, record, until the goal, the last step or a signal."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import random
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zrl.config import TrainConfig
from zrl.data.batch import Batch
from zrl.errors import CheckpointError, ConfigError, PreflightError, WorkerError, ZrlError
from zrl.rollout.same import usable_device
from zrl.train import checkpoint
from zrl.train.plot import plot_return
from zrl.train.rollouts import Rollout, make_rollout
from zrl.train.run_folder import RunFolder
from zrl.train.setup import make_actor, make_optimizer, make_update
from zrl.train.stop import Stopped, StopSignals

WINDOW = 100  # episodes that the goal is measured over


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a run stands after an update.

    Attributes:
        step: environment steps taken; `update`: updates made; `seconds` since the first batch was asked for.
        return_100: mean return of the last 100 finished episodes; None before there were as many.
        return_update, length_update: means over the episodes that ended in this update's batch; None without any.
        losses: what the losses report.
        shares: share of the time by stage of collecting, mean over the workers, and of ``learn``.
    """

    step: int
    update: int
    version: int
    seconds: float
    steps_per_s: float
    return_100: float | None
    return_update: float | None
    length_update: float | None
    episodes: int
    losses: dict[str, float]
    shares: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: ``outcome`` is ``"goal"``, ``"steps"``, or ``"SIGINT"`` or ``"SIGTERM"``."""

    outcome: str
    run: RunFolder
    status: Status | None
    checkpoint: Path | None
    plot: Path | None
    plot_problem: str = ""


class DivergedError(ZrlError):
    """The loss is not finite: the weights are of no use any more."""


def train(
    config: TrainConfig,
    on_start: Callable[[TrainConfig, RunFolder], None] = lambda config, run: None,
    on_update: Callable[[Status], None] = lambda status: None,
    signals: StopSignals | None = None,
    listen: str = "",
    on_listen: Callable[[Rollout], None] = lambda rollout: None,
) -> Result:
    """Train until the goal, the last step, or SIGINT or SIGTERM.

    A checkpoint is saved however it ends, unless there was no update or the loss was not finite. Torch's number of
    threads and the global random seeds are set for the process.

    Args:
        config: what to do; None values are resolved first.
        on_start: called once with the resolved config and the new run folder.
        on_update: called after every update.
        signals: entered already; if None, signals are handled here, while this runs.
        listen: URL to which workers of other hosts connect; empty: workers of our own.
        on_listen: called once when they may.

    Raises:
        PreflightError: environment, actor, device or folder were refused before the first step.
        WorkerError, StarvationError: too few workers are left.
        ZrlError: collecting or saving failed later.
        Stopped: a signal came before the first step.
    """
    config = config.resolved(secrets.randbits(31))
    torch.set_num_threads(config.threads)
    with contextlib.ExitStack() as opened:
        signals = opened.enter_context(StopSignals()) if signals is None else signals
        try:
            with signals.interruptible():
                run = _Run(config, signals)
                if not config.workers and not listen:
                    run.collect_with(opened.enter_context(make_rollout(config, run.actor)))
            folder = RunFolder.create(config)
            if config.workers or listen:  # their logs go into the folder
                with signals.interruptible():
                    run.collect_with(opened.enter_context(make_rollout(config, run.actor, folder, listen)))
        except ZrlError as e:
            raise PreflightError(str(e)) from e
        on_start(config, folder)
        if listen:
            on_listen(run.rollout)
        try:
            return run.train(folder, on_update)
        except WorkerError as e:
            if e.at_start:
                raise PreflightError(str(e)) from e
            raise


class _Run:
    """The moving parts of one run."""

    rollout: Rollout

    def __init__(self, config: TrainConfig, signals: StopSignals) -> None:
        self.config = config
        self.signals = signals
        assert config.seed is not None
        seed_everything(config.seed)
        self.actor = make_actor(config).to(usable_device(config.device))
        self.optimizer = make_optimizer(config, self.actor)
        self.update = make_update(config, self.actor, self.optimizer, signals.check)
        self.step = self.n_updates = self.n_episodes = 0
        self.returns: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.learn_seconds = 0.0
        self.status: Status | None = None

    def collect_with(self, rollout: Rollout) -> None:
        """Where the batches come from."""
        self.rollout = rollout

    def train(self, run: RunFolder, on_update: Callable[[Status], None]) -> Result:
        self.started = time.monotonic()
        try:
            outcome = self._updates(run, on_update)
        except Stopped as e:
            outcome = str(e)
        except DivergedError:
            raise
        except ZrlError:
            with contextlib.suppress(CheckpointError):  # the first error counts
                self._save(run)
            raise
        except OSError as e:
            raise CheckpointError(f"cannot write to {str(run.path)!r}: {e}; is the disk full?") from e
        saved = self._save(run)
        plot, problem = _plot(run, self.config)
        return Result(outcome, run, self.status, saved, plot, problem)

    def _updates(self, run: RunFolder, on_update: Callable[[Status], None]) -> str:
        """Collect and learn until the goal or the last step; which of the two."""
        saved_at = 0
        while self.step < self.config.steps:
            with self.signals.interruptible():
                batch = next(self.rollout)
            self._learn(batch)
            self.status = self._status(batch)
            run.append_metrics(_flat(self.status))
            if self.step - saved_at >= self.config.checkpoint_every:
                saved_at = self.step
                self._save(run)
            on_update(self.status)
            if self._goal_reached():
                return "goal"
        return "steps"

    def _learn(self, batch: Batch) -> None:
        started = time.monotonic()
        self._anneal()
        self.losses = self.update(batch)
        bad = [name for name, x in self.losses.items() if not math.isfinite(x)]
        if bad:
            raise DivergedError(f"the loss is not finite ({', '.join(bad)}); try a smaller --lr")
        self.step += batch.n_env_steps
        self.n_updates += 1
        self.n_episodes += len(batch.episodes)
        self.returns.extend(e.ret for e in batch.episodes)
        self.learn_seconds += time.monotonic() - started

    def _anneal(self) -> None:
        left = max(0.0, 1.0 - self.step / self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = (self.config.lr or 0.0) * left

    def _goal_reached(self) -> bool:
        goal, now = self.config.stop_at_return, self.status.return_100 if self.status else None
        return goal is not None and now is not None and now >= goal

    def _status(self, batch: Batch) -> Status:
        seconds = time.monotonic() - self.started
        spent = self.rollout.stats()["seconds"]
        shares = {
            name: spent.get(name, 0.0) / seconds / max(1, self.config.workers)
            for name in ("env", "actor", "write", "reset")
        }
        ended = batch.episodes
        return Status(
            step=self.step,
            update=self.n_updates,
            version=batch.version,
            seconds=seconds,
            steps_per_s=self.step / seconds,
            return_100=statistics.fmean(self.returns) if len(self.returns) == WINDOW else None,
            return_update=statistics.fmean(e.ret for e in ended) if ended else None,
            length_update=statistics.fmean(e.length for e in ended) if ended else None,
            episodes=self.n_episodes,
            losses=self.losses,
            shares={**shares, "learn": self.learn_seconds / seconds},
        )

    def _save(self, run: RunFolder) -> Path | None:
        """A checkpoint of the state after the last step of the optimizer; nothing before the first."""
        if not self.optimizer.state:
            return None
        state = {
            "weights": self.actor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "version": self.rollout.version,
            "step": self.step,
            "update": self.n_updates,
            "episodes": self.n_episodes,
            "returns": list(self.returns),
            "torch_rng": torch.get_rng_state(),
        }
        return checkpoint.save(run.checkpoints, self.step, state)


def seed_everything(seed: int) -> None:
    """Seed the learner's own draws: initial weights, minibatches."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _flat(status: Status) -> dict[str, Any]:
    values = dataclasses.asdict(status)
    losses, shares = values.pop("losses"), values.pop("shares")
    return {**values, **{f"loss/{k}": x for k, x in losses.items()}, **{f"time/{k}": x for k, x in shares.items()}}


def _plot(run: RunFolder, config: TrainConfig) -> tuple[Path | None, str]:
    """The return plot, or why there is none: a missing extra or a full disk shall not spoil a finished run."""
    target = run.plots / "return.png"
    try:
        plot_return(run.metrics(), f"{config.env}, {config.algo}", target, config.stop_at_return)
    except (ConfigError, OSError) as e:
        return None, str(e)
    return target, ""
