"""Where a training run stands: after each update, and as others are told of it."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from typing import Any

from zrl.config import TrainConfig
from zrl.data.batch import Batch

WINDOW = 100  # episodes that the goal is measured over
RATE_SECONDS = 10.0  # over which rates are taken


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a run stands after an update.

    Attributes:
        step: environment steps taken; `update`: updates made; `seconds` of training, also before it was resumed.
        steps_per_s, updates_per_s: of the last seconds.
        return_100: mean return of the last 100 finished episodes; None before there were as many.
        return_best: the greatest that it was so far.
        return_update, length_update: means over the episodes that ended in this update's batch; None without any.
        lag: of the batch's fragments: least, mean, greatest.
        losses: what the losses report.
        evaluation: the newest one beside training, if one has come since the last update.
    """

    step: int
    update: int
    version: int
    seconds: float
    steps_per_s: float
    updates_per_s: float
    return_100: float | None
    return_best: float | None
    return_update: float | None
    length_update: float | None
    episodes: int
    lag: tuple[int, float, int]
    losses: dict[str, float]
    evaluation: dict[str, float] | None = None

    def row(self) -> dict[str, Any]:
        """One line of ``metrics.jsonl``: flat."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        losses, lag, evaluation = values.pop("losses"), values.pop("lag"), values.pop("evaluation")
        return {
            **values,
            **dict(zip(("lag/min", "lag/mean", "lag/max"), lag, strict=True)),
            **{f"loss/{name}": x for name, x in losses.items()},
            **{f"eval_{name}": x for name, x in (evaluation or {}).items()},
        }

    def note(self, config: TrainConfig, evaluation: dict[str, float] | None) -> dict[str, Any]:
        """What others are told of it, beside what the pipeline knows itself."""
        left = max(0, config.steps - self.step)
        return {
            **_note(config, self),
            "steps_per_s": self.steps_per_s,
            "updates_per_s": self.updates_per_s,
            "return_update": self.return_update,
            "length_update": self.length_update,
            "eta_s": left / self.steps_per_s if self.steps_per_s > 0 else None,
            "eval": evaluation,
        }


def _note(config: TrainConfig, so_far: Status | Progress) -> dict[str, Any]:
    counts = ("step", "update", "episodes", "return_100", "return_best")
    names = {"env": config.env, "algo": config.algo, "seed": config.seed, "steps": config.steps}
    return {**names, **{name: getattr(so_far, name) for name in counts}}


class Progress:
    """Counts what was done.

    Attributes:
        step, update, episodes: so far.
        returns: of the last `WINDOW` finished episodes.
        return_best: the greatest mean of so many.
    """

    def __init__(self) -> None:
        self.step = self.update = self.episodes = 0
        self.returns: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.return_best: float | None = None
        self.seconds_before = 0.0  # of training, when this process took it up
        self._marks: collections.deque[tuple[float, int, int]] = collections.deque()

    @property
    def return_100(self) -> float | None:
        """Mean return of the last 100 finished episodes; None before there were as many."""
        return statistics.fmean(self.returns) if len(self.returns) == WINDOW else None

    def begin(self, now: float) -> None:
        """Training begins, at `now` on some clock, seconds."""
        self._started = now
        self._marks.append((now, self.step, self.update))

    def seconds(self, now: float) -> float:
        """Of training, also before it was resumed."""
        return self.seconds_before + now - self._started

    def count(self, batch: Batch, n_env_steps: int | None = None) -> None:
        """An update with this batch was made; `n_env_steps`: of the batches of all learners, if there are several."""
        self.step += batch.n_env_steps if n_env_steps is None else n_env_steps
        self.update += 1
        self.episodes += len(batch.episodes)
        self.returns.extend(e.ret for e in batch.episodes)
        mean = self.return_100
        if mean is not None and (self.return_best is None or mean > self.return_best):
            self.return_best = mean

    def status(self, batch: Batch, losses: dict[str, float], evaluation: dict[str, float] | None, now: float) -> Status:
        """After the update with this batch."""
        marks = self._marks
        marks.append((now, self.step, self.update))
        while len(marks) > 2 and marks[1][0] <= now - RATE_SECONDS:
            marks.popleft()
        since, step, update = marks[0]
        elapsed = max(now - since, 1e-9)
        ended, lag = batch.episodes, batch.lag
        return Status(
            step=self.step,
            update=self.update,
            version=batch.version,
            seconds=self.seconds(now),
            steps_per_s=(self.step - step) / elapsed,
            updates_per_s=(self.update - update) / elapsed,
            return_100=self.return_100,
            return_best=self.return_best,
            return_update=statistics.fmean(e.ret for e in ended) if ended else None,
            length_update=statistics.fmean(e.length for e in ended) if ended else None,
            episodes=self.episodes,
            lag=(min(lag), statistics.fmean(lag), max(lag)),
            losses=losses,
            evaluation=evaluation,
        )

    def note(self, config: TrainConfig) -> dict[str, Any]:
        """What others are told before the first update."""
        return _note(config, self)

    def as_dict(self, now: float) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "step": self.step,
            "update": self.update,
            "episodes": self.episodes,
            "returns": list(self.returns),
            "return_best": self.return_best,
            "seconds": self.seconds(now),
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Go on from what `as_dict` gave.

        Raises:
            KeyError, TypeError: it did not.
        """
        self.step, self.update, self.episodes = (int(values[name]) for name in ("step", "update", "episodes"))
        self.returns.extend(float(x) for x in values["returns"])
        self.return_best = None if values["return_best"] is None else float(values["return_best"])
        self.seconds_before = float(values["seconds"])
