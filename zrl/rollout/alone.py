"""What a collector without processes has to say of itself: `same` and `inline` collect and learn in one thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from zrl.metrics import History, Recent, Situation, Totals, verdict
from zrl.nodes.status import Learner, document

LOOK_EVERY = 1.0  # seconds


class Alone:
    """Clock, history and status of such a collector; all in the user's thread.

    Its one worker is the user's thread inside of ``next()``: it counts as waiting while the user computes.

    Attributes:
        learner: what is known of the user's thread.
    """

    def __init__(self) -> None:
        self.learner = Learner()
        self._history = History()
        self._began = time.monotonic()
        self._looked = float("-inf")

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Around all that ``next()`` does."""
        self.learner.clock.enter("wait")
        try:
            yield
        finally:
            self.learner.clock.enter("train")

    def due(self) -> bool:
        """Whether a second has passed since the last `look`."""
        return time.monotonic() - self._looked >= LOOK_EVERY

    def look(self, stats: Mapping[str, Any], n_fragments: int, n_batches: int) -> Recent:
        """What the last seconds were like, by the figures of the collector."""
        now = self._looked = time.monotonic()
        return self._history.look(
            Totals(
                now,
                workers=1,
                waiting=1,
                stages={**stats["seconds"], "n_env_steps": stats["env_steps"]},
                learner=self.learner.clock.read(now),
                fragments=n_fragments,
                batches=n_batches,
                lags={0: n_fragments},
            )
        )

    def status(self, stats: Mapping[str, Any], n_fragments: int, n_batches: int) -> dict[str, Any]:
        """The figures of the collector as a status."""
        recent = self.look(stats, n_fragments, n_batches)
        return document(
            {
                **stats,
                "seconds": {**stats["seconds"], **self.learner.seconds()},
                "lag": {0: n_fragments},
                **recent.as_dict(),
            },
            self.learner,
            verdict=verdict(Situation(recent=recent, in_process=True)),
            lag=recent.lag,
            time=time.time(),
            uptime=time.monotonic() - self._began,
            url="",
        )
