"""Whoever talks to a learner, and whatever it says: training goes on, its batches stay right, and the refusals are
counted. And workers whose learner is not, or not any more, the one that they were started for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import zmq
from hypothesis import HealthCheck, given, settings

from tests.faults.world import (
    PATIENCE,
    B,
    Ledger,
    T,
    audit,
    drive,
    impatient,
    kids,
    needs_linux,
    pid_of,
    rolling,
    stamps,
)
from tests.toys import RandomActor
from zrl.data.memory import boot_id
from zrl.net import sockets as z
from zrl.net.addresses import run_directory
from zrl.net.codec import decode, encode
from zrl.nodes.children import Zygote
from zrl.nodes.job import WorkerJob
from zrl.nodes.page import Page
from zrl.nodes.pipe import CONNECTION_ENDED, Ended
from zrl.nodes.publisher import Publisher
from zrl.nodes.worker import Recipe
from zrl.protocol import messages as m
from zrl.rollout.pipeline import PipelineRollout

pytestmark = needs_linux


class Stranger:
    """A raw DEALER at a learner's door."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.context = z.make_context()
        self.connect()

    def connect(self) -> None:
        self.dealer = z.make_dealer(self.context)
        z.connect(self.dealer, self.url)
        self.dealer.poll(int(PATIENCE * 1000), zmq.POLLOUT)

    def send(self, *frames: bytes) -> None:
        z.send(self.dealer, *frames)

    def answer(self, timeout: float = PATIENCE) -> m.Message:
        assert self.dealer.poll(int(timeout * 1000)), "no answer"
        return decode(self.dealer.recv_multipart()[0])

    def settle(self) -> None:
        """Everything that was sent has been looked at: the last of it is answered."""
        mark = os.urandom(m.ID_NBYTES)
        last = encode(dataclasses.replace(hello(), incarnation=mark, protocol=99))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.send(last)
            while self.dealer.poll(500):
                said = decode(self.dealer.recv_multipart()[0])
                if isinstance(said, m.Reject) and said.incarnation == mark:
                    assert said.code == "version"
                    return
            self.dealer.close()  # cut off, for a frame that was too large
            self.connect()
        pytest.fail("the learner does not answer any more")

    def close(self) -> None:
        self.context.destroy()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hello(role: str = "host", **changes: Any) -> m.Hello:
    made = m.Hello(
        m.NO_ID, os.urandom(16), m.PROTOCOL_VERSION, role, "stranger", (), b"P" * 16, boot_id(), m.NO_ID, 0, 0, 3
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    "says",
    [
        pytest.param(b"", marks=pytest.mark.long),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        pytest.param(  # a TLS hello
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), marks=pytest.mark.long
        ),
        # ZMTP, up to a point
        pytest.param(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(100), marks=pytest.mark.long),
    ],
    ids=["nothing", "http", "tls", "zmtp"],
)
@pytest.mark.parametrize("n", [50, pytest.param(500, marks=pytest.mark.long)])
def test_connections_that_speak_something_else(says: bytes, n: int) -> None:
    """On the port, all at once: fragments come as before, and a host that means it is welcome."""
    with rolling(stamps()) as it:
        it._collator._loop.call_soon_threadsafe(lambda: z.bind(it._collator._router, "tcp://127.0.0.1:*"))
        ledger = Ledger()
        drive(it, ledger, lambda: ledger.n_fragments > 10)
        url: list[str] = []
        it._collator._loop.call_soon_threadsafe(
            lambda: url.append(it._collator._router.get(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())  # type: ignore[union-attr]
        )
        drive(it, ledger, lambda: url)
        port = int(url[0].rpartition(":")[2])
        with contextlib.ExitStack() as opened:
            for _ in range(n):
                raw = opened.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                with contextlib.suppress(OSError):
                    raw.sendall(says)
            seen = ledger.n_fragments
            drive(it, ledger, lambda: ledger.n_fragments > seen + 20)
            with Stranger(url[0]) as stranger:
                stranger.send(encode(hello()))
                assert isinstance(stranger.answer(), m.Welcome)
        drive(it, ledger, lambda: ledger.n_fragments > seen + 40)
        assert it.stats()["losses"] == {}
        audit(it)


def test_another_version_is_told_so() -> None:
    with rolling(stamps()) as it, Stranger(it.urls[0]) as stranger:
        for role in ("host", "worker"):
            said = hello(role, protocol=99)
            stranger.send(encode(said))
            answer = stranger.answer()
            assert isinstance(answer, m.Reject)
            assert (answer.code, answer.retry, answer.incarnation) == ("version", False, said.incarnation)
            assert "99" in answer.text
        Ledger().check(next(it))
        assert it.stats()["refused"] == {"rejected: version": 2}


def test_who_is_unknown_is_to_say_hello_again() -> None:
    with rolling(stamps()) as it:
        for message in forgeries(it):
            if not isinstance(message, m.Hello):
                with Stranger(it.urls[0]) as stranger:  # one that goes on regardless is answered only now and then
                    stranger.send(encode(message))
                    assert isinstance(stranger.answer(), m.HelloAgain)
        Ledger().check(next(it))
        assert it.stats()["losses"] == {}


def forgeries(it: PipelineRollout) -> list[m.Message]:
    """Well-formed messages of all kinds that name this run, its own host and its workers."""
    c = it._collator
    assert c._host is not None
    run, host = c.publisher.run_id, c._host.incarnation
    worker = kids(it)[0].incarnation
    stranger = b"stranger" * 2
    found: list[m.Message] = []
    for who in (worker, host, stranger):
        found += [
            m.Ready(run, who, 0, 1, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1),
            m.Ready(run, who, 65534, (1 << 63) - 1, (1 << 63) - 1, 1e9, 0.0, 0.0, 0.0, 0.0, 0.0, 1),
            m.Attach(run, who, [1, ["x", [2]]], bytes(16), 2, 64, os.getpid(), 0, 1 << 62, boot_id(), ""),
            m.Attach(run, who, [], bytes(16), 2, 64, 1, 3, 8192, boot_id(), "/etc/passwd"),
            m.Gone(run, who, worker, 0, "error", 1, 0, "forged", "forged"),
            m.Beat(run, who, (m.ChildBeat(worker, 0, 1, 999, 999),)),
            m.Fetch(run, who),
            m.Bye(run, who),
            m.Drain(run, who),
            m.Revoke(run, who, worker, "forged"),
            m.Release(run, who, 0, 1),
            m.HelloAgain(run, who),
            m.Fetch(bytes(15) + b"x", who),
        ]
    found += [
        hello("host", incarnation=stranger),
        hello("host", incarnation=host),
        hello("host", name="learner"),
        hello("host", count=4096, name=""),
        hello("host", run_id=b"x" * 16),
        hello("worker", host=host, index=0),
        hello("worker", host=host, index=1, incarnation=worker),
        hello("worker", host=stranger, index=2, incarnation=b"w" * 16),
        hello("worker", host=stranger, index=3, incarnation=b"v" * 16),
    ]
    return found


class Messages:
    """Random ones, by what chooses: hypothesis, or a seeded generator."""

    def __init__(self, valid: list[bytes]) -> None:
        self.valid = valid

    def one(self, rng: random.Random) -> list[bytes]:
        how = rng.choice(["valid", "valid", "flipped", "cut", "longer", "noise", "frames", "huge", "empty"])
        data = bytearray(rng.choice(self.valid))
        if how == "flipped":
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif how == "cut":
            del data[rng.randrange(len(data)) :]
        elif how == "longer":
            data += rng.randbytes(rng.randrange(1, 5000))
        elif how == "noise":
            data = bytearray(rng.randbytes(rng.randrange(200)))
        elif how == "frames":
            return [bytes(data), *(rng.randbytes(rng.randrange(50)) for _ in range(rng.choice([1, 2, 500])))]
        elif how == "huge" and rng.random() < 0.05:
            return [bytes(data) + bytes(300_000)]
        elif how == "empty":
            return [b""] * rng.randrange(1, 4)
        return [bytes(data)]


@contextlib.contextmanager
def besieged(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PipelineRollout, Stranger, Messages, Ledger]]:
    """A rollout that must be at the end what it was at the beginning."""
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(stamps()) as it:
        drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
        pids = [pid_of(kid) for kid in kids(it)]
        with Stranger(it.urls[0]) as stranger:
            yield it, stranger, Messages([encode(message) for message in forgeries(it)]), ledger
            stranger.settle()
        for _ in range(10):
            ledger.check(next(it))
        assert [pid_of(kid) for kid in kids(it)] == pids
        stats = audit(it)
        assert stats["replaced"] == 0
        assert stats["fragments"]["lost"] == stats["fragments"]["dropped"] == 0
        refused = Counter(stats["refused"])
        assert refused["odd"] > 0
        assert refused["unexpected"] + refused["unknown"] + refused["stale"] > 0


@pytest.mark.parametrize("n", [600, pytest.param(20_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_noise(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    rng = random.Random(n)
    with besieged(monkeypatch) as (it, stranger, messages, ledger):
        for i in range(n):
            stranger.send(*messages.one(rng))
            if i % 50 == 0:
                stranger.settle()
                ledger.check(next(it))
                if rng.random() < 0.3:  # as another peer
                    stranger.dealer.close()
                    stranger.connect()


def test_noise_that_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with a smallest example where it fails."""
    with besieged(monkeypatch) as (it, stranger, messages, ledger):
        rest = st.lists(st.binary(max_size=60), max_size=3)
        mutated = st.builds(
            lambda data, at, to, cut: (data[:at] + to + data[at + len(to) :])[: cut or None],
            st.sampled_from(messages.valid),
            st.integers(0, 120),
            st.binary(max_size=6),
            st.integers(0, 150),
        )

        @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            st.lists(st.tuples(st.sampled_from(messages.valid) | mutated | st.binary(max_size=300), rest), max_size=8)
        )
        def say(sent: list[tuple[bytes, list[bytes]]]) -> None:
            for first, others in sent:
                stranger.send(first, *others)
            stranger.settle()
            ledger.check(next(it))
            assert it._collator.feed._error is None

        say()
        stranger.send(b"\xc1")
        stranger.send(encode(m.Fetch(bytes(16), bytes(16))))


# ── the worker's side ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_is_not_known_any_more_ends_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, restarts=0)  # what uses the budget would be an error
    ledger = Ledger()
    with rolling(stamps()) as it:
        drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
        collator = it._collator
        for _ in range(2):
            incarnation = kids(it)[0].incarnation
            known = set(ledger.from_stamps[0])

            def disown(incarnation: bytes = incarnation) -> None:
                peer = collator.peers.workers[incarnation].peer
                collator._to(peer, m.HelloAgain(collator.publisher.run_id, incarnation))

            collator._post(disown)
            drive(it, ledger, lambda known=known: ledger.from_stamps[0] - known)  # type: ignore[misc]
        stats = audit(it)
        assert set(stats["losses"]) <= {"disconnected", "unreachable"}
        assert sum(stats["losses"].values()) == stats["replaced"] == 2


class Learner:
    """A learner of messages alone: what a worker hears is what the test says."""

    def __init__(self, folder: Path) -> None:
        self.context = z.make_context()
        self.router = z.make_router(self.context)
        self.url = z.bind(self.router, f"ipc://{folder}/{os.urandom(4).hex()}")
        self.peer = b""

    def hear(self, kind: type[m.Message]) -> m.Message:
        assert self.router.poll(int(PATIENCE * 1000)), f"no {kind.__name__}"
        self.peer, header, *_ = self.router.recv_multipart()
        message = decode(header)
        assert isinstance(message, kind)
        return message

    def say(self, message: m.Message) -> None:
        assert z.send(self.router, self.peer, encode(message))

    def vanish(self) -> None:
        self.context.destroy()


def test_a_worker_ends_with_its_connection(tmp_path: Path) -> None:
    """Wherever it is, with status 3 and soon; another incarnation is its host's business."""
    actor, run_id = RandomActor(3), os.urandom(16)
    folder = run_directory()
    publisher = Publisher(actor, run_id=run_id)
    recipe = Recipe(stamps(), actor)
    with (
        contextlib.closing(publisher),
        Zygote.start("zrl.nodes.worker:main", recipe, run_dir=folder, log_dir=tmp_path) as zygote,
    ):
        for last in ("Hello", "Welcome", "Attach", "Attached", "Ready", "HelloAgain", "another run"):
            incarnation = os.urandom(16)
            learner = Learner(folder)
            with Page.create(incarnation) as page:
                job = WorkerJob(
                    learner.url, "worker-0", run_id, b"h" * 16, incarnation, 0, 0, page.address,
                    publisher.board.address, publisher.digest, publisher.nbytes,
                )  # fmt: skip
                child = zygote.fork("worker-0", (job,))
                begin = converse(learner, run_id, incarnation, last)
                ended = end_of(zygote, lambda child=child: child.ended)  # type: ignore[misc]
                assert (ended.code, ended.traceback) == (CONNECTION_ENDED, ""), last
                assert time.monotonic() - begin < 2.0, last
            learner.vanish()
    assert not folder.exists()


def converse(learner: Learner, run_id: bytes, incarnation: bytes, last: str) -> float:
    """As far as to this message, then vanish, or disown the worker; when that was."""
    welcome = m.Welcome(run_id, incarnation, T, B, 1, False, False, (), "train", bytes(16), 0, "", "", 1, "ipc://x")
    said = learner.hear(m.Hello)
    assert said.incarnation == incarnation
    if last == "another run":
        learner.say(m.HelloAgain(b"x" * 16, incarnation))
        return time.monotonic()
    if last != "Hello":
        learner.say(welcome)
    if last not in ("Hello", "Welcome"):
        learner.hear(m.Attach)
    if last in ("Attached", "Ready", "HelloAgain"):
        learner.say(m.Attached(run_id, incarnation, True))
    if last in ("Ready", "HelloAgain"):
        learner.say(m.Release(run_id, incarnation, 0, 1))
        learner.hear(m.Ready)
    if last == "HelloAgain":
        learner.say(m.HelloAgain(run_id, incarnation))
    else:
        learner.vanish()
    return time.monotonic()


def end_of(zygote: Zygote, ended: Callable[[], Ended | None]) -> Ended:
    deadline = time.monotonic() + PATIENCE
    while (found := ended()) is None:
        assert time.monotonic() < deadline
        zygote.wait_event(0.1)
    return found


#: Specifications that are none, each in another way that somebody may not have thought of.
UNHEARD_OF: list[list[Any]] = [
    [],
    [T, B, [["state.obs", '"*"', [["float32", [(1 << 31) - 1] * 500]]]]],
    [T, B, [["state.obs", '["namedtuple", "A", ["\ufb01", "*"], ["fi", "*"]]', [["float32", []], ["float32", []]]]]],
    [T, B, [["state.obs", '"*"', [["float32", [1] * 70]]]]],
]


def test_a_ring_that_is_none() -> None:
    """A host that is welcome, and workers of it that attach to whatever they like: what cannot be opened is remote."""
    with rolling(stamps()) as it, Stranger(it.urls[0]) as host:
        ledger = Ledger()
        drive(it, ledger, lambda: it._collator._rings.spec is not None)
        spec = it._collator._rings.spec
        assert spec is not None
        me = hello(name="other")
        host.send(encode(me))
        welcome = host.answer()
        assert isinstance(welcome, m.Welcome)
        for fd in (0, 9999):
            with Stranger(it.urls[0]) as worker:
                his = hello("worker", host=me.incarnation, index=welcome.index_base, count=0)
                worker.send(encode(his))
                k = worker.answer()
                assert isinstance(k, m.Welcome)
                size = 4096 + k.n_slots * (-(-spec.nbytes // 4096) * 4096)
                attach = m.Attach(
                    welcome.run_id,
                    his.incarnation,
                    spec=spec.to_plain(),
                    digest=spec.digest,
                    n_slots=k.n_slots,
                    slot_nbytes=spec.nbytes,
                    pid=os.getpid(),
                    fd=fd,
                    nbytes=size,
                    boot_id=boot_id(),
                    path="",
                )
                worker.send(encode(attach))
                answer = worker.answer()
                assert isinstance(answer, m.Attached)
                assert not answer.local  # whatever is there instead, it is not looked at again
                worker.send(encode(m.Bye(welcome.run_id, his.incarnation)))
                while not isinstance(worker.answer(), m.ByeAck):  # a Release may come first
                    pass
        for plain in UNHEARD_OF:
            with Stranger(it.urls[0]) as worker:
                his = hello("worker", host=me.incarnation, index=welcome.index_base, count=0)
                worker.send(encode(his))
                assert isinstance(worker.answer(), m.Welcome)
                worker.send(encode(dataclasses.replace(attach, incarnation=his.incarnation, spec=plain)))
                no = worker.answer()
                assert isinstance(no, m.Reject)
                assert no.code == "spec"
        host.send(encode(m.Bye(welcome.run_id, me.incarnation)))
        assert isinstance(host.answer(), m.ByeAck)
        ledger.check(next(it))
        assert it.stats()["losses"] == {"rejected: spec": len(UNHEARD_OF)}
