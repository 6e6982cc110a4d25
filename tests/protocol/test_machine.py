"""Any interleaving of what workers, the feed and the user do keeps the books straight: slots and scheduler together."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zrl.protocol.schedule import (
    Command,
    Discard,
    Drop,
    FormBatch,
    Grant,
    Scheduler,
    Synchronous,
    scheduler,
    too_old,
)
from zrl.protocol.slots import Fragment, Slot, SlotTable, Unmap

N_WORKERS = 3


class Pipeline(RuleBasedStateMachine):
    """Drives a scheduler as collator, feed, user and workers would, and keeps books of its own by the commands."""

    scheduler: Scheduler

    @initialize(max_lag=st.sampled_from([None, 0, 1, 2]), k=st.integers(1, 3), m=st.integers(1, 3))
    def begin(self, max_lag: int | None, k: int, m: int) -> None:
        self.n_slots = max(k, m) if max_lag == 0 else k
        p = N_WORKERS * m if max_lag == 0 else min(m, N_WORKERS * k)
        self.table = SlotTable()
        self.scheduler = scheduler(self.table, n_per_batch=p, max_lag=max_lag, n_workers=N_WORKERS)
        self.max_lag, self.p = max_lag, p
        self.version = 1
        self.born = 0
        self.live: dict[bytes, int] = {}  # incarnation -> worker index
        self.dead: list[bytes] = []
        self.mapped: set[bytes] = set()
        self.grants: dict[bytes, list[Grant]] = {}  # with the worker, in order
        self.round: list[Grant] = []  # of the batch under way, in the order of the grants
        self.broken = False  # a worker died in this round
        self.seq: dict[bytes, int] = {}
        self.ready: set[tuple[bytes, int]] = set()
        self.formed: dict[int, tuple[Fragment, ...]] = {}  # not yielded
        self.held: dict[int, tuple[Fragment, ...]] = {}  # not copied
        self.in_hands = 0
        self.drained = False

    def carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, Grant):
                assert not self.drained
                assert command.incarnation in self.live
                assert command.least_version <= self.version
                if not self.round:
                    self.broken = False
                self.round.append(command)
                self.grants[command.incarnation].append(command)
            elif isinstance(command, FormBatch):
                self.form(command)
            elif isinstance(command, Drop):
                self.ready.remove((command.fragment.incarnation, command.fragment.slot))
            elif isinstance(command, Unmap):
                assert command.incarnation not in self.live
                assert not any(f.incarnation == command.incarnation for fs in self.held.values() for f in fs)
                assert not any(incarnation == command.incarnation for incarnation, _ in self.ready)
                self.mapped.remove(command.incarnation)

    def form(self, command: FormBatch) -> None:
        places = [(f.incarnation, f.slot) for f in command.fragments]
        assert len(set(places)) == self.p
        self.ready -= set(places)
        if self.max_lag == 0:
            indices = [f.worker for f in command.fragments]
            assert indices == [place % N_WORKERS for place in range(self.p)]
            if not self.broken:
                assert places == [(g.incarnation, g.slot) for g in self.round]
            self.round = []
        self.formed[command.batch_id] = self.held[command.batch_id] = command.fragments

    @rule(index=st.integers(0, N_WORKERS - 1))
    def attach(self, index: int) -> None:
        if index in self.live.values():
            return
        self.born += 1
        incarnation = self.born.to_bytes(16, "big")
        self.live[incarnation] = index
        self.mapped.add(incarnation)
        self.grants[incarnation], self.seq[incarnation] = [], 0
        self.carry_out(self.scheduler.worker_attached(incarnation, index, self.n_slots))

    @precondition(lambda self: any(self.grants.values()))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        incarnation = data.draw(st.sampled_from([i for i, grants in self.grants.items() if grants]))
        grant = self.grants[incarnation].pop(0)
        version = data.draw(st.integers(grant.least_version, self.version))
        self.seq[incarnation] += 1
        before = self.table.counters["committed"]
        self.ready.add((incarnation, grant.slot))
        self.carry_out(self.scheduler.ready(incarnation, grant.slot, self.seq[incarnation], version))
        assert self.table.counters["committed"] == before + 1

    @rule(data=st.data())
    def deliver_nonsense(self, data: st.DataObject) -> None:
        """Stale, repeated, never granted, from the future: nothing but a count comes of it."""
        incarnation = data.draw(st.sampled_from([*self.live, *self.dead, bytes(16)]))
        slot, seq = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
        version = data.draw(st.integers(1, self.version + 1))
        granted = {g.slot: g for g in self.grants.get(incarnation, [])}
        if slot in granted and seq > self.seq[incarnation] and granted[slot].least_version <= version <= self.version:
            return
        before = (self.table.counters.copy(), sum(self.table.refused.values()))
        assert self.scheduler.ready(incarnation, slot, seq, version) == []
        assert (self.table.counters, sum(self.table.refused.values()) - 1) == before

    @precondition(lambda self: self.live)
    @rule(data=st.data(), reason=st.sampled_from(["gone", "desync", "stalled"]), clean=st.booleans())
    def lose(self, data: st.DataObject, reason: str, clean: bool) -> None:
        incarnation = data.draw(st.sampled_from(sorted(self.live)))
        lost = self.table.counters["lost"]
        in_hand = bool(self.grants.pop(incarnation)) and not clean
        del self.live[incarnation]
        self.dead.append(incarnation)
        self.broken = True
        ready = {place for place in self.ready if place[0] == incarnation}
        self.carry_out(self.scheduler.gone(incarnation, reason, clean=clean))
        assert self.table.counters["lost"] == lost + in_hand
        assert not clean or ready <= self.ready | {(f.incarnation, f.slot) for fs in self.formed.values() for f in fs}
        assert self.scheduler.gone(incarnation, reason) == []

    @rule()
    def publish(self) -> None:
        self.version += 1
        self.in_hands = 0
        self.scheduler.slots.newest = self.version
        self.carry_out(self.scheduler.published(self.version))

    @precondition(lambda self: len(self.formed) < 3)
    @rule()
    def request(self) -> None:
        self.carry_out(self.scheduler.batch_requested())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[batch_id]
        self.carry_out(self.scheduler.batch_copied(batch_id))

    @precondition(lambda self: self.formed)
    @rule(publish=st.booleans())
    def take(self, publish: bool) -> None:
        """The user's `next()`, with a publish of its own or without."""
        batch_id = min(self.formed)
        if publish:
            self.publish()
        fragments = self.formed.pop(batch_id)
        stale = too_old([f.version for f in fragments], self.version, self.max_lag)
        if not stale:
            self.in_hands = 1
        commands = self.scheduler.batch_yielded(batch_id, self.version)
        assert (Discard(batch_id) in commands) == stale
        self.carry_out(commands)

    @precondition(lambda self: self.live and not self.drained)
    @rule(sure=st.integers(0, 9))
    def drain(self, sure: int) -> None:
        if sure == 0:
            self.drained = True
            self.carry_out(self.scheduler.drain())

    @invariant()
    def books_are_straight(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.audit()
        assert self.mapped == set(self.table.rings)
        assert self.table.totals[Slot.WORKER] == sum(map(len, self.grants.values()))
        assert self.table.totals[Slot.READY] == len(self.ready)
        assert len(self.table.formed) == self.p * len(self.formed)

    @invariant()
    def what_may_be_granted_is_granted(self) -> None:
        if self.max_lag != 0 and not self.drained and self.table.totals[Slot.FREE]:
            assert self.max_lag is not None
            assert self.scheduler.out >= (self.max_lag + 1) * self.p

    @invariant()
    def no_more_are_out_than_may_be(self) -> None:
        if not hasattr(self, "table") or self.max_lag is None:
            return
        granted, ready = sum(map(len, self.grants.values())), len(self.ready)
        out = granted + ready + self.p * (len(self.formed) + self.in_hands)
        if self.max_lag:
            assert out <= (self.max_lag + 1) * self.p
        else:
            assert granted + ready <= self.p

    @invariant()
    def what_is_formed_is_young_enough_by_what_is_known(self) -> None:
        if hasattr(self, "table") and isinstance(self.scheduler, Synchronous):
            assert len(self.formed) <= 1


TestPipeline = Pipeline.TestCase
TestPipeline.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
