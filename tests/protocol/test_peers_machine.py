"""Any interleaving of hellos, readys, stale messages, losses, desync and drain: peers, slots and scheduler together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zrl.protocol import messages as m
from zrl.protocol import schedule as s
from zrl.protocol.peer_states import State
from zrl.protocol.peers import OWN, Deliver, HostLost, Inspect, Lost, Peers, Send
from zrl.protocol.slots import SlotTable, Unmap

RUN = b"R" * 16
K, P = 2, 2
WELCOME = m.Welcome(RUN, m.NO_ID, 4, 2, K, False, False, (), "train", bytes(16), 0, "", "", 1, "ipc:///x")
SILENCE = 5.0
STAGES = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class Learner(RuleBasedStateMachine):
    """Does what the collator does with commands; keeps books of its own of who must be alive."""

    @initialize(max_lag=st.sampled_from([None, 1]))
    def begin(self, max_lag: int | None) -> None:
        self.now = 0.0
        self.peers = Peers(WELCOME, boot_id="boot", local_silence=SILENCE)
        self.table = SlotTable()
        self.scheduler = s.scheduler(self.table, n_per_batch=P, max_lag=max_lag, n_workers=2)
        self.scheduler.batch_requested()
        self.n = 0
        self.hosts: dict[bytes, m.Hello] = {}  # by routing id: the Hello that was welcomed
        self.workers: dict[bytes, m.Hello] = {}
        self.attached: set[bytes] = set()  # incarnations
        self.grants: dict[bytes, list[s.Grant]] = {}
        self.seq: dict[bytes, int] = {}
        self.lost: list[bytes] = []  # incarnations, each once
        self.dead: list[tuple[bytes, m.Hello]] = []
        self.draining = False
        own = self.hello("host", name="own")
        self.say(OWN, own)
        self.hosts[OWN] = own

    def hello(self, role: str, **changes: Any) -> m.Hello:
        self.n += 1
        new = self.n.to_bytes(16, "big")
        made = m.Hello(m.NO_ID, new, m.PROTOCOL_VERSION, role, f"h{self.n}", (), m.NO_ID, "boot", m.NO_ID, 0, 0, 2)
        return dataclasses.replace(made, **changes)

    def say(self, peer: bytes, message: m.Message) -> list[Any]:
        commands = self.peers.receive(peer, message, self.now, self.table.books)
        self.carry_out(commands)
        return list(commands)

    def carry_out(self, commands: Iterable[Any]) -> None:
        for c in commands:
            if isinstance(c, Lost):
                self.on_lost(c)
            elif isinstance(c, HostLost):
                peer = next(peer for peer, hello in self.hosts.items() if hello.incarnation == c.incarnation)
                assert not any(w.host == c.incarnation for w in self.workers.values()), "its workers go before it"
                self.dead.append((peer, self.hosts.pop(peer)))
            elif isinstance(c, Deliver):
                assert c.ready.incarnation in self.attached
                self.carry_out(
                    self.scheduler.ready(*(getattr(c.ready, k) for k in ("incarnation", "slot", "seq", "version")))
                )
            elif isinstance(c, Inspect):
                self.inspect(c.attach)
            elif isinstance(c, s.Grant):
                assert c.incarnation in self.attached, "a grant to who is gone"
                assert not self.draining
                self.grants[c.incarnation].append(c)
            elif isinstance(c, s.FormBatch):
                self.carry_out(self.scheduler.batch_copied(c.batch_id))
                self.carry_out(self.scheduler.batch_yielded(c.batch_id, self.scheduler.version))
                self.carry_out(self.scheduler.batch_requested())
            else:
                assert isinstance(c, (Send, Unmap, s.Drop, s.Discard)), c

    def on_lost(self, c: Lost) -> None:
        self.carry_out(self.scheduler.gone(c.incarnation, "gone", clean=c.clean))
        peer = next((peer for peer, hello in self.workers.items() if hello.incarnation == c.incarnation), None)
        if peer is None:
            assert c.report is not None, "lost twice"
            assert c.again == (c.incarnation in self.lost)
            return
        assert not c.again
        self.lost.append(c.incarnation)
        self.dead.append((peer, self.workers.pop(peer)))
        self.attached.discard(c.incarnation)
        self.grants.pop(c.incarnation, None)

    def inspect(self, attach: m.Attach) -> None:
        if attach.n_slots != K:
            self.carry_out(self.peers.refused(attach.incarnation, "ring", "another number of slots"))
            return
        if accepted := self.peers.accepted(attach.incarnation, local=True):
            self.carry_out(accepted)
            self.attached.add(attach.incarnation)
            self.grants[attach.incarnation], self.seq[attach.incarnation] = [], 0
            index = self.peers.workers[attach.incarnation].index
            self.carry_out(self.scheduler.worker_attached(attach.incarnation, index, K))

    # ── what may happen ──────────────────────────────────────────────────────────────────────────────────────────────

    @rule()
    def host_says_hello(self) -> None:
        hello = self.hello("host")
        peer = b"p" + hello.incarnation
        (answer,) = self.say(peer, hello)
        assert isinstance(answer.message, m.Reject if self.draining else m.Welcome)
        if not self.draining:
            self.hosts[peer] = hello

    @rule(data=st.data(), offset=st.integers(0, 2))
    def worker_says_hello(self, data: st.DataObject, offset: int) -> None:
        hello = data.draw(st.sampled_from(list(self.hosts.values())))
        host = self.peers.hosts[hello.incarnation]
        said = self.hello("worker", host=hello.incarnation, index=host.base + offset)
        taken = any(w.index == said.index and w.host == said.host for w in self.workers.values())
        commands = self.say(b"p" + said.incarnation, said)
        welcome = commands and isinstance(commands[0].message, m.Welcome)
        assert bool(welcome) == (offset < 2 and not taken and not self.draining)
        if welcome:
            self.workers[b"p" + said.incarnation] = said

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), good=st.integers(0, 4))
    def attach(self, data: st.DataObject, good: int) -> None:
        peer = data.draw(st.sampled_from(sorted(self.workers)))
        who = self.workers[peer].incarnation
        n_slots = K if good else K + 1
        self.say(peer, m.Attach(RUN, who, [], bytes(16), n_slots, 64, 1, 3, 8192, "boot", ""))

    @precondition(lambda self: any(self.grants.values()))
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted(i for i, grants in self.grants.items() if grants)))
        grant = self.grants[who].pop(0)
        self.seq[who] += 1
        before = self.table.counters["committed"]
        version = max(grant.least_version, 1)
        self.say(self.peer_of(who), m.Ready(RUN, who, grant.slot, self.seq[who], version, *STAGES, 1))
        assert self.table.counters["committed"] == before + 1

    def peer_of(self, who: bytes) -> bytes:
        return next(peer for peer, hello in self.workers.items() if hello.incarnation == who)

    @rule(data=st.data(), run=st.sampled_from([RUN, b"x" * 16]))
    def stale(self, data: st.DataObject, run: bytes) -> None:
        """The dead speak, the living under another name: nothing comes of it but a count, or HelloAgain."""
        known = [*self.hosts.items(), *self.workers.items()]
        peer, hello = data.draw(st.sampled_from([*known, *self.dead]))
        alive = (peer, hello) in known
        who = b"?" * 16 if alive and run == RUN else hello.incarnation
        message = data.draw(
            st.sampled_from(
                [m.Ready(run, who, 0, 1, 1, *STAGES, 1), m.Bye(run, who), m.Fetch(run, who), m.Drain(run, who)]
            )
        )
        committed, before = self.table.counters["committed"], sum(self.peers.counters.values())
        commands = self.say(peer, message)
        assert self.table.counters["committed"] == committed
        assert sum(self.peers.counters.values()) == before + 1
        assert all(isinstance(c, Send) and isinstance(c.message, m.HelloAgain) for c in commands)
        assert not (alive and commands)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), how=st.sampled_from(["gone", "bye", "unreachable", "desync"]))
    def lose(self, data: st.DataObject, how: str) -> None:
        peer = data.draw(st.sampled_from(sorted(self.workers)))
        hello = self.workers[peer]
        if how == "bye":
            self.say(peer, m.Bye(RUN, hello.incarnation))
        elif how == "unreachable":
            self.carry_out(self.peers.unreachable(peer))
        elif how == "desync":
            self.desync(hello)
        if hello.incarnation in self.lost or how == "gone":
            self.report(hello)  # also of one that was revoked before
            assert peer not in self.workers

    def desync(self, hello: m.Hello) -> None:
        books = self.table.books(hello.incarnation)
        child = m.ChildBeat(hello.incarnation, 0, m.PHASES.index("wait"), 999, 0)
        host = self.host_of(hello)
        for _ in range(2):
            self.say(host, m.Beat(RUN, hello.host, (child,)))
            self.now += SILENCE - 1
            self.say(host, m.Beat(RUN, hello.host, (child,)))
            self.beat()
        assert (hello.incarnation in self.lost) == (books is not None)

    def host_of(self, hello: m.Hello) -> bytes:
        return next(peer for peer, host in self.hosts.items() if host.incarnation == hello.host)

    def report(self, hello: m.Hello) -> None:
        self.say(self.host_of(hello), m.Gone(RUN, hello.host, hello.incarnation, hello.index, "error", 1, -1, "", ""))

    @rule()
    def beat(self) -> None:
        for peer, host in self.hosts.items():
            self.say(peer, m.Beat(RUN, host.incarnation, ()))

    @rule(seconds=st.floats(0, 4))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.peers.tick(self.now, interval=4.0))

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self.scheduler.slots.newest += 1
        self.carry_out(self.scheduler.published(self.scheduler.version + 1))

    @rule(sure=st.integers(0, 9))
    def drain(self, sure: int) -> None:
        if sure == 7:
            self.draining = True
            self.carry_out([*self.scheduler.drain(), *self.peers.drain()])

    @invariant()
    def everybody_agrees(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.audit()
        assert set(self.peers.hosts) == {h.incarnation for h in self.hosts.values()}
        assert set(self.peers.workers) == {h.incarnation for h in self.workers.values()}
        assert {ring.incarnation for ring in self.table.live()} == self.attached
        states = {w.incarnation: w.state for w in self.peers.workers.values()}
        assert all(states[i] in (State.ATTACHED, State.DRAINING) for i in self.attached)
        assert len(set(self.lost)) == len(self.lost)
        assert len(self.peers._peers) == len(self.hosts) + len(self.workers)


TestLearner = Learner.TestCase
TestLearner.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
