"""Evaluation beside training: a process of its own plays episodes with copies of the weights, greedily.

    evaluator = Evaluator(make_env, actor)
    …
    evaluator.submit(step)                  copies the weights, returns at once
    for evaluation in evaluator.results():  what has been finished meanwhile

Nothing here waits for that process, but `wait` and `close`, and nothing that happens to it raises. It has no thread on
this side: it is looked after whenever a method is called.
"""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch

from zrl.collect.spaces import Factory
from zrl.errors import ClosedError, ConfigError
from zrl.nodes.evaluator import EvaluatorRecipe, Line
from zrl.nodes.evaluator_host import EvaluatorHost
from zrl.nodes.page import Phase
from zrl.rollout.interrupts import Uninterrupted
from zrl.rollout.local import check_count, check_seconds, dealt
from zrl.rollout.same import private_copy, usable_device

LOOK = 0.01  # seconds between two looks in `wait`


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        tag: as given to `Evaluator.submit`.
        version: number of the submission, from 1.
        returns: undiscounted return of each episode: those of the first environment, of the next, and so on.
        lengths: their steps.
        n_cut: how many of them were cut at `longest` steps: their returns are those until then.
        seconds: that playing took.
    """

    tag: int
    version: int
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    n_cut: int
    seconds: float

    @property
    def mean(self) -> float:
        """Of the returns."""
        return float(np.mean(self.returns))

    @property
    def minimum(self) -> float:
        """The least return."""
        return min(self.returns)

    @property
    def std(self) -> float:
        """Standard deviation of the returns, with n in the denominator."""
        return float(np.std(self.returns))


class Evaluator:
    """Plays episodes with the weights of `actor` in a process of its own, in eval mode, while training goes on.

    An evaluation is `n_episodes` episodes, dealt out over the environments beforehand, as evenly as it goes; so short
    ones count no more than long ones. It is a function of the weights and `seed`: each evaluation begins with the same
    seeds and random states, as far as ``reset(seed=…)`` brings an environment back. The process runs one torch thread
    at low priority. If it dies or stands still it is replaced, up to three times in a row; then evaluations stop,
    with one warning in the log ``zrl``. Training is not ended by it.

    To be used by one thread at a time.

    Args:
        factory: makes one environment, as in `zrl.rollout.multi.rollout`.
        actor: the learner's, wrapped or not, on any device.
        n_episodes: of an evaluation.
        n_envs: environments that are stepped together; no more than there are episodes are made.
        longest: steps after which an episode is cut, and counted as such.
        seed: of everything random in an evaluation.
        log_dir: gets ``evaluator.log``; a temporary folder, if None.
        start_method: ``"fork"`` or ``"spawn"``, as in `zrl.rollout.multi.rollout`.
        device: where the copy acts.
        start_timeout: seconds to build the environments in.
        stall_timeout: seconds that one call of an environment may take.

    Raises:
        ConfigError: an argument makes no sense, or factory or actor cannot be sent to another process.
        ActorError: not a `BaseActorModule`, or it cannot be copied.
        WeightsError: a tensor of the actor cannot travel.
        SharedMemoryError, ProcessError: memory or process cannot be had.
    """

    def __init__(
        self,
        factory: Factory,
        actor: torch.nn.Module,
        *,
        n_episodes: int = 20,
        n_envs: int = 4,
        longest: int = 27_000,
        seed: int = 0,
        log_dir: str | Path | None = None,
        start_method: Literal["fork", "spawn"] = "fork",
        device: torch.device | str = "cpu",
        start_timeout: float = 300.0,
        stall_timeout: float = 60.0,
    ) -> None:
        if not callable(factory):
            raise ConfigError(f"factory: expected a callable that makes one environment, not {factory!r:.100}")
        for name, value, least in (
            ("n_episodes", n_episodes, 1),
            ("n_envs", n_envs, 1),
            ("longest", longest, 1),
            ("seed", seed, 0),
        ):
            check_count(name, value, least)
        if start_method not in ("fork", "spawn"):
            raise ConfigError(f"start_method: expected one of fork, spawn, not {start_method!r}")
        check_seconds("start_timeout", start_timeout)
        check_seconds("stall_timeout", stall_timeout)
        episodes_of = dealt(n_episodes, n := min(n_envs, n_episodes))
        recipe = EvaluatorRecipe(
            factory,
            private_copy(actor, torch.device("cpu"), "eval"),
            tuple(map(episodes_of, range(n))),
            longest,
            seed,
            str(usable_device(device)),
        )
        self._version = self._n_evaluated = self._n_skipped = 0
        self._n_episodes = self._n_steps = 0
        self._seconds = 0.0
        self._waiting: dict[int, int] = {}  # tags by version, of submissions whose fate is open
        self._finished: list[Evaluation] = []
        patience = {Phase.BUILD: start_timeout, Phase.COLLECT: stall_timeout}
        with Uninterrupted():
            self._host = EvaluatorHost(
                recipe, actor, None if log_dir is None else Path(log_dir), start_method, patience
            )
            self._closer = weakref.finalize(self, _close, self._host, os.getpid())  # also at interpreter exit

    def submit(self, tag: int) -> None:
        """Ask for an evaluation of the weights as they are now, which are copied; returns at once.

        It begins when the one under way is over. If another submission comes before that, this one is skipped.

        Args:
            tag: comes back with the result; the number of environment steps, say.

        Raises:
            WeightsError: the actor is not what it was.
            ClosedError: it was closed before.
        """
        if not self._closer.alive:
            raise ClosedError("this evaluator was closed; make a new one")
        self._look()
        with Uninterrupted():
            version = self._version + 1
            if self._host.stopped:
                self._n_skipped += 1
            else:
                self._host.publish(version)
                self._waiting[version] = tag
            self._version = version

    def results(self) -> list[Evaluation]:
        """The evaluations finished since the last call, oldest first, without waiting; also after `close`."""
        self._look()
        finished, self._finished = self._finished, []
        return finished

    def wait(self, timeout: float) -> bool:
        """Wait until the newest submission is evaluated, for `timeout` seconds at most; whether it is.

        False at once where evaluations have stopped.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._look()
            if not self._waiting:
                return not self._host.stopped
            if not self._closer.alive or (left := deadline - time.monotonic()) <= 0:
                return False
            time.sleep(min(LOOK, left))

    def stats(self) -> dict[str, Any]:
        """What happened so far.

        ``submitted`` = ``evaluated`` + ``skipped`` + ``waiting``, the last one with that under way; ``episodes`` and
        ``env_steps`` of evaluations; ``seconds`` that they took; ``replaced``: how often another process took over;
        ``stopped``: why there will be no more, empty otherwise.
        """
        self._look()
        return {
            "submitted": self._version,
            "evaluated": self._n_evaluated,
            "skipped": self._n_skipped,
            "waiting": len(self._waiting),
            "episodes": self._n_episodes,
            "env_steps": self._n_steps,
            "seconds": self._seconds,
            "replaced": self._host.n_replaced,
            "stopped": self._host.stopped,
        }

    def close(self) -> None:
        """End the process and what belongs to it, within 3 s; what it was playing is lost. Idempotent."""
        self._look()
        self._closer()
        _close(self._host, os.getpid())  # once more: goes on where one was interrupted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _look(self) -> None:
        """Take what was finished, and see to the process."""
        if not self._closer.alive:
            return
        with Uninterrupted():
            for line in self._host.look():
                self._take(line)
            if self._host.stopped:
                self._n_skipped += len(self._waiting)
                self._waiting.clear()

    def _take(self, line: Line) -> None:
        tag = self._waiting.pop(line.version)
        overtaken = [version for version in self._waiting if version < line.version]
        for version in overtaken:
            del self._waiting[version]
        self._n_skipped += len(overtaken)
        self._n_evaluated += 1
        self._n_episodes += len(line.returns)
        self._n_steps += sum(line.lengths)
        self._seconds += line.seconds
        returns, lengths = tuple(line.returns), tuple(line.lengths)
        self._finished.append(Evaluation(tag, line.version, returns, lengths, line.n_cut, line.seconds))


def _close(host: EvaluatorHost, pid: int) -> None:
    if os.getpid() == pid:  # else a fork of the learner: nothing of this is its own
        host.close()
