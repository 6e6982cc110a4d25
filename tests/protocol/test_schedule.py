"""The three policies, each driven to many batches, and their borders."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from zrl.protocol.schedule import (
    MOST_LEFT,
    Command,
    Discard,
    Drop,
    FormBatch,
    Grant,
    Scheduler,
    Synchronous,
    scheduler,
)
from zrl.protocol.slots import Fragment, Refused, Ring, Slot, SlotTable, Unmap


def worker_id(index: int, generation: int = 0) -> bytes:
    return bytes([index, generation]).ljust(16, b".")


def published(s: Scheduler, version: int) -> list[Command]:
    """As the user's thread does it: the books know of a version before anybody can see it."""
    s.slots.newest = version
    return s.published(version)


class Run:
    """A learner that always has a batch prefetched, and workers that take as long as `rng` says."""

    def __init__(
        self,
        max_lag: int | None,
        p: int,
        n_workers: int,
        k: int,
        seed: int = 0,
        auto_publish: bool = True,
        table: SlotTable | None = None,
    ):
        self.table = table or SlotTable()
        self.s = scheduler(self.table, n_per_batch=p, max_lag=max_lag, n_workers=n_workers)
        self.rng = random.Random(seed)
        self.auto_publish = auto_publish
        self.now = 0.0
        self.at_work: dict[bytes, list[tuple[float, Grant, int]]] = {}  # (done at, grant, version)
        self.seqs: dict[bytes, int] = {}
        self.version = 1
        self.formed: list[FormBatch] = []
        self.lags: list[int] = []
        self.discards = 0
        for w in range(n_workers):
            self.seqs[worker_id(w)] = 0
            self.at_work[worker_id(w)] = []
            self.do(self.s.worker_attached(worker_id(w), w, k))

    def do(self, commands: list[Command]) -> None:
        for c in commands:
            if isinstance(c, Grant):
                queue = self.at_work[c.incarnation]
                begin = max([self.now, *(done for done, _, _ in queue)])
                queue.append((begin + self.rng.uniform(1.0, 2.0), c, 0))
                if len(queue) == 1:
                    self.begin(c.incarnation)
            elif isinstance(c, FormBatch):
                self.formed.append(c)
                self.do(self.s.batch_copied(c.batch_id))
            elif isinstance(c, Discard):
                self.discards += 1

    def begin(self, incarnation: bytes) -> None:
        done, grant, _ = self.at_work[incarnation][0]
        self.at_work[incarnation][0] = (done, grant, self.version)  # the weights as it begins

    def next_ready(self) -> None:
        incarnation = min((i for i, q in self.at_work.items() if q), key=lambda i: self.at_work[i][0][0])
        self.now, grant, version = self.at_work[incarnation].pop(0)
        if self.at_work[incarnation]:
            self.begin(incarnation)
        self.seqs[incarnation] += 1
        self.do(self.s.ready(incarnation, grant.slot, self.seqs[incarnation], version))

    def batches(self, n: int, requests_ahead: int, update: float = 0.0) -> None:
        """The user's loop, `update` seconds a batch."""
        for _ in range(requests_ahead):
            self.do(self.s.batch_requested())
        for i in range(n):
            if self.auto_publish and i:
                self.version += 1
                self.do(published(self.s, self.version))
            if not requests_ahead:
                self.do(self.s.batch_requested())
            for _ in range(10_000):
                if self.formed:
                    break
                self.next_ready()
            batch = self.formed.pop(0)
            self.lags += [self.version - f.version for f in batch.fragments]
            self.do(self.s.batch_yielded(batch.batch_id, self.version))
            if requests_ahead:
                self.do(self.s.batch_requested())
            end = self.now + update
            while any(q and q[0][0] <= end for q in self.at_work.values()):
                self.next_ready()
            self.now = end
            self.table.audit()


@pytest.mark.parametrize("max_lag", [1, 2, 3])
@pytest.mark.parametrize(("p", "n_workers", "k"), [(4, 4, 2), (3, 8, 3), (8, 2, 8), (1, 1, 1)])
@pytest.mark.parametrize(("update", "most_dropped"), [(0.0, 0.12), (2.5, 0.01)])
def test_lag_is_bounded_and_drops_are_few(
    max_lag: int, p: int, n_workers: int, k: int, update: float, most_dropped: float
) -> None:
    """With fragments of 1 to 2 s. Where the learner is what everybody waits for, next to nothing is dropped; where it
    takes no time at all, those that were overtaken are."""
    run = Run(max_lag, p, n_workers, k)
    run.batches(400, requests_ahead=1, update=update)
    assert max(run.lags) <= max_lag
    assert run.discards == 0
    assert sum(run.table.dropped.values()) <= most_dropped * run.table.counters["committed"]


def test_without_a_bound_everything_is_granted_at_once() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=2, max_lag=None, n_workers=2)
    assert s.worker_attached(worker_id(0), 0, 3) == [Grant(worker_id(0), slot, 1) for slot in range(3)]
    assert s.ready(worker_id(0), 2, 1, 1) == []  # nobody has asked
    assert s.ready(worker_id(0), 0, 2, 1) == []
    formed = s.batch_requested()
    assert formed == [FormBatch(1, (Fragment(worker_id(0), 2, 0, 1, 1), Fragment(worker_id(0), 0, 0, 2, 1)))]
    assert s.batch_copied(1) == [Grant(worker_id(0), 0, 1), Grant(worker_id(0), 2, 1)]


def test_a_user_who_never_publishes_does_not_run_dry() -> None:
    run = Run(1, 4, 4, 2, auto_publish=False)
    run.batches(50, requests_ahead=1)
    assert set(run.lags) == {0}


def test_credits_go_round_the_workers() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=2, max_lag=1, n_workers=4)
    granted = [c.incarnation for w in range(4) for c in s.worker_attached(worker_id(w), w, 1) if isinstance(c, Grant)]
    assert granted == [worker_id(w) for w in range(4)]
    more = s.worker_attached(worker_id(4), 4, 1)
    assert more == []  # four are out


def test_what_is_too_old_is_dropped_when_it_is_certain() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=2, max_lag=1, n_workers=1)
    s.worker_attached(worker_id(0), 0, 4)
    s.ready(worker_id(0), 0, 1, 1)
    assert published(s, 2) == []
    old = Fragment(worker_id(0), 0, 0, 1, 1)
    assert published(s, 3)[0] == Drop(old, "stale")
    assert table.dropped == {"stale": 1}
    commands = s.ready(worker_id(0), 1, 2, 1)
    assert commands[0] == Drop(Fragment(worker_id(0), 1, 0, 2, 1), "stale")


def test_a_batch_that_is_too_old_at_the_yield_is_discarded() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=2, max_lag=1, n_workers=1)
    s.worker_attached(worker_id(0), 0, 2)
    s.ready(worker_id(0), 0, 1, 1)
    published(s, 2)
    s.ready(worker_id(0), 1, 2, 2)
    s.batch_requested()
    published(s, 3)  # a user who publishes twice per batch
    assert Discard(1) in s.batch_yielded(1, 3)
    assert table.dropped == {"stale": 1, "stale batch": 1}
    s.batch_copied(1)
    table.audit()


def test_on_policy_batches_are_in_the_order_of_the_grants() -> None:
    run = Run(0, 6, 3, 2)
    run.batches(20, requests_ahead=0)
    assert set(run.lags) == {0}
    assert run.table.counters["granted"] == run.table.counters["consumed"] == 120


def test_on_policy_nothing_is_granted_before_a_request_and_all_workers() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=4, max_lag=0, n_workers=2)
    assert s.worker_attached(worker_id(1), 1, 2) == []
    assert s.batch_requested() == []
    assert s.worker_attached(worker_id(0), 0, 2) == [
        *(Grant(worker_id(0), 0, 1), Grant(worker_id(1), 0, 1)),
        *(Grant(worker_id(0), 1, 1), Grant(worker_id(1), 1, 1)),
    ]


def test_on_policy_a_replacement_gets_what_the_dead_one_left() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=4, max_lag=0, n_workers=2)
    assert isinstance(s, Synchronous)
    for w in (0, 1):
        s.worker_attached(worker_id(w), w, 2)
    s.batch_requested()
    s.ready(worker_id(1), 1, 1, 1)
    s.ready(worker_id(0), 0, 1, 1)
    lost = Fragment(worker_id(0), 0, 0, 1, 1)
    assert s.gone(worker_id(0)) == [Drop(lost, "gone"), Unmap(worker_id(0))]
    assert s.n_regranted == 2
    s.ready(worker_id(1), 0, 2, 1)
    new = worker_id(0, 1)
    assert s.worker_attached(new, 0, 2) == [Grant(new, 0, 1), Grant(new, 1, 1)]
    s.ready(new, 1, 1, 1)
    (formed,) = s.ready(new, 0, 2, 1)
    assert isinstance(formed, FormBatch)
    assert [(f.incarnation, f.slot) for f in formed.fragments] == [
        *((new, 0), (worker_id(1), 0)),
        *((new, 1), (worker_id(1), 1)),
    ]
    assert (table.counters["lost"], table.dropped["gone"]) == (1, 1)


def test_a_dead_worker_keeps_its_ring_until_what_is_held_is_copied() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=1, max_lag=None, n_workers=1)
    s.worker_attached(worker_id(0), 0, 3)
    s.ready(worker_id(0), 0, 1, 1)
    s.batch_requested()
    assert s.gone(worker_id(0)) == []
    assert (table.counters["lost"], table.counters["withdrawn"]) == (1, 1)
    assert s.batch_yielded(1, 1) == []  # the user may have it before the copy's event is seen
    assert s.batch_copied(1) == [Unmap(worker_id(0))]
    assert (table.counters["consumed"], table.in_flight, dict(table.rings)) == (1, 0, {})


def test_what_a_worker_delivered_before_its_bye_stays() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=2, max_lag=None, n_workers=1)
    s.worker_attached(worker_id(0), 0, 3)
    s.ready(worker_id(0), 1, 1, 1)
    assert s.gone(worker_id(0), clean=True) == []
    assert (table.counters["lost"], table.counters["withdrawn"], table.in_flight) == (0, 2, 1)
    s.worker_attached(worker_id(1), 1, 1)
    s.batch_requested()
    (formed,) = [c for c in s.ready(worker_id(1), 0, 1, 1) if isinstance(c, FormBatch)]
    assert [f.incarnation for f in formed.fragments] == [worker_id(0), worker_id(1)]
    assert s.batch_copied(formed.batch_id) == [Unmap(worker_id(0)), Grant(worker_id(1), 0, 1)]


def test_rings_of_those_who_left_are_not_kept_without_bound() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=4, max_lag=None, n_workers=1)
    for n in range(100):  # they come, deliver two fragments and go, and nobody takes a batch
        s.worker_attached(worker_id(n), n, 3)
        for k in range(2):
            s.ready(worker_id(n), k, k + 1, 1)
        s.gone(worker_id(n), clean=True)
        table.audit()
    kept = MOST_LEFT + 1
    assert (len(table.rings), table.in_flight) == (kept, 2 * kept)
    assert dict(table.dropped) == {"left": 200 - 2 * kept}
    (formed,) = [c for c in s.batch_requested() if isinstance(c, FormBatch)]
    assert {f.incarnation for f in formed.fragments} == {worker_id(0), worker_id(1)}


def test_workers_that_come_and_go_leave_nothing_with_who_grants() -> None:
    """Also while nothing can be granted."""
    s = scheduler(SlotTable(), n_per_batch=1, max_lag=1, n_workers=1)
    for n in range(1000):
        s.worker_attached(worker_id(n % 250, n // 250), n, 1)
        if n > 3:
            s.gone(worker_id((n - 3) % 250, (n - 3) // 250))
    assert len(s._candidates) < 200  # type: ignore[attr-defined]


def test_what_it_delivered_may_get_too_old() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=2, max_lag=1, n_workers=1)
    s.worker_attached(worker_id(0), 0, 1)
    s.ready(worker_id(0), 0, 1, 1)
    assert s.gone(worker_id(0), clean=True) == []
    table.newest = 3
    dropped = Fragment(worker_id(0), 0, 0, 1, 1)
    assert s.published(3) == [Drop(dropped, "stale"), Unmap(worker_id(0))]
    assert (table.dropped["stale"], table.in_flight, dict(table.rings)) == (1, 0, {})


def test_draining_grants_nothing_more_but_forms_batches() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=1, max_lag=None, n_workers=1)
    s.worker_attached(worker_id(0), 0, 1)
    s.drain()
    s.ready(worker_id(0), 0, 1, 1)
    (formed,) = s.batch_requested()
    assert isinstance(formed, FormBatch)
    assert s.batch_copied(1) == []


def test_a_ready_may_overtake_the_word_of_its_weights() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=1, max_lag=None, n_workers=1)
    s.worker_attached(worker_id(0), 0, 1)
    assert table.ready(worker_id(0), 0, 1, 2) == Refused("version out of range")
    table.newest = 2  # before the weights are on the board
    assert isinstance(table.ready(worker_id(0), 0, 1, 2), Fragment)


@pytest.mark.parametrize(
    ("p", "max_lag", "n_workers", "word"), [(0, None, 1, "n_per_batch"), (2, -1, 1, "max_lag"), (3, 0, 2, "multiple")]
)
def test_settings_without_sense_are_refused(p: int, max_lag: int | None, n_workers: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        scheduler(SlotTable(), n_per_batch=p, max_lag=max_lag, n_workers=n_workers)


def test_our_own_errors_raise() -> None:
    table = SlotTable()
    s: Scheduler = scheduler(table, n_per_batch=1, max_lag=None, n_workers=1)
    s.worker_attached(worker_id(0), 0, 1)
    with pytest.raises(RuntimeError, match="GRANT in state WORKER"):
        table.grant(worker_id(0), 0, 1)
    with pytest.raises(RuntimeError, match="published after"):
        s.published(1)


def test_why_there_is_no_batch() -> None:
    s = scheduler(SlotTable(), n_per_batch=2, max_lag=None, n_workers=1)
    s.worker_attached(worker_id(0), 0, 3)
    assert s.waiting_for() == "0 of 2 fragments ready, 3 with 1 workers, 3 slots alive"


def test_on_policy_the_places_of_who_never_comes_back_go_to_a_newcomer() -> None:
    table = SlotTable()
    s = scheduler(table, n_per_batch=4, max_lag=0, n_workers=2)
    for index in (0, 1):
        s.worker_attached(worker_id(index), index, 2)
    grants = [c for c in s.batch_requested() if isinstance(c, Grant)]
    assert [g.incarnation for g in grants] == [worker_id(0), worker_id(1)] * 2
    s.ready(worker_id(1), grants[1].slot, 1, 1)
    assert s.gone(worker_id(1)) != []  # what it had ready is dropped
    assert s.worker_attached(worker_id(0, 1), 5, 2) != []  # index 5: of another host
    for seq, grant in enumerate((grants[0], grants[2]), 1):
        s.ready(worker_id(0), grant.slot, seq, 1)
    s.ready(worker_id(0, 1), 0, 1, 1)
    (formed,) = [c for c in s.ready(worker_id(0, 1), 1, 2, 1) if isinstance(c, FormBatch)]
    assert [f.worker for f in formed.fragments] == [0, 5, 0, 5]
    s.batch_copied(formed.batch_id)
    s.batch_yielded(formed.batch_id, 1)
    published(s, 2)
    again = [c for c in s.batch_requested() if isinstance(c, Grant)]
    assert [g.incarnation for g in again] == [worker_id(0), worker_id(0, 1)] * 2
    table.audit()


def test_the_word_of_a_version_comes_late() -> None:
    """The next one may have been announced meanwhile: a Ready with it is fine."""
    table = SlotTable()
    s = scheduler(table, n_per_batch=1, max_lag=None, n_workers=1)
    s.worker_attached(worker_id(0), 0, 1)
    table.newest = 3
    s.published(2)
    assert table.newest == 3
    assert isinstance(table.ready(worker_id(0), 0, 1, 3), Fragment)


def test_what_is_too_old_is_dropped_also_after_a_discard() -> None:
    """A discarded batch is followed by no publish: the bound falls, and later rises again over what came between."""
    table = SlotTable()
    s = scheduler(table, n_per_batch=1, max_lag=1, n_workers=1)
    s.worker_attached(worker_id(0), 0, 8)
    s.batch_requested()
    s.ready(worker_id(0), 0, 1, 1)  # in a batch: the next one will be yielded at version 2
    published(s, 2)
    published(s, 3)
    assert Discard(1) in s.batch_yielded(1, 3)
    table.newest = 4
    old = s.ready(worker_id(0), 1, 2, 2)
    assert old == [] or isinstance(old[0], Grant)  # at version 3 it would be young enough
    young = s.ready(worker_id(0), 2, 3, 4)
    assert not [c for c in young if isinstance(c, Drop)]
    assert Drop(Fragment(worker_id(0), 1, 0, 2, 2), "stale") in published(s, 4)
    (formed,) = [c for c in s.batch_requested() if isinstance(c, FormBatch)]
    assert formed.fragments[0].version == 4
    table.audit()


class Watched(SlotTable):
    """Counts the walks over all workers, and knows whose turn it is where the lag is bounded."""

    walks = 0
    in_turn = False

    def live(self) -> Iterator[Ring]:
        self.walks += 1
        return super().live()

    def grant(self, incarnation: bytes, slot: int, least_version: int) -> None:
        able = [ring for ring in super().live() if ring.counts[Slot.FREE]]
        burdens = {ring.incarnation: (ring.counts[Slot.WORKER], ring.granted, ring.worker) for ring in able}
        assert not self.in_turn or burdens[incarnation] == min(burdens.values())
        super().grant(incarnation, slot, least_version)


@pytest.mark.parametrize("max_lag", [None, 0, 1, 3])
def test_a_fragment_takes_no_look_at_all_workers(max_lag: int | None) -> None:
    """With many of them, that would take most of the collator's time. Still the slot goes to whose turn it is."""
    table = Watched()
    table.in_turn = bool(max_lag)
    n_workers, p = 40, 40 if max_lag == 0 else 4
    run = Run(max_lag, p, n_workers, 2, table=table)
    table.walks = 0
    run.batches(100, requests_ahead=0 if max_lag == 0 else 1)
    assert table.counters["consumed"] == 100 * p
    assert table.walks <= 100 * p / 20
    if max_lag is None:
        assert table.totals[Slot.FREE] == 0
