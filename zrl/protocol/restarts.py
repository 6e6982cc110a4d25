"""How often something that failed is made again, and how long to wait before it: a worker, or an environment of it."""

from __future__ import annotations

from collections import deque


class Restarts:
    """The budget of every worker index of a host, or of every column of a worker.

    A failure within the last `window` seconds counts. Up to `budget` of them are followed by a restart, after
    `first_delay` seconds that double with each, `most_delay` at most; one more, and it is given up.

    Args:
        budget: restarts of each within `window`.
        window: seconds.
        first_delay: seconds.
        most_delay: seconds.
    """

    def __init__(
        self, budget: int = 5, window: float = 300.0, first_delay: float = 0.5, most_delay: float = 30.0
    ) -> None:
        self.budget = budget
        self.window = window
        self.first_delay = first_delay
        self.most_delay = most_delay
        self._failures: dict[int, deque[float]] = {}

    def failed(self, which: int, now: float) -> float | None:
        """A failure of the one with this index: seconds to wait before its restart; None: no more restarts."""
        failures = self._failures.setdefault(which, deque())
        while failures and failures[0] <= now - self.window:
            failures.popleft()
        if len(failures) >= self.budget:
            return None
        failures.append(now)
        return min(self.first_delay * 2.0 ** (len(failures) - 1), self.most_delay)

    def spent(self, which: int, now: float) -> int:
        """Restarts of this one within the last `window` seconds."""
        return sum(at > now - self.window for at in self._failures.get(which, ()))
