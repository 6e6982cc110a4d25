"""What is counted: environment steps that reached the learner's side within a window of wall time."""

from __future__ import annotations

import time


class Window:
    """Opens at a delivery, once the warm-up is over, and closes at one.

    Warm-up: at least so many seconds after the first delivery, and three of them, so that what an asynchronous system
    had stored before anybody asked is not counted. Between two deliveries all steps of the second one were made or
    waited for, so that the rate is that of a system in its stride.
    """

    def __init__(self, seconds: float, warm_up: float) -> None:
        self.steps, self.seconds = 0, 0.0
        self._length, self._warm_up = seconds, warm_up
        self._first: float | None = None
        self._began: float | None = None
        self._before = 0

    def delivered(self, n: int) -> bool:
        """`n` steps have been delivered, and learnt from, where that belongs to the work. Whether that is enough."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        self._before += 1
        if self._began is None:
            if now - self._first >= self._warm_up and self._before >= 3:
                self._began = now
            return False
        self.steps += n
        self.seconds = now - self._began
        return self.seconds >= self._length

    @property
    def rate(self) -> float:
        """Steps per second."""
        return self.steps / self.seconds
