"""The training loop: collect, update, record, until the goal, the last step or a signal."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zrl.config import TrainConfig
from zrl.data.batch import Batch
from zrl.errors import CheckpointError, ConfigError, PreflightError, WorkerError, ZrlError
from zrl.rollout.evaluator import Evaluator
from zrl.rollout.pipeline import PipelineRollout
from zrl.rollout.same import usable_device
from zrl.train import checkpoint
from zrl.train.evaluation import LONGEST_EPISODE
from zrl.train.events import Events
from zrl.train.listen import Listen
from zrl.train.named import EnvFactory
from zrl.train.plot import plot_return
from zrl.train.ranks import Rank
from zrl.train.rng import random_states, set_random_states
from zrl.train.rollouts import Rollout, make_rollout
from zrl.train.run_folder import RunFolder
from zrl.train.setup import DivergedError, Losses, make_actor, make_optimizer, make_update, n_optimizer_steps
from zrl.train.status import Progress, Status
from zrl.train.stop import Stopped, StopSignals
from zrl.train.team import LOOK, Team, TeamError, Vote

__all__ = ["DivergedError", "Result", "Start", "seed_everything", "train"]

STATUS_SECONDS = 1.0  # between two writings of status.json
LAST_EVALUATION_SECONDS = 60.0  # that the end of a run waits for the evaluation under way


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        config: resolved.
        rollout: where its batches come from.
        resumed: the checkpoint that it goes on from, if it does; `skipped`: why newer ones could not be read.
        step: environment steps taken before.
        n_learners: how many share the run.
    """

    config: TrainConfig
    run: RunFolder
    rollout: Rollout
    resumed: Path | None = None
    skipped: tuple[str, ...] = ()
    step: int = 0
    n_learners: int = 1


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: ``outcome`` is ``"goal"``, ``"steps"``, or ``"SIGINT"`` or ``"SIGTERM"``."""

    outcome: str
    run: RunFolder
    status: Status | None
    checkpoint: Path | None
    plot: Path | None
    plot_problem: str = ""


def train(
    config: TrainConfig,
    on_start: Callable[[Start], None] = lambda start: None,
    on_update: Callable[[Status], None] = lambda status: None,
    signals: StopSignals | None = None,
    listen: Listen | None = None,
    resume: RunFolder | None = None,
    on_worker: Callable[[int, int], None] = lambda there, expected: None,
    rank: Rank | None = None,
) -> Result:
    """Train until the goal, the last step, or SIGINT or SIGTERM.

    Several learners share a run, its steps and its end: `zrl.train.team`. The first of them alone writes the run
    folder, and what it says of episodes is of its own; its config and `resume` count for all.

    A checkpoint is saved however it ends, unless there was no update or the loss was not finite. Torch's number of
    threads and the global random seeds are set for the process.

    Args:
        config: what to do; None values are resolved first.
        on_start: called once, when workers may connect.
        on_update: called after every update.
        signals: entered already; if None, signals are handled here, while this runs.
        listen: where workers of other hosts connect to; None: workers of our own.
        on_worker: called while `listen` expects workers, with how many are there and how many are expected.
        resume: the run to go on with, from its newest checkpoint that can be read; None: a new one.
        rank: which of several learners this is, all of which must `listen`; None: the only one.

    Raises:
        PreflightError: environment, actor, device, folder or checkpoint were refused before the first step.
        WorkerError, StarvationError: too few workers are left.
        ZrlError: collecting or saving failed later, or another learner did.
        Stopped: a signal came before the first step.
    """
    config = config.resolved(secrets.randbits(31))
    torch.set_num_threads(config.threads)
    with contextlib.ExitStack() as opened:
        signals = opened.enter_context(StopSignals()) if signals is None else signals
        if rank is None:
            return _trained(config, on_start, on_update, signals, listen, resume, on_worker, None, opened)
        try:
            with signals.interruptible():
                team = Team(rank, config.device, signals.check)
        except ZrlError as e:
            raise PreflightError(str(e)) from e
        with team:  # inside of `opened`: the others hear of an end before this learner is closed
            return _trained(config, on_start, on_update, signals, listen, resume, on_worker, team, opened)


def _trained(
    config: TrainConfig,
    on_start: Callable[[Start], None],
    on_update: Callable[[Status], None],
    signals: StopSignals,
    listen: Listen | None,
    resume: RunFolder | None,
    on_worker: Callable[[int, int], None],
    team: Team | None,
    opened: contextlib.ExitStack,
) -> Result:
    try:
        if team is None:
            start = _started(config, signals, listen, resume, opened)
        else:
            assert listen is not None
            start = _started_with_others(config, signals, listen, resume, team, opened)
    except ZrlError as e:
        raise PreflightError(str(e)) from e
    on_start(start.told)
    try:
        if listen is not None and listen.expect:
            start.wait_for_workers(listen.expect, on_worker)
        return start.train(on_update)
    except WorkerError as e:
        if e.at_start:
            raise PreflightError(str(e)) from e
        raise


def _started(
    config: TrainConfig,
    signals: StopSignals,
    listen: Listen | None,
    resume: RunFolder | None,
    opened: contextlib.ExitStack,
) -> _Run:
    """The run, ready for its first batch; what it opened is closed by `opened`."""
    if resume is not None:
        opened.enter_context(resume.locked())  # before anything of it is read: it may still be written
    with signals.interruptible():
        run = _Run(config, signals)
        if resume is not None:
            run.restore(resume)
        version = run.first_version
        own = not config.workers and not listen
        if own:  # what it refuses leaves no folder behind
            run.rollout = opened.enter_context(make_rollout(config, run.actor, first_version=version))
    folder = run.folder = RunFolder.create(config) if resume is None else resume
    if resume is None:
        opened.enter_context(folder.locked())
    with signals.interruptible():
        if not own:  # the logs of its workers go into the folder
            run.rollout = opened.enter_context(make_rollout(config, run.actor, folder, listen, version))
        if config.eval_every:
            run.evaluator = opened.enter_context(run.make_evaluator())
    run.write_into(folder, opened)  # last: what is refused leaves a run that is resumed as it was
    run.told = dataclasses.replace(run.told, run=folder, rollout=run.rollout)
    return run


def _started_with_others(
    config: TrainConfig,
    signals: StopSignals,
    listen: Listen,
    resume: RunFolder | None,
    team: Team,
    opened: contextlib.ExitStack,
) -> _Run:
    """The same for one of several learners. Learner 0 listens last: it can send on whoever comes."""
    rank = team.rank
    if team.leads and resume is not None:
        opened.enter_context(resume.locked())
    with signals.interruptible():
        config = team.config(config)
        run = _Run(config, signals, team)
        run.restore_together(resume)
        listen = dataclasses.replace(listen, url=rank.address(listen.url), indices=rank.indices)
        if not team.leads:
            rollout = run.rollout = opened.enter_context(
                make_rollout(config, run.actor, None, listen, run.first_version)
            )
            assert isinstance(rollout, PipelineRollout)
            team.announce(rollout.urls[0])
    if team.leads:
        run.folder = RunFolder.create(config) if resume is None else resume
        if resume is None:
            opened.enter_context(run.folder.locked())
        team.tell("run", str(run.folder.path))
    with signals.interruptible():
        team.vote()  # all others listen
        if team.leads:
            listen = dataclasses.replace(listen, redirect=team.redirect())
            run.rollout = opened.enter_context(make_rollout(config, run.actor, run.folder, listen, run.first_version))
            if config.eval_every:
                run.evaluator = opened.enter_context(run.make_evaluator())
        else:
            run.folder = RunFolder(Path(team.told("run")))
    if team.leads:
        run.write_into(run.folder, opened)
    run.told = dataclasses.replace(run.told, run=run.folder, rollout=run.rollout, n_learners=rank.size)
    return run


class _Run:
    """The moving parts of one run."""

    rollout: Rollout
    folder: RunFolder
    told: Start

    def __init__(self, config: TrainConfig, signals: StopSignals, team: Team | None = None) -> None:
        self.config = config
        self.signals = signals
        self.team = team
        self.leads = team is None or team.leads  # else another learner writes, evaluates and decides
        assert config.seed is not None
        seed_everything(config.seed)
        self.actor = make_actor(config).to(usable_device(config.device))
        self.optimizer = make_optimizer(config, self.actor)
        if team is None:
            self.update = make_update(config, self.actor, self.optimizer, signals.check)
        else:
            shared = team.wrapped(Losses(self.actor))
            self.update = make_update(
                config, self.actor, self.optimizer, lambda: team.pause(signals.pending), lambda *a, **k: shared(*a, **k)
            )
        self.progress = Progress()
        self.first_version = 1
        self.status: Status | None = None
        self.evaluator: Evaluator | None = None
        self.told = Start(config, None, None)  # type: ignore[arg-type]  # both are set before anybody is told
        self._events: Events | None = None
        self._restored: dict[str, Any] | None = None
        self._saved_at = self._submitted_at = 0
        self._evaluation: dict[str, float] | None = None  # the newest
        self._best_evaluation: float | None = None
        self._best_saved: float | None = None  # greatest mean of 100 episodes that a checkpoint was saved with
        self._pending: dict[int, Path] = {}  # checkpoints that are being evaluated, by step
        self._document_at = 0.0
        self._at_goal = False
        self._shares: dict[str, float] = {}

    # ── the start ────────────────────────────────────────────────────────────────────────────────────────────────────

    def restore(self, resume: RunFolder) -> dict[str, Any]:
        """Go on from the newest checkpoint of a run that can be read: what is in it.

        Raises:
            CheckpointError: there is none, or it does not fit.
        """
        skipped: list[str] = []
        path, state = checkpoint.newest(resume.checkpoints, self.config.device, skipped)
        self._take_over(state, str(path))
        best = checkpoint.best_score(resume.checkpoints)  # newer than what a checkpoint knows of itself
        if best is not None and (self._best_evaluation is None or best > self._best_evaluation):
            self._best_evaluation = best
        self.told = dataclasses.replace(self.told, resumed=path, skipped=tuple(skipped), step=self.progress.step)
        return state

    def restore_together(self, resume: RunFolder | None) -> None:
        """The same with other learners, who get from learner 0 what it has read. What they draw is their own."""
        assert self.team is not None
        state = self.restore(resume) if self.leads and resume is not None else {}
        state = self.team.share(state if self.leads else None)
        if not self.leads:
            if state:
                self._take_over(state, "the checkpoint of learner 0")
            seeds = np.random.SeedSequence([self.config.seed or 0, self.first_version, self.team.rank.rank])
            seed_everything(int(seeds.generate_state(1, np.uint64)[0]) >> 1)
            self._restored = None

    def _take_over(self, state: dict[str, Any], name: str) -> None:
        try:
            self.actor.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress.restore(state)
            self.first_version = int(state["version"]) + 1
            self._best_evaluation, self._best_saved = state["eval_best"], state["best_saved"]
            self._restored = state["random"]
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise CheckpointError(f"{name!r} does not fit this run: {type(e).__name__}: {e}") from e
        if self.progress.step >= self.config.steps:
            raise ConfigError(
                f"steps: the run is done, with {self.progress.step:,} of {self.config.steps:,}; give more to go on"
            )
        self._saved_at = self._submitted_at = self.progress.step

    def make_evaluator(self) -> Evaluator:
        """Plays beside training."""
        c = self.config
        assert c.seed is not None
        return Evaluator(
            EnvFactory(c.env, c.env_kwargs),
            self.actor,
            n_episodes=c.eval_episodes,
            longest=LONGEST_EPISODE,
            seed=c.seed,
            log_dir=self.folder.workers,
        )

    def write_into(self, folder: RunFolder, opened: contextlib.ExitStack) -> None:
        """Take the folder of the run, new or resumed.

        Raises:
            ConfigError: it cannot be written.
        """
        step = self.progress.step
        try:
            if self.told.resumed is not None:
                checkpoint.set_aside(self.told.resumed)
                folder.forget_after(step)
            folder.set_config(self.config)
        except OSError as e:
            raise ConfigError(f"cannot write to the run folder {str(folder.path)!r}: {e}") from e
        if self.config.tensorboard:
            self._events = opened.enter_context(Events(folder.tensorboard, after=step))

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def wait_for_workers(self, expected: int, on_worker: Callable[[int, int], None]) -> None:
        assert isinstance(self.rollout, PipelineRollout)
        if self.team is not None:
            self._wait_together(self.rollout, self.team, expected, on_worker)
            return
        with self.signals.interruptible():
            self.rollout.wait_for_workers(expected, told=lambda there: on_worker(there, expected))

    def _wait_together(
        self, rollout: PipelineRollout, team: Team, expected: int, on_worker: Callable[[int, int], None]
    ) -> None:
        """Until all learners together have as many."""
        before = None
        while True:
            team.report(rollout.hosts)
            own = Vote(workers=rollout.wait_for_workers(0), signum=self.signals.pending)
            votes = team.vote(own)
            if signum := max(vote.signum for vote in votes):
                raise Stopped(signum)
            there = sum(vote.workers for vote in votes)
            if there != before:
                on_worker(there, expected)
            if there >= expected:
                return
            before = there
            time.sleep(LOOK)

    def train(self, on_update: Callable[[Status], None]) -> Result:
        self.progress.begin(time.monotonic())
        self.rollout.annotate(self.progress.note(self.config))
        if self._restored is not None:
            set_random_states(self._restored)
        try:
            outcome = self._updates(on_update)
            if self.evaluator is not None:
                self._last_evaluation()
        except Stopped as e:
            outcome = str(e)
        except DivergedError:
            self._failed(save=False)
            raise
        except ZrlError:
            self._failed()
            raise
        except OSError as e:
            self._failed()
            raise CheckpointError(f"cannot write to {str(self.folder.path)!r}: {e}{checkpoint.hint(e)}") from e
        saved = self._save()
        with contextlib.suppress(OSError):
            self._write_document(outcome)
        plot, problem = _plot(self.folder, self.config) if self.leads else (None, "")
        return Result(outcome, self.folder, self.status, saved, plot, problem)

    def _failed(self, *, save: bool = True) -> None:
        """Leave what can be left. The error that led here is the one that counts."""
        with contextlib.suppress(CheckpointError, OSError):
            if save:
                self._save()
        with contextlib.suppress(ZrlError, OSError):
            self._write_document("failed")

    def _updates(self, on_update: Callable[[Status], None]) -> str:
        """Collect and learn until the goal or the last step; which of the two."""
        p = self.progress
        while p.step < self.config.steps:
            batch, n_env_steps = self._next()
            if batch is None:
                return "goal"
            self._learn(batch, n_env_steps)
            evaluation = self._evaluated()
            now = time.monotonic()
            self.status = p.status(batch, self.losses, evaluation, now)
            self.rollout.annotate(self.status.note(self.config, self._evaluation))
            if now - self._document_at >= STATUS_SECONDS:
                self._document_at = now
                self._write_document("running")
            self._record({**self.status.row(), **self._shares})
            if p.step - self._saved_at >= self.config.checkpoint_every:
                self._saved_at = p.step
                self._save()
            if self.evaluator is not None and p.step - self._submitted_at >= self.config.eval_every:
                self._submit(self.evaluator)
            on_update(self.status)
            goal = self.config.stop_at_return
            if goal is not None and self.status.return_100 is not None and self.status.return_100 >= goal:
                if self.team is None:
                    return "goal"
                self._at_goal = self.leads  # the next vote ends the run, for all
        if self.team is not None and any(vote.goal for vote in self.team.vote(self._vote(None))):
            return "goal"
        return "steps"

    def _next(self) -> tuple[Batch | None, int | None]:
        """The next batch, and the steps in those of all learners, if there are several; no batch at the goal."""
        if self.team is None:
            with self.signals.interruptible():
                return next(self.rollout), None
        rollout = self.rollout
        assert isinstance(rollout, PipelineRollout)
        with rollout.waiting():
            return self.team.batch(rollout.next_within, self._vote, rollout.hosts) or (None, None)

    def _vote(self, batch: Batch | None) -> Vote:
        """What to tell the other learners."""
        vote = Vote(goal=int(self._at_goal), signum=self.signals.pending)
        if batch is None:
            return vote
        return vote._replace(
            batch=1, n_env_steps=batch.n_env_steps, n_optimizer_steps=n_optimizer_steps(self.config, batch)
        )

    def _learn(self, batch: Batch, n_env_steps: int | None) -> None:
        self._anneal()
        before = self._snapshot() if self.config.algo == "ppo" else None  # many steps, between which it may be stopped
        try:
            with contextlib.nullcontext() if self.team is None else self.team.together():
                self.losses = self.update(batch)
        except (Stopped, TeamError):
            if before is not None:
                self._go_back_to(before)
            raise
        bad = [name for name, x in self.losses.items() if not math.isfinite(x)]
        if bad:
            raise DivergedError(f"the loss is not finite ({', '.join(bad)}); try a smaller --lr")
        self.progress.count(batch, n_env_steps)

    def _snapshot(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Weights, optimizer and random states as they are now."""
        return copy.deepcopy(self.actor.state_dict()), copy.deepcopy(self.optimizer.state_dict()), random_states()

    def _go_back_to(self, snapshot: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        """Half an update is none: the checkpoint of a step has the weights of that step."""
        self.actor.load_state_dict(snapshot[0])
        self.optimizer.load_state_dict(snapshot[1])
        set_random_states(snapshot[2])

    def _anneal(self) -> None:
        left = max(0.0, 1.0 - self.progress.step / self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = (self.config.lr or 0.0) * left

    def _record(self, row: dict[str, Any]) -> None:
        if not self.leads:
            return
        self.folder.append_metrics(row)
        if self._events is not None:
            self._events.write(row["step"], row)

    def _write_document(self, outcome: str) -> None:
        """What the pipeline and we know, into ``status.json``."""
        if not self.leads:
            return
        document = self.rollout.status()
        self._shares = _time_split(document)
        self.folder.set_status({**document, "outcome": outcome})

    # ── evaluations and checkpoints ──────────────────────────────────────────────────────────────────────────────────

    def _submit(self, evaluator: Evaluator) -> None:
        """Have the weights played as they are now; they are saved, lest they turn out to be the best."""
        step = self._submitted_at = self.progress.step
        saved = self._save()
        if saved is not None:
            # those between the evaluation under way and the newest are skipped
            self._pending = {step: saved, **dict(list(self._pending.items())[:1])}
            self._pending = dict(sorted(self._pending.items()))
            evaluator.submit(step)

    def _evaluated(self) -> dict[str, float] | None:
        """The newest evaluation that has come since the last update; the best weights get their name."""
        fresh: dict[str, float] | None = None
        if self.evaluator is not None and self.evaluator.stats()["stopped"]:  # it has said why
            self.evaluator.close()
            self.evaluator = None
            self._pending.clear()
        for result in self.evaluator.results() if self.evaluator is not None else []:
            fresh = self._evaluation = {
                "step": result.tag,
                "mean": result.mean,
                "min": result.minimum,
                "std": result.std,
            }
            saved = self._pending.get(result.tag)
            self._pending = {step: path for step, path in self._pending.items() if step > result.tag}
            if saved is not None and (self._best_evaluation is None or result.mean > self._best_evaluation):
                self._best_evaluation = result.mean
                if saved.exists():
                    checkpoint.name_best(saved, result.mean)
        return fresh

    def _last_evaluation(self) -> None:
        """At the end: play the final weights, and wait for it."""
        assert self.evaluator is not None
        if self.progress.step > self._submitted_at or self._pending:
            with self.signals.interruptible():
                self._submit(self.evaluator)
                self.evaluator.wait(LAST_EVALUATION_SECONDS)
        evaluation = self._evaluated()
        if evaluation is None or self.status is None:
            return
        self.status = dataclasses.replace(self.status, evaluation=evaluation)
        self.rollout.annotate(self.status.note(self.config, evaluation))
        row = self.status.row()
        self._record({name: x for name, x in row.items() if name in ("step", "update") or name.startswith("eval_")})

    def _save(self) -> Path | None:
        """A checkpoint of the state after the last step of the optimizer; nothing before the first."""
        if not self.optimizer.state or not self.leads:
            return None
        p = self.progress
        folder = self.folder.checkpoints
        mean = p.return_100
        better = self.evaluator is None and mean is not None and (self._best_saved is None or mean > self._best_saved)
        if better:
            self._best_saved = mean
        state = {
            "weights": self.actor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "version": self.rollout.version,
            **p.as_dict(time.monotonic()),
            "eval_best": self._best_evaluation,
            "best_saved": self._best_saved,
            "random": random_states(),
        }
        saved = checkpoint.save(folder, p.step, state)
        if better or not (folder / checkpoint.BEST).exists():
            checkpoint.name_it(checkpoint.BEST, saved)
        checkpoint.prune(folder, self.config.keep, self._pending.values())
        return saved


def seed_everything(seed: int) -> None:
    """Seed the learner's own draws: initial weights, minibatches."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _time_split(document: dict[str, Any]) -> dict[str, float]:
    """Shares of the time, as columns of the metrics: ``wait`` is that of the workers."""
    shares = document.get("shares", {})
    learner = {"wait_learner" if name == "wait" else name: x for name, x in shares.get("learner", {}).items()}
    return {f"time/{name}": x for name, x in {**learner, **shares.get("workers", {})}.items()}


def _plot(run: RunFolder, config: TrainConfig) -> tuple[Path | None, str]:
    """The return plot, or why there is none: a missing extra or a full disk shall not spoil a finished run."""
    target = run.plots / "return.png"
    try:
        plot_return(run.metrics(), f"{config.env}, {config.algo}", target, config.stop_at_return)
    except (ConfigError, OSError) as e:
        return None, str(e)
    return target, ""
