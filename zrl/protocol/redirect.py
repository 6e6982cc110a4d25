"""Which of several learners a new host belongs to: the one with the fewest workers.

Learner 0 decides for all, and hosts are started with its address; the others take whoever comes. So what one of them
knows too late cannot send a host back and forth: a redirect is followed by a welcome, or by the host's return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zrl.protocol import messages as m

PATIENCE = 15.0  # seconds that a host tries an address where nobody answers, before it returns to the one it was given
SOON = 5.0  # seconds in which a host that says Hello again has not tried yet, but said it before it was answered
RESERVED = 30.0  # seconds that a host which was sent to a learner counts there, before it has arrived
FORGOTTEN = 120.0  # seconds after which one that never arrived is a newcomer like others
MOST_SENT = 1024  # hosts that are on their way; more stay here

#: Where the host of this Hello is to go, "" to stay: asked with the hosts that are here (workers by name) and the time.
Redirect = Callable[[m.Hello, Mapping[str, int], float], str]


@dataclass(frozen=True, slots=True)
class _Sent:
    learner: int
    count: int
    at: float


class Spread:
    """Learner 0's view of all; a `Redirect`.

    Args:
        urls: where hosts connect to, of each learner, its own first.

    Attributes:
        there: hosts of each of the others, as last heard: workers by name. Replace it as a whole.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = tuple(urls)
        self.there: Mapping[int, Mapping[str, int]] = {}
        self._sent: dict[str, _Sent] = {}

    def __call__(self, hello: m.Hello, here: Mapping[str, int], now: float) -> str:
        """The url of another learner, or "".

        A host goes where one of its name is already. One that was sent away and never arrived is kept here when it
        comes back: it cannot reach the other. Who counts as much here as elsewhere stays.
        """
        there = self.there
        at = next((learner for learner, hosts in there.items() if hello.name in hosts), None)
        if at is not None:
            self._sent.pop(hello.name, None)
            return self.urls[at]
        self._arrived(there, now)
        sent = self._sent.get(hello.name)
        if sent is not None and now - sent.at >= SOON:
            del self._sent[hello.name]
            return ""
        to = sent.learner if sent is not None else self._fewest(here, there, now)
        if not to or (sent is None and len(self._sent) >= MOST_SENT):
            return ""
        if sent is None:
            self._sent[hello.name] = _Sent(to, hello.count, now)
        return self.urls[to]

    def _fewest(self, here: Mapping[str, int], there: Mapping[int, Mapping[str, int]], now: float) -> int:
        """The learner with the fewest workers, the first of several."""
        counts = [sum((here if i == 0 else there.get(i, {})).values()) for i in range(len(self.urls))]
        for sent in self._sent.values():
            counts[sent.learner] += sent.count if now - sent.at < RESERVED else 0
        return counts.index(min(counts))

    def _arrived(self, there: Mapping[int, Mapping[str, int]], now: float) -> None:
        """Forget of whom was sent away those who have arrived, or never will."""
        names = {name for hosts in there.values() for name in hosts}
        self._sent = {
            name: sent for name, sent in self._sent.items() if name not in names and now - sent.at < FORGOTTEN
        }
