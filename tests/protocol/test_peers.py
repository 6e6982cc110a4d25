"""Who is welcome, alive, stale: every case is a few messages and the commands that come of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from zrl.protocol import messages as m
from zrl.protocol.peer_states import State
from zrl.protocol.peers import (
    AGAIN_SECONDS,
    MOST_TOLD,
    OWN,
    Deliver,
    Forget,
    HostLost,
    Inspect,
    Lost,
    Peers,
    Send,
    SendWeights,
)

RUN = b"R" * 16
HOST, WORKER, OTHER = b"H" * 16, b"W" * 16, b"O" * 16
WELCOME = m.Welcome(
    RUN, m.NO_ID, 64, 16, 2, False, False, ("lives",), "train", bytes(16), 0, "CartPole-v1", "mlp", 1, "ipc:///pub"
)
HELLO_HOST = m.Hello(m.NO_ID, HOST, m.PROTOCOL_VERSION, "host", "left", (), b"P" * 16, "boot", m.NO_ID, 0, 0, 4)
HELLO_WORKER = m.Hello(m.NO_ID, WORKER, m.PROTOCOL_VERSION, "worker", "left", (), m.NO_ID, "boot", HOST, 1, 0, 0)
ATTACH = m.Attach(RUN, WORKER, [], bytes(16), 2, 64, 11, 3, 8192, "boot", "")
READY = m.Ready(RUN, WORKER, 0, 1, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1)


def make(attached: bool = False, **settings: float) -> Peers:
    """A learner with a host and a worker, at time 0."""
    peers = Peers(WELCOME, boot_id="boot", **settings)  # type: ignore[arg-type]
    assert peers.receive(b"h", HELLO_HOST, 0.0) == [Send(b"h", dataclasses.replace(WELCOME, incarnation=HOST))]
    assert peers.receive(b"w", HELLO_WORKER, 0.0) == [Send(b"w", dataclasses.replace(WELCOME, incarnation=WORKER))]
    if attached:
        assert peers.receive(b"w", ATTACH, 0.0) == [Inspect(ATTACH)]
        assert peers.accepted(WORKER, local=True) == [Send(b"w", m.Attached(RUN, WORKER, True))]
    return peers


def hello(base: m.Hello, **changes: object) -> m.Hello:
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def rejection(commands: list[object]) -> tuple[str, bool]:
    (send,) = commands
    assert isinstance(send, Send)
    assert isinstance(send.message, m.Reject)
    return send.message.code, send.message.retry


def test_a_worker_goes_from_hello_to_its_first_ready() -> None:
    peers = make(attached=True)
    assert peers.workers[WORKER].state is State.ATTACHED
    assert peers.receive(b"w", READY, 1.0) == [Deliver(READY)]
    assert not peers.counters


def test_a_repeated_hello_is_welcomed_again() -> None:
    peers = make()
    assert peers.receive(b"w", HELLO_WORKER, 1.0) == [Send(b"w", dataclasses.replace(WELCOME, incarnation=WORKER))]
    assert len(peers.workers) == 1


@pytest.mark.parametrize(
    ("said", "code", "retry"),
    [
        (m.OtherVersion(m.NO_ID, OTHER, m.PROTOCOL_VERSION + 1), "version", False),
        (hello(HELLO_HOST, incarnation=OTHER, process=b"Q" * 16), "name_taken", True),
        (hello(HELLO_WORKER, incarnation=OTHER), "name_taken", True),
        (hello(HELLO_WORKER, incarnation=OTHER, host=OTHER), "unknown_host", True),
        (hello(HELLO_HOST, incarnation=OTHER, name="second", count=4096), "full", False),
        (hello(HELLO_HOST, incarnation=OTHER, name="second", count=1), "full", False),  # the other one is here
    ],
)
def test_who_is_not_welcome_is_told_why(said: m.Message, code: str, retry: bool) -> None:
    peers = make(most_hosts=1)
    assert rejection(list(peers.receive(b"x", said, 1.0))) == (code, retry)
    assert peers.counters[f"rejected: {code}"] == 1
    assert (len(peers.hosts), len(peers.workers)) == (1, 1)


@pytest.mark.parametrize(
    ("peer", "said", "reason"),
    [
        (b"w", dataclasses.replace(READY, run_id=OTHER), "stale"),
        (b"w", dataclasses.replace(READY, incarnation=OTHER), "stale"),
        (b"h", READY, "stale"),
        (b"w", READY, "unexpected"),  # before Attach
        (b"w", m.Welcome(*(getattr(WELCOME, k) for k in m.kinds_of(m.Welcome))), "stale"),
        (b"w", m.Release(RUN, WORKER, 0, 1), "unexpected"),
        (b"w", m.Fetch(RUN, WORKER), "unexpected"),
        (b"h", dataclasses.replace(ATTACH, incarnation=HOST), "unexpected"),
        (b"w", hello(HELLO_WORKER, incarnation=OTHER, index=2), "stale"),
        (b"x", hello(HELLO_WORKER, incarnation=OTHER, index=9), "unexpected"),
        (b"x", HELLO_WORKER, "unexpected"),  # somebody else's incarnation
        (b"x", hello(HELLO_WORKER, incarnation=m.NO_ID), "unexpected"),
    ],
)
def test_what_is_out_of_place_is_counted_and_has_no_effect(peer: bytes, said: m.Message, reason: str) -> None:
    peers = make()
    assert peers.receive(peer, said, 1.0) == []
    assert peers.counters == {reason: 1}
    assert peers.workers[WORKER].state is State.WELCOMED


@pytest.mark.parametrize("said", [READY, m.Beat(RUN, HOST, ()), m.Bye(RUN, HOST), hello(HELLO_HOST, run_id=OTHER)])
def test_who_is_unknown_is_to_say_hello_again(said: m.Message) -> None:
    peers = Peers(WELCOME, boot_id="boot")
    again = [Send(b"x", m.HelloAgain(RUN, said.incarnation))]
    assert peers.receive(b"x", said, 0.0) == again
    assert peers.receive(b"x", said, AGAIN_SECONDS - 0.01) == []  # who goes on regardless
    assert peers.receive(b"x", said, AGAIN_SECONDS) == again
    assert sum(peers.counters.values()) == 3


def test_who_was_told_so_is_forgotten_again() -> None:
    peers = Peers(WELCOME, boot_id="boot")
    for n in range(MOST_TOLD + 1):
        assert peers.receive(str(n).encode(), READY, 0.0) != []
    assert peers.receive(b"1", READY, 0.1) == []
    assert peers.receive(b"0", READY, 0.1) != []


@pytest.mark.parametrize(("boot_id", "silence"), [("boot", 5.0), ("elsewhere", 15.0), ("", 15.0)])
def test_a_silent_host_is_lost_with_all_its_workers(boot_id: str, silence: float) -> None:
    peers = Peers(WELCOME, boot_id="boot")
    peers.receive(b"h", hello(HELLO_HOST, boot_id=boot_id), 0.0)
    peers.receive(b"w", HELLO_WORKER, 0.0)
    for now in range(11):
        assert peers.tick(float(now)) == []
        peers.receive(b"h", m.Beat(RUN, HOST, ()), float(now))
    last = 10.0
    for second in range(int(silence)):
        assert peers.tick(last + second) == []
    lost = [Lost(WORKER, 1, "host silent"), HostLost(HOST, "left", "silent")]
    again = Send(b"h", m.HelloAgain(RUN, HOST))  # in case that it is there, and was not listened to
    assert peers.tick(last + silence) == [*lost, again]
    assert peers.receive(b"h", m.Beat(RUN, HOST, ()), 99.0) == [Send(b"h", m.HelloAgain(RUN, HOST))]


def test_the_learners_own_stall_extends_every_deadline() -> None:
    peers = make()
    peers.tick(0.0)
    assert peers.tick(60.0) == []  # 59 s late
    assert peers.tick(61.0) == []
    peers.receive(b"h", m.Beat(RUN, HOST, ()), 61.5)
    for second in range(62, 67):
        assert peers.tick(float(second)) == []


def test_the_own_host_cannot_fall_silent_and_cannot_be_replaced() -> None:
    peers = Peers(WELCOME, boot_id="boot")
    peers.receive(OWN, HELLO_HOST, 0.0)
    for second in range(30):
        assert peers.tick(float(second)) == []
    assert rejection(list(peers.receive(b"x", hello(HELLO_HOST, incarnation=OTHER), 30.0))) == ("name_taken", True)


def test_a_host_that_starts_over_replaces_itself_and_keeps_its_indices() -> None:
    peers = make()
    peers.receive(b"o", hello(HELLO_HOST, incarnation=OTHER, name="right", process=b"Q" * 16), 0.0)
    again = hello(HELLO_HOST, incarnation=b"N" * 16)
    assert peers.receive(b"h2", again, 1.0) == [
        Lost(WORKER, 1, "host started over"),
        HostLost(HOST, "left", "started over"),
        Send(b"h2", dataclasses.replace(WELCOME, incarnation=b"N" * 16)),
    ]
    assert {host.name: host.base for host in peers.hosts.values()} == {"left": 0, "right": 4}


@pytest.mark.parametrize("known", [True, False])
def test_what_a_host_reports_goes_on_with_its_traceback(known: bool) -> None:
    peers = make()
    worker = WORKER if known else OTHER
    gone = m.Gone(RUN, HOST, worker, 1, "error", 1, 3, "ValueError: x", "Traceback …")
    assert peers.receive(b"h", gone, 1.0) == [Lost(worker, 1, "error", clean=not known, report=gone)]
    assert (WORKER in peers.workers) == (not known)


def test_a_worker_is_lost_once_however_many_say_so() -> None:
    peers = make(attached=True)
    assert peers.revoke(WORKER, "desync")[0] == Lost(WORKER, 1, "desync")
    gone = m.Gone(RUN, HOST, WORKER, 1, "revoked", -9, -1, "", "")
    assert peers.receive(b"h", gone, 1.0) == [Lost(WORKER, 1, "revoked", clean=True, report=gone, again=True)]
    assert not peers.hosts[HOST].unreported


def test_a_host_that_reports_nothing_is_not_waited_for_without_bound() -> None:
    peers = make()
    for n in range(100):
        worker = bytes([n]) * 16
        peers.receive(worker, hello(HELLO_WORKER, incarnation=worker, index=2), 0.0)
        peers.revoke(worker, "desync")
    assert len(peers.hosts[HOST].unreported) == 2 * peers.hosts[HOST].count


def test_a_host_cannot_report_the_worker_of_another() -> None:
    peers = make()
    peers.receive(b"o", hello(HELLO_HOST, incarnation=OTHER, name="right", process=b"Q" * 16), 0.0)
    assert peers.receive(b"o", m.Gone(RUN, OTHER, WORKER, 1, "exit", 0, -1, "", ""), 1.0) == []
    assert WORKER in peers.workers


def test_a_child_that_disagrees_for_long_is_revoked() -> None:
    peers = make(attached=True)
    ours = (3, 5)

    def beat(now: float, sent: int, received: int) -> list[object]:
        child = m.ChildBeat(WORKER, 0, 1, sent, received)
        return list(peers.receive(b"h", m.Beat(RUN, HOST, (child,)), now, lambda _: ours))

    assert beat(0.0, 3, 4) == []
    assert beat(4.0, 3, 5) == []  # they agree again
    assert beat(5.0, 4, 5) == []
    assert beat(9.0, 5, 5) == []  # something moves
    assert beat(13.9, 5, 5) == []
    assert beat(14.0, 5, 5) == [Lost(WORKER, 1, "desync"), Send(b"h", m.Revoke(RUN, HOST, WORKER, "desync"))]
    assert beat(15.0, 5, 5) == []


@pytest.mark.parametrize(("phase", "revoked"), [("build", False), ("wait", True), ("collect", False), ("adopt", False)])
def test_only_a_child_that_waits_has_read_its_releases(phase: str, revoked: bool) -> None:
    peers = make(attached=True)
    child = m.ChildBeat(WORKER, 0, m.PHASES.index(phase), 3, 4)
    beat = m.Beat(RUN, HOST, (child,))
    assert peers.receive(b"h", beat, 0.0, lambda _: (3, 5)) == []
    assert bool(peers.receive(b"h", beat, 9.0, lambda _: (3, 5))) == revoked


def test_everybody_drains_and_leaves() -> None:
    peers = make(attached=True)
    assert peers.drain() == [Send(b"h", m.Drain(RUN, HOST)), Send(b"w", m.Drain(RUN, WORKER))]
    assert peers.drain() == []
    assert rejection(list(peers.receive(b"x", hello(HELLO_HOST, incarnation=OTHER), 1.0))) == ("draining", False)
    assert peers.receive(b"w", READY, 1.0) == [Deliver(READY)]
    assert peers.receive(b"w", m.Bye(RUN, WORKER), 2.0) == [
        Lost(WORKER, 1, "bye", clean=True),
        Send(b"w", m.ByeAck(RUN, WORKER)),
    ]
    assert peers.receive(b"h", m.Bye(RUN, HOST), 2.0) == [
        HostLost(HOST, "left", "bye"),
        Send(b"h", m.ByeAck(RUN, HOST)),
    ]
    assert (peers.hosts, peers.workers) == ({}, {})


def test_a_refused_attach_ends_the_worker() -> None:
    peers = make()
    peers.receive(b"w", ATTACH, 0.0)
    reject = m.Reject(RUN, WORKER, "spec", "state.obs: float32, not uint8", False, "")
    assert peers.refused(WORKER, "spec", "state.obs: float32, not uint8") == [
        Send(b"w", reject),
        Lost(WORKER, 1, "rejected: spec"),
    ]
    assert peers.refused(WORKER, "spec", "") == peers.accepted(WORKER, local=True) == []


def test_fetch_and_broken_connections() -> None:
    peers = make()
    assert peers.receive(b"h", m.Fetch(RUN, HOST), 0.0) == [SendWeights(b"h", HOST)]
    assert peers.unreachable(b"w")[0] == Lost(WORKER, 1, "unreachable")
    assert peers.unreachable(b"h") == [HostLost(HOST, "left", "unreachable")]
    assert peers.unreachable(b"h") == peers.revoke(WORKER, "x") == []


def test_what_a_beat_says_of_a_worker_is_kept_and_when_its_calls_moved() -> None:
    peers = make()
    worker = peers.workers[WORKER]
    assert (worker.beat, worker.phase, worker.moved) == (None, "build", 0.0)

    def beat(now: float, calls: int, phase: str, host: bytes = HOST, peer: bytes = b"h") -> None:
        child = m.ChildBeat(WORKER, calls, m.PHASES.index(phase), 3, 4)
        assert peers.receive(peer, m.Beat(RUN, host, (child,)), now) == []
        assert host != HOST or worker.beat == child

    beat(1.0, 0, "build")
    assert (worker.phase, worker.moved) == ("build", 0.0)
    beat(2.0, 7, "collect")
    beat(3.0, 7, "wait")
    assert (worker.phase, worker.moved) == ("wait", 2.0)
    beat(4.0, 8, "collect")
    assert worker.moved == 4.0
    peers.receive(b"o", hello(HELLO_HOST, incarnation=OTHER, name="right", process=b"Q" * 16), 5.0)
    beat(6.0, 9, "adopt", OTHER, b"o")  # not its host
    assert (worker.phase, worker.moved) == ("collect", 4.0)


@pytest.mark.parametrize("bound", [{"most_hosts": 3}, {"indices": range(12)}])
def test_hosts_may_come_and_go_for_ever(bound: dict[str, Any]) -> None:
    """What is remembered of those who left is bounded: who has been away for longest is forgotten first."""
    peers = Peers(WELCOME, boot_id="boot", **bound)

    def come(name: str, count: int = 4) -> list[Any]:
        me = name.encode().ljust(16, b".")
        return list(peers.receive(me, hello(HELLO_HOST, incarnation=me, name=name, process=me, count=count), 0.0))

    def go(name: str) -> None:
        me = name.encode().ljust(16, b".")
        peers.receive(me, m.Fetch(RUN, me), 0.0)
        peers.receive(me, m.Bye(RUN, me), 0.0)

    def base(commands: list[Any]) -> int:
        return welcomed(commands[-1:]).index_base  # type: ignore[attr-defined, no-any-return]

    assert [base(come(name)) for name in "abc"] == [0, 4, 8]
    assert rejection(come("d")) == ("full", False)  # all are here
    for name in "bac":
        go(name)
    assert base(come("b")) == 4  # who comes back gets what it had
    go("b")
    assert come("d")[0] == Forget("a")
    assert base(come("e")) == 8  # then that of c
    assert rejection(come("f", 5)) == ("full", False)  # b kept fewer
    assert base(come("f", 3)) == 4
    assert {host.name for host in peers.hosts.values()} == {"d", "e", "f"}
    for n in range(100):
        go("d" if n == 0 else f"d{n - 1}")
        assert base(come(f"d{n}")) == 0
    assert len(peers._bases) == 3
    assert len(peers._fetched) <= 3


def test_a_host_without_workers_is_refused() -> None:
    peers = make()
    other = hello(HELLO_HOST, incarnation=OTHER, name="right", process=b"Q" * 16, count=0)
    assert rejection(peers.receive(b"o", other, 0.0)) == ("full", False)  # type: ignore[arg-type]


def test_weights_are_sent_once_in_a_while_and_waited_for() -> None:
    peers = Peers(WELCOME, boot_id="boot")
    peers.receive(b"h", HELLO_HOST, 0.0)
    assert peers.receive(b"h", m.Fetch(RUN, HOST), 1.0) == [SendWeights(b"h", HOST)]
    for second in range(2, 21):  # they take long to arrive, and no beat comes before
        assert peers.tick(float(second)) == []
    peers.receive(b"h", m.Beat(RUN, HOST, ()), 20.0)  # from now on it is as it always was
    assert peers.tick(21.0) == peers.tick(22.0) == peers.tick(23.0) == peers.tick(24.0) == []
    assert HostLost(HOST, "left", "silent") in peers.tick(25.0)


def test_weights_are_sent_once_in_a_while() -> None:
    """And are no excuse for a host that has workers: they die with it, and nobody says so."""
    peers = make(attached=True)
    fetch = m.Fetch(RUN, HOST)
    assert peers.receive(b"h", fetch, 1.0) == [SendWeights(b"h", HOST)]
    assert [peers.receive(b"h", fetch, 1.0 + i / 100) for i in range(40)] == [[]] * 40
    assert peers.counters == {"fetch too soon": 40}
    assert peers.receive(b"h", fetch, 2.0) == [SendWeights(b"h", HOST)]
    for now in (3.0, 4.0, 5.0, 6.0):
        assert peers.tick(now) == []
    assert HostLost(HOST, "left", "silent") in peers.tick(7.0)


def test_who_asks_for_weights_too_soon_gets_them_a_tick_later() -> None:
    """It asks once, and waits long: a host that starts over asks under the name that has just been answered."""
    peers = make()
    assert peers.receive(b"h", m.Fetch(RUN, HOST), 1.0) == [SendWeights(b"h", HOST)]
    peers.receive(b"h", m.Bye(RUN, HOST), 1.1)
    peers.receive(b"i", hello(HELLO_HOST, incarnation=OTHER), 1.2)
    assert peers.receive(b"i", m.Fetch(RUN, OTHER), 1.3) == []
    assert peers.tick(2.0) == [SendWeights(b"i", OTHER)]
    assert peers.tick(3.0) == []


def test_saying_hello_again_brings_no_more_weights() -> None:
    peers = make()
    assert peers.receive(b"h", m.Fetch(RUN, HOST), 1.0) == [SendWeights(b"h", HOST)]
    peers.receive(b"h", m.Bye(RUN, HOST), 1.1)
    peers.receive(b"h", hello(HELLO_HOST, incarnation=OTHER), 1.2)
    assert peers.receive(b"h", m.Fetch(RUN, OTHER), 1.2) == []


@pytest.mark.parametrize("index", [4, 65535])
def test_a_host_reports_its_own_workers_only(index: int) -> None:
    peers = make()
    gone = m.Gone(RUN, HOST, OTHER, index, "error", 1, -1, "x", "")
    assert peers.receive(b"h", gone, 1.0) == []
    assert peers.counters == {"unexpected": 1}


def test_a_stall_of_the_learner_is_not_held_against_a_child() -> None:
    """What differs may be in the socket that the learner could not read."""
    peers = make(attached=True)
    beat = m.Beat(RUN, HOST, (m.ChildBeat(WORKER, 5, m.PHASES.index("wait"), 1, 1),))
    assert peers.tick(0.0) == []
    assert peers.receive(b"h", beat, 1.0, lambda _: (0, 1)) == []
    assert peers.tick(1.0) == []
    assert peers.tick(9.0) == []  # seven seconds late
    assert peers.receive(b"h", beat, 9.1, lambda _: (0, 1)) == []
    for now in (10.0, 11.0, 12.0, 13.0):
        peers.tick(now)
    assert peers.receive(b"h", beat, 13.5, lambda _: (0, 1)) != []


def test_a_newcomer_is_sent_on_and_nothing_is_kept_of_it() -> None:
    asked: list[tuple[str, dict[str, int], float]] = []

    def redirect(newcomer: m.Hello, here: Mapping[str, int], now: float) -> str:
        asked.append((newcomer.name, dict(here), now))
        return "tcp://b:1" if here else ""

    peers = Peers(WELCOME, boot_id="boot", redirect=redirect)
    assert isinstance(welcomed(peers.receive(b"h", HELLO_HOST, 0.0)), m.Welcome)
    right = hello(HELLO_HOST, incarnation=OTHER, name="right", process=b"Q" * 16)
    assert peers.receive(b"o", right, 1.0) == [
        Send(b"o", m.Reject(RUN, OTHER, "redirect", "another learner has fewer workers", True, "tcp://b:1"))
    ]
    assert asked == [("left", {}, 0.0), ("right", {"left": 4}, 1.0)]
    assert peers.counters == {"rejected: redirect": 1}
    assert list(peers.hosts) == [HOST]


def test_who_was_here_before_is_not_sent_on_nor_who_starts_over() -> None:
    places = ["", "tcp://b:1"]
    peers = Peers(WELCOME, boot_id="boot", redirect=lambda *_: places.pop(0))
    peers.receive(b"h", HELLO_HOST, 0.0)
    again = peers.receive(b"h2", hello(HELLO_HOST, incarnation=OTHER), 1.0)  # the same process
    assert isinstance(welcomed(again[-1:]), m.Welcome)
    peers.receive(b"h2", m.Bye(RUN, OTHER), 2.0)
    assert isinstance(welcomed(peers.receive(b"h3", hello(HELLO_HOST, process=b"R" * 16), 3.0)), m.Welcome)
    assert places == ["tcp://b:1"]


def test_the_own_host_and_workers_are_never_sent_on() -> None:
    peers = Peers(WELCOME, boot_id="boot", redirect=lambda *_: "tcp://b:1")
    assert isinstance(welcomed(peers.receive(OWN, HELLO_HOST, 0.0)), m.Welcome)
    assert isinstance(welcomed(peers.receive(b"w", HELLO_WORKER, 0.0)), m.Welcome)


def welcomed(commands: Sequence[object]) -> m.Message:
    (send,) = commands
    assert isinstance(send, Send)
    return send.message


def test_learners_of_one_run_give_out_indices_of_their_own() -> None:
    peers = Peers(WELCOME, boot_id="boot", indices=range(1000, 1006))
    assert welcomed(peers.receive(b"h", HELLO_HOST, 0.0)) == dataclasses.replace(
        WELCOME, incarnation=HOST, index_base=1000
    )
    more = hello(HELLO_HOST, incarnation=OTHER, name="right", process=b"Q" * 16)
    assert rejection(list(peers.receive(b"o", more, 0.0))) == ("full", False)
    assert isinstance(welcomed(peers.receive(b"o", dataclasses.replace(more, count=2), 0.0)), m.Welcome)
