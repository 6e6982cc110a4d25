"""Who gets grants, and what forms a batch: back-pressure and the bound on staleness.

A batch is P fragments. The feed asks for batches (`batch_requested`); each request forms one, as soon as there is one.
Lag is the version at the yield minus the version that a fragment was made with. Three policies, by `max_lag`:

``None``  every free slot is granted at once; a batch is the first P ready fragments.
``k ≥ 1`` never more than (k+1)·P fragments are out: granted, ready, or of a formed batch, which counts, in the user's
          hands too, until the next publish (or the next yield: a user who does not publish after every batch does not
          run dry). Granted with all these ahead of it, a fragment that begins with the newest weights is yielded at
          most k versions later. One that is too old all the same is dropped as soon as that is certain.
``0``     nothing is granted until a batch is requested; then exactly P slots, one worker after the other by index, and
          the batch is in this order, whoever finishes first. What a worker leaves undelivered as it dies goes to its
          replacement.

Inputs are calls; outputs are lists of commands, for the collator to carry out in this order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from zrl.protocol.slots import Fragment, Refused, Ring, Slot, SlotTable, Unmap


@dataclass(frozen=True, slots=True)
class Grant:
    """Send ``Release(slot, least_version)`` to this incarnation."""

    incarnation: bytes
    slot: int
    least_version: int


@dataclass(frozen=True, slots=True)
class FormBatch:
    """Hand these slots to the feed, in this order; `batch_copied` when their bytes are out."""

    batch_id: int
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """This fragment was dropped, and counted under `reason`: for the log."""

    fragment: Fragment
    reason: str


@dataclass(frozen=True, slots=True)
class Discard:
    """This batch is too old to be yielded; it was counted, its slots are freed by `batch_copied` as ever."""

    batch_id: int


MOST_LEFT = 16  # rings of those who left that are kept for what is in them, besides as many as there are live ones

Command = Grant | FormBatch | Drop | Discard | Unmap


def too_old(versions: Iterable[int], version: int, max_lag: int | None) -> bool:
    """Whether a batch of fragments made with `versions` may not be yielded at `version`.

    The user's thread asks this at the yield, `Scheduler.batch_yielded` does again for the books: both get one answer.
    """
    return max_lag is not None and any(version - made > max_lag for made in versions)


def scheduler(slots: SlotTable, *, n_per_batch: int, max_lag: int | None, n_workers: int) -> Scheduler:
    """The policy for `max_lag`.

    Args:
        slots: the books; only the scheduler changes them from here on.
        n_per_batch: P, fragments of a batch.
        max_lag: None, or the greatest lag of a fragment in a batch.
        n_workers: how many workers the run has; only for ``max_lag=0``.

    Raises:
        ValueError: P below 1, a negative lag, or ``max_lag=0`` and P no multiple of `n_workers`.
    """
    if n_per_batch < 1:
        raise ValueError(f"n_per_batch: expected at least 1, not {n_per_batch}")
    if max_lag is None:
        return Asynchronous(slots, n_per_batch)
    if max_lag < 0:
        raise ValueError(f"max_lag: expected None or at least 0, not {max_lag}")
    return Bounded(slots, n_per_batch, max_lag) if max_lag else Synchronous(slots, n_per_batch, n_workers)


class Scheduler:
    """What all policies share: batches and their lives. The subclasses say who gets grants (`_grants`)."""

    def __init__(self, slots: SlotTable, n_per_batch: int, max_lag: int | None) -> None:
        self.slots = slots
        self.n_per_batch = n_per_batch
        self.max_lag = max_lag
        self.version = slots.newest  # published, as far as the scheduler has heard
        self.draining = False
        self.batches: dict[int, tuple[Fragment, ...]] = {}  # formed, neither yielded nor discarded
        self._held: dict[int, tuple[Fragment, ...]] = {}  # formed, not copied
        self._in_hands = False  # a batch was yielded and nothing published since
        self._queue: deque[Fragment] = deque()  # READY, in order of arrival
        self._wanted = 0  # requests not yet answered
        self._next_id = 0
        self.n_regranted = 0  # places of a synchronous batch that were granted once more

    # What happens. Every method returns what is to be done about it.

    def worker_attached(self, incarnation: bytes, worker: int, n_slots: int) -> list[Command]:
        """The ring of this worker was accepted."""
        self.slots.attach(incarnation, worker, n_slots)
        self._changed(incarnation)
        return self._go_on()

    def ready(self, incarnation: bytes, slot: int, seq: int, version: int) -> list[Command]:
        """A worker's Ready; what the books do not allow is counted there, and changes nothing."""
        fragment = self.slots.ready(incarnation, slot, seq, version)
        if isinstance(fragment, Refused):
            return []
        self._arrived(fragment)
        self._changed(incarnation)
        return self._go_on()

    def gone(self, incarnation: bytes, reason: str = "gone", *, clean: bool = False) -> list[Command]:
        """This worker is gone, its slots with it; see `SlotTable.gone`."""
        if self.slots.books(incarnation) is None:  # it never attached, or went before
            return []
        commands: list[Command] = []
        if clean and not self._may_stay():
            for fragment in [f for f in self._queue if f.incarnation == incarnation]:
                self._queue.remove(fragment)
                self.slots.drop(fragment, "left")
                commands.append(Drop(fragment, "left"))
        if not clean:
            commands += [Drop(f, reason) for f in self._queue if f.incarnation == incarnation]
            self._queue = deque(f for f in self._queue if f.incarnation != incarnation)
        self._left(incarnation, clean)
        unmap = self.slots.gone(incarnation, reason, clean=clean)
        return [*commands, *([unmap] if unmap else []), *self._go_on()]

    def _may_stay(self) -> bool:
        """Whether what a worker delivered before it left may wait for its batch, in the whole ring that it is in:
        workers may come and go for as long as the learner takes no batch."""
        live = sum(1 for _ in self.slots.live())
        return len(self.slots.rings) - live < live + MOST_LEFT

    def published(self, version: int) -> list[Command]:
        """These weights are on the board. Whoever put them there has told the books before (`SlotTable.newest`): a
        worker may be faster than this."""
        if version <= self.version:
            raise RuntimeError(f"version {version} published after {self.version}")
        self.version = version
        self._in_hands = False
        return self._go_on()

    def batch_requested(self) -> list[Command]:
        """The feed has room for one more batch."""
        self._wanted += 1
        return self._go_on()

    def batch_copied(self, batch_id: int) -> list[Command]:
        """The bytes of this batch are out of its slots. In any order with `batch_yielded`."""
        fragments = self._held.pop(batch_id)
        unmaps = [self.slots.free(fragment) for fragment in fragments]
        for f in fragments:
            self._changed(f.incarnation)
        return [*filter(None, unmaps), *self._go_on()]

    def batch_yielded(self, batch_id: int, version: int) -> list[Command]:
        """The user got this batch at `version`; or did not, where it was `too_old` by then."""
        fragments = self.batches.pop(batch_id)
        if too_old([f.version for f in fragments], version, self.max_lag):
            for f in fragments:
                self.slots.discarded(f, "stale" if too_old([f.version], version, self.max_lag) else "stale batch")
            return [Discard(batch_id), *self._go_on()]
        for f in fragments:
            self.slots.consumed(f)
        self._in_hands = True
        return self._go_on()

    def drain(self) -> list[Command]:
        """Grant nothing more; batches are formed as before."""
        self.draining = True
        return []

    # What follows.

    @property
    def out(self) -> int:
        """Fragments that are out: granted, ready, or of a batch that counts until the next publish."""
        return (
            self.slots.totals[Slot.WORKER] + len(self._queue) + self.n_per_batch * (len(self.batches) + self._in_hands)
        )

    def waiting_for(self) -> str:
        """Why there is no batch, in words."""
        rings = list(self.slots.live())
        ready, granted = len(self._queue), self.slots.totals[Slot.WORKER]
        slots = sum(len(ring.states) for ring in rings)
        if not rings:
            return "no worker has its environments ready"
        return (
            f"{ready} of {self.n_per_batch} fragments ready, {granted} with {len(rings)} workers, {slots} slots alive"
        )

    def _go_on(self) -> list[Command]:
        commands = self._purge()
        while self._wanted and (fragments := self._next_batch()):
            self._wanted -= 1
            commands.append(self._form(fragments))
            commands += self._purge()
        if not self.draining:
            for incarnation, slot, least in self._grants():
                self.slots.grant(incarnation, slot, least)
                self._changed(incarnation)
                commands.append(Grant(incarnation, slot, least))
        return commands

    def _form(self, fragments: tuple[Fragment, ...]) -> FormBatch:
        for f in fragments:
            self.slots.hold(f)
        self._next_id += 1
        self.batches[self._next_id] = self._held[self._next_id] = fragments
        return FormBatch(self._next_id, fragments)

    def _next_batch(self) -> tuple[Fragment, ...]:
        if len(self._queue) < self.n_per_batch:
            return ()
        return tuple(self._queue.popleft() for _ in range(self.n_per_batch))

    def _arrived(self, fragment: Fragment) -> None:
        self._queue.append(fragment)

    def _left(self, incarnation: bytes, clean: bool) -> None:
        """An incarnation is gone; the books still have it as it was. `clean`: what it delivered stays."""

    def _changed(self, incarnation: bytes) -> None:
        """Slots of this incarnation were freed, granted or filled: for those who look for slots to grant, so that they
        need not look at every worker every time. It may be gone."""

    def _purge(self) -> list[Command]:
        """Drop what is too old for any batch to come."""
        return []

    def _grants(self) -> Iterable[tuple[bytes, int, int]]:
        """(incarnation, slot, least version) of the grants that are due, one at a time: each is made before the next
        is asked for."""
        raise NotImplementedError


class Asynchronous(Scheduler):
    """``max_lag=None``: every free slot is granted at once."""

    def __init__(self, slots: SlotTable, n_per_batch: int) -> None:
        super().__init__(slots, n_per_batch, None)
        self._news: dict[bytes, None] = {}  # incarnations changed since all that was free was granted

    def _changed(self, incarnation: bytes) -> None:
        self._news[incarnation] = None

    def _grants(self) -> Iterable[tuple[bytes, int, int]]:
        if self.slots.totals[Slot.FREE]:
            for incarnation in list(self._news):
                ring = self.slots.rings.get(incarnation)
                while ring is not None and ring.live and ring.counts[Slot.FREE]:
                    yield incarnation, ring.states.index(Slot.FREE), 1
        self._news.clear()


class Bounded(Scheduler):
    """``max_lag=k ≥ 1``: never more than (k+1)·P fragments out."""

    def __init__(self, slots: SlotTable, n_per_batch: int, max_lag: int) -> None:
        super().__init__(slots, n_per_batch, max_lag)
        self._k = max_lag
        self._oldest = 0  # the queue holds nothing older
        # Who may be granted a slot, the next one first. An entry counts while its burden is that of its ring: whatever
        # changes that makes another entry.
        self._candidates: list[tuple[_Burden, Ring]] = []

    @property
    def _version_at_yield(self) -> int:
        """Of the next batch to be formed: each formed one will be followed by a publish, and so is the user's."""
        return self.version + len(self.batches) + self._in_hands

    def _purge(self) -> list[Command]:
        oldest = self._version_at_yield - self._k
        unchanged = oldest <= self._oldest and not (self._queue and self._queue[-1].version < oldest)
        self._oldest = oldest  # falls where a batch is discarded
        if unchanged:
            return []
        old = [f for f in self._queue if f.version < oldest]
        self._queue = deque(f for f in self._queue if f.version >= oldest)
        unmaps = [self.slots.drop(f, "stale") for f in old]
        for f in old:
            self._changed(f.incarnation)
        return [*(Drop(f, "stale") for f in old), *filter(None, unmaps)]

    def _changed(self, incarnation: bytes) -> None:
        ring = self.slots.rings.get(incarnation)
        if ring is not None and _grantable(ring):
            heappush(self._candidates, (_burden(ring), ring))
        if len(self._candidates) > 2 * len(self.slots.rings) + 64:  # most of them do not count any more
            self._candidates = [(_burden(ring), ring) for ring in self.slots.live() if _grantable(ring)]
            heapify(self._candidates)

    def _grants(self) -> Iterable[tuple[bytes, int, int]]:
        out = self.out  # grants made here are the only change on the way
        while out < (self._k + 1) * self.n_per_batch and self.slots.totals[Slot.FREE]:
            ring = self._next_candidate()
            yield ring.incarnation, ring.states.index(Slot.FREE), self._least_version(out)
            out += 1

    def _next_candidate(self) -> Ring:
        """Who has least in hand; among equals who has had fewest, then who came first."""
        while True:
            burden, ring = heappop(self._candidates)
            if _grantable(ring) and _burden(ring) == burden:
                return ring

    def _least_version(self, out: int) -> int:
        """What a fragment must begin with to be young enough, if those that are out now arrive before it."""
        return max(1, self.version + out // self.n_per_batch - self._k)


_Burden = tuple[int, int, int]


def _burden(ring: Ring) -> _Burden:
    return ring.counts[Slot.WORKER], ring.granted, ring.order


def _grantable(ring: Ring) -> bool:
    return ring.live and ring.counts[Slot.FREE] > 0


class Synchronous(Scheduler):
    """``max_lag=0``: exactly P grants per request, in places that go round by worker index.

    A place that is granted again because its worker died (`n_regranted`) is a break of reproducibility.
    """

    def __init__(self, slots: SlotTable, n_per_batch: int, n_workers: int) -> None:
        if n_workers < 1 or n_per_batch % n_workers:
            raise ValueError(
                f"max_lag=0 needs as many fragments from each worker: n_per_batch must be a multiple of the number of "
                f"workers, {n_workers}, not {n_per_batch}"
            )
        super().__init__(slots, n_per_batch, 0)
        self.n_workers = n_workers
        self._open: dict[int, int] = {}  # place -> worker index: to be granted
        self._places: dict[tuple[bytes, int], int] = {}  # (incarnation, slot) -> place: granted
        self._done: dict[int, Fragment] = {}  # place -> fragment

    def _granted(self) -> set[int]:
        """Workers with a place that is granted."""
        return {self.slots.rings[incarnation].worker for incarnation, _ in self._places}

    def _may_stay(self) -> bool:
        return True  # each has its place in the batch, and there is no other one

    @property
    def _under_way(self) -> bool:
        return bool(self._open or self._places or self._done)

    def _arrived(self, fragment: Fragment) -> None:
        super()._arrived(fragment)
        self._done[self._places.pop((fragment.incarnation, fragment.slot))] = fragment

    def _left(self, incarnation: bytes, clean: bool) -> None:
        lost = {place: key for key, place in self._places.items() if key[0] == incarnation}
        dropped = {place: f for place, f in self._done.items() if f.incarnation == incarnation and not clean}
        worker = self.slots.rings[incarnation].worker if lost or dropped else -1
        for place, key in lost.items():
            del self._places[key]
            self._open[place] = worker
        for place in dropped:
            del self._done[place]
            self._open[place] = worker
        self.n_regranted += len(lost) + len(dropped)

    def _next_batch(self) -> tuple[Fragment, ...]:
        if len(self._done) < self.n_per_batch:
            return ()
        fragments = tuple(self._done[place] for place in range(self.n_per_batch))
        self._done.clear()
        self._queue.clear()
        return fragments

    def _grants(self) -> Iterable[tuple[bytes, int, int]]:
        if not self._wanted or (self._under_way and not self._open):
            return  # before the walk over all workers: with every Ready it would be too much
        rings = {ring.worker: ring for ring in self.slots.live()}
        if not self._under_way and not self.batches and len(rings) >= self.n_workers:
            team = sorted(rings)[: self.n_workers]
            self._open = {place: team[place % self.n_workers] for place in range(self.n_per_batch)}
        self._hand_over(rings)
        for place, worker in sorted(self._open.items()):
            ring = rings.get(worker)
            if ring is None or not ring.counts[Slot.FREE]:
                continue  # it is yet to come, or its slots are being copied
            slot = ring.states.index(Slot.FREE)
            del self._open[place]
            self._places[ring.incarnation, slot] = place
            yield ring.incarnation, slot, self.version

    def _hand_over(self, rings: dict[int, Ring]) -> None:
        """Give the places of the dead to workers without a place, if there are any. A replacement has the index of whom
        it replaces; but one from another host, which came for one that left, has not."""
        for dead in sorted({worker for worker in self._open.values() if worker not in rings}):
            busy = {*self._open.values(), *(f.worker for f in self._done.values()), *self._granted()}
            spare = next((worker for worker in sorted(rings) if worker not in busy), dead)
            self._open = {place: spare if worker == dead else worker for place, worker in self._open.items()}
