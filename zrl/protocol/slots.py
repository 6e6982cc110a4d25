"""Where every slot of every live worker is, in one table of transitions, and what became of every fragment.

A slot is a credit: a worker may write into it only after a grant, and gets it again only when its fragment has been
copied out. The books below are the learner's; nothing that a peer says is taken over unless a transition allows it.

At any instant, for every live incarnation, ``free + worker + ready + held = K``; and over the whole run
``committed = consumed + dropped (by reason) + in flight``: in flight is what is READY or in a formed batch that has
been neither yielded nor discarded, its slots HELD or already copied and free again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType


class Slot(IntEnum):
    """Where a slot is."""

    FREE = 0  # at the collator, not granted
    WORKER = 1  # granted: the worker writes it, or will
    READY = 2  # holds a fragment that waits for its batch
    HELD = 3  # in a formed batch, being copied
    ENDED = 4  # of an incarnation that is gone, and needed no more


class Event(IntEnum):
    """What happens to a slot."""

    GRANT = 0  # the collator sends a Release
    READY = 1  # the worker's Ready is accepted
    HOLD = 2  # its batch is formed
    FREE = 3  # its fragment has been copied
    DROP = 4  # its fragment is not wanted: too old
    LOSE = 5  # its worker died with the fragment in hand
    LEAVE = 6  # its worker is gone
    RETIRE = 7  # its worker said Bye: what it delivered stays


#: (state, event) -> (next state, what is counted). All that is not here is refused.
TRANSITIONS: Mapping[tuple[Slot, Event], tuple[Slot, str]] = MappingProxyType(
    {
        (Slot.FREE, Event.GRANT): (Slot.WORKER, "granted"),
        (Slot.WORKER, Event.READY): (Slot.READY, "committed"),
        (Slot.READY, Event.HOLD): (Slot.HELD, "formed"),
        (Slot.HELD, Event.FREE): (Slot.FREE, "copied"),
        (Slot.READY, Event.DROP): (Slot.FREE, "dropped"),
        (Slot.FREE, Event.LEAVE): (Slot.ENDED, ""),
        (Slot.WORKER, Event.LOSE): (Slot.ENDED, "lost"),
        (Slot.WORKER, Event.LEAVE): (Slot.ENDED, "withdrawn"),
        (Slot.READY, Event.LEAVE): (Slot.ENDED, "dropped"),
        (Slot.HELD, Event.LEAVE): (Slot.HELD, ""),  # finished by its holder, then ended
        (Slot.FREE, Event.RETIRE): (Slot.ENDED, ""),
        (Slot.WORKER, Event.RETIRE): (Slot.ENDED, "withdrawn"),
        (Slot.READY, Event.RETIRE): (Slot.READY, ""),  # waits for its batch, then ended
        (Slot.HELD, Event.RETIRE): (Slot.HELD, ""),
    }
)


@dataclass(frozen=True, slots=True)
class Fragment:
    """A committed fragment: where it lies, and what its Ready said."""

    incarnation: bytes
    slot: int
    worker: int  # index
    seq: int
    version: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """Command: no slot of this gone incarnation is needed any more; let go of its ring."""

    incarnation: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """What a peer asked for is not allowed; it is counted under `reason`, and nothing changed."""

    reason: str


class Ring:
    """The books on one incarnation's slots.

    Attributes:
        granted: Releases sent.
        accepted: Readys accepted.
        order: how many rings were attached before.
    """

    __slots__ = ("accepted", "counts", "granted", "incarnation", "least", "live", "order", "seq", "states", "worker")

    def __init__(self, incarnation: bytes, worker: int, n_slots: int, order: int) -> None:
        self.incarnation = incarnation
        self.worker = worker
        self.order = order
        self.states = [Slot.FREE] * n_slots
        self.counts = [n_slots, 0, 0, 0, 0]  # by Slot
        self.least: dict[int, int] = {}  # least version of each granted slot, oldest grant first
        self.seq = 0
        self.granted = 0
        self.accepted = 0
        self.live = True


@dataclass
class SlotTable:
    """All rings, and the counters of the run.

    A call that is about what a *peer* says never raises: it returns `Refused`. A call that is about what the collator
    itself does raises `RuntimeError` when it is not allowed: that is an error of ours.

    Attributes:
        newest: newest version that a fragment can have been made with. The publisher sets it before the weights go on
            the board, from whichever thread: a fast worker's Ready may overtake the word that they are there.
        rings: by incarnation: the live ones, and the gone ones with fragments that are still to be copied.
        counters: what the transitions count, and ``consumed``.
        dropped: fragments committed and never yielded, by reason.
        refused: what peers said in vain, by reason.
        formed: fragments of formed batches, neither yielded nor discarded.
        totals: slots by state, over all rings; `Slot.ENDED` also over those forgotten.
        n_attached: rings so far.
    """

    newest: int = 1
    rings: dict[bytes, Ring] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    formed: set[Fragment] = field(default_factory=set)
    totals: list[int] = field(default_factory=lambda: [0] * len(Slot))
    n_attached: int = 0

    def attach(self, incarnation: bytes, worker: int, n_slots: int) -> Refused | None:
        """A worker's ring has been accepted: its slots are FREE."""
        if incarnation in self.rings:
            return self._refuse("attached twice")
        self.rings[incarnation] = Ring(incarnation, worker, n_slots, self.n_attached)
        self.n_attached += 1
        self.totals[Slot.FREE] += n_slots
        return None

    def grant(self, incarnation: bytes, slot: int, least_version: int) -> None:
        ring = self.rings[incarnation]
        if not ring.live:
            raise RuntimeError("a grant to an incarnation that is gone")
        self._step(ring, slot, Event.GRANT)
        ring.least[slot] = least_version
        ring.granted += 1

    def check(self, incarnation: bytes, slot: int, seq: int, version: int) -> Refused | None:
        """Whether a Ready would be accepted; asked before its payload is received into the slot."""
        ring = self.rings.get(incarnation)
        if ring is None or not ring.live:
            return self._refuse("unknown incarnation")
        if not 0 <= slot < len(ring.states) or (ring.states[slot], Event.READY) not in TRANSITIONS:
            return self._refuse("slot not granted")
        if seq <= ring.seq:
            return self._refuse("seq repeated")
        if not ring.least[slot] <= version <= self.newest:
            return self._refuse("version out of range")
        return None

    def ready(self, incarnation: bytes, slot: int, seq: int, version: int) -> Fragment | Refused:
        """A worker's Ready: WORKER → READY, if it is what the books allow."""
        refused = self.check(incarnation, slot, seq, version)
        if refused is not None:
            return refused
        ring = self.rings[incarnation]
        self._step(ring, slot, Event.READY)
        del ring.least[slot]
        ring.seq = seq
        ring.accepted += 1
        return Fragment(incarnation, slot, ring.worker, seq, version)

    def hold(self, fragment: Fragment) -> None:
        """Its batch is formed."""
        self._step(self.rings[fragment.incarnation], fragment.slot, Event.HOLD)
        self.formed.add(fragment)

    def free(self, fragment: Fragment) -> Unmap | None:
        """Its bytes have been copied. The slot is free, or ended where the worker is gone."""
        return self._freed(fragment, Event.FREE)

    def drop(self, fragment: Fragment, reason: str) -> Unmap | None:
        """A READY fragment is not wanted: it is counted under `reason`, and its slot is free, or ended."""
        self.dropped[reason] += 1
        return self._freed(fragment, Event.DROP)

    def _freed(self, fragment: Fragment, event: Event) -> Unmap | None:
        ring = self.rings[fragment.incarnation]
        self._step(ring, fragment.slot, event)
        if ring.live:
            return None
        self._step(ring, fragment.slot, Event.LEAVE)
        return self._forget(ring)

    def consumed(self, fragment: Fragment) -> None:
        """Its batch was yielded."""
        self.formed.remove(fragment)
        self.counters["consumed"] += 1

    def discarded(self, fragment: Fragment, reason: str) -> None:
        """Its batch was formed, but is not yielded."""
        self.formed.remove(fragment)
        self.counters["dropped"] += 1
        self.dropped[reason] += 1

    def gone(self, incarnation: bytes, reason: str = "gone", *, clean: bool = False) -> Unmap | None:
        """A worker is gone. What it was writing is lost, what is READY is dropped, what is HELD is finished by its
        holder. `clean`: it said Bye, and had nothing in hand; what is READY is as good as ever. Repeated or unknown:
        nothing."""
        ring = self.rings.get(incarnation)
        if ring is None or not ring.live:
            return None
        ring.live = False
        in_hand = -1 if clean else next(iter(ring.least), -1)  # it takes its grants in their order
        for slot, state in enumerate(ring.states):
            self._step(ring, slot, Event.RETIRE if clean else Event.LOSE if slot == in_hand else Event.LEAVE)
            if state is Slot.READY and not clean:
                self.dropped[reason] += 1
        ring.least.clear()
        return self._forget(ring)

    def books(self, incarnation: bytes) -> tuple[int, int] | None:
        """(Readys accepted, Releases sent) of a live incarnation, to compare with what its Beat says."""
        ring = self.rings.get(incarnation)
        return (ring.accepted, ring.granted) if ring is not None and ring.live else None

    @property
    def in_flight(self) -> int:
        """Fragments committed that have been neither consumed nor dropped."""
        return self.totals[Slot.READY] + len(self.formed)

    def live(self) -> Iterator[Ring]:
        return (ring for ring in self.rings.values() if ring.live)

    def audit(self) -> None:
        """Raise `AssertionError` where the invariants do not hold: for tests and for ``debug=True``."""
        for ring in self.rings.values():
            assert [ring.states.count(state) for state in Slot] == ring.counts, "counts by state"
            if ring.live:
                assert ring.counts[Slot.ENDED] == 0, "a live incarnation with an ended slot"
                assert set(ring.least) == {k for k, s in enumerate(ring.states) if s is Slot.WORKER}, "grants"
            else:
                assert ring.counts[Slot.READY] + ring.counts[Slot.HELD], "a gone incarnation that is not forgotten"
                assert not ring.counts[Slot.FREE] + ring.counts[Slot.WORKER], "a gone incarnation with slots in use"
        for state in (Slot.FREE, Slot.WORKER, Slot.READY, Slot.HELD):
            assert self.totals[state] == sum(r.counts[state] for r in self.rings.values()), "totals by state"
        counted = self.counters["consumed"] + sum(self.dropped.values()) + self.in_flight
        assert self.counters["committed"] == counted, "a fragment went missing"
        assert self.counters["dropped"] == sum(self.dropped.values()), "a drop without a reason"

    def _step(self, ring: Ring, slot: int, event: Event) -> None:
        state = ring.states[slot]
        step = TRANSITIONS.get((state, event))
        if step is None:
            raise RuntimeError(f"worker {ring.worker}, slot {slot}: {event.name} in state {state.name}")
        to, counter = step
        ring.states[slot] = to
        ring.counts[state] -= 1
        ring.counts[to] += 1
        self.totals[state] -= 1
        self.totals[to] += 1
        if counter:
            self.counters[counter] += 1

    def _forget(self, ring: Ring) -> Unmap | None:
        if ring.counts[Slot.ENDED] < len(ring.states):
            return None
        del self.rings[ring.incarnation]
        return Unmap(ring.incarnation)

    def _refuse(self, reason: str) -> Refused:
        self.refused[reason] += 1
        return Refused(reason)
