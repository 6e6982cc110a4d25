"""Peers that mean harm, and know how: who was welcomed and says what is not his to say, who repeats what others said,
whose messages never end, whose key was good until now. Training goes on, and everything is counted."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_peers import Stranger, hello
from tests.faults.world import Ledger, audit, drive, kids, needs_linux, rolling, stamps, until
from tests.system.programs import ZRL, Programs, folder, free_port, goes_on, keys_in, programs, status_of
from tests.toys import CountingActor
from zrl.net import keys as k
from zrl.net.codec import decode, encode
from zrl.net.link import Link
from zrl.protocol import messages as m
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

__all__ = ["folder", "programs"]  # fixtures
pytestmark = needs_linux

LIMIT = 20.0  # seconds for what takes few


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("n", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_a_message_of_very_many_parts(n: int) -> None:
    """It is read a piece a turn, between other messages, and leaves nothing behind."""
    ledger = Ledger()
    with rolling(stamps()) as it, Stranger(it.urls[0]) as stranger:
        drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
        before = resident(os.getpid())
        for header in (b"\xc1", encode(m.Fetch(it._collator.publisher.run_id, b"x" * 16)), b""):
            stranger.send(header, *[b"part"] * n)
            for _ in range(20):
                ledger.check(next(it))
        stranger.settle()
        assert resident(os.getpid()) - before < 3 * n * 300 + (32 << 20)  # libzmq and the sender's own copies, too
        stats = audit(it)
        assert stats["refused"]["odd"] >= 2
        assert stats["losses"] == {}


class Welcomed:
    """A host and a worker of this run that have no environments, and say what they like."""

    def __init__(self, it: PipelineRollout) -> None:
        self.host, self.worker = Stranger(it.urls[0]), Stranger(it.urls[0])
        mine = hello("host", name="other", count=1)
        self.host.send(encode(mine))
        welcome = self.host.answer()
        assert isinstance(welcome, m.Welcome)
        self.run_id, self.host_id = welcome.run_id, mine.incarnation
        his = hello("worker", host=mine.incarnation, index=welcome.index_base, count=0)
        self.worker.send(encode(his))
        assert isinstance(self.worker.answer(), m.Welcome)
        self.worker_id = his.incarnation

    def __enter__(self) -> Welcomed:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()
        self.host.close()


def test_what_only_a_learner_may_say_and_what_only_others_may() -> None:
    """From peers that were welcomed: a Release, a Revoke, a Drain; a Ready for another worker's slot, its Bye."""
    ledger = Ledger()
    with rolling(stamps()) as it, contextlib.ExitStack() as opened:
        drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
        w = opened.enter_context(Welcomed(it))
        before = it.stats()["refused"]
        victim = kids(it)[0].incarnation
        run, own = w.run_id, it._collator._host
        assert own is not None
        ready = m.Ready(run, victim, 0, 1_000, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8)
        out_of_place: list[m.Message] = [
            m.Release(run, w.worker_id, 0, 1),
            m.Attached(run, w.worker_id, True),
            m.Revoke(run, w.worker_id, victim, "forged"),
            m.Drain(run, w.worker_id),
            m.ByeAck(run, w.worker_id),
            m.Beat(run, w.worker_id, ()),
            dataclasses.replace(ready, incarnation=w.worker_id),  # it has no ring
        ]
        of_others: list[m.Message] = [
            ready,
            m.Release(run, victim, 0, 1),
            m.Bye(run, victim),
            m.Bye(run, own.incarnation),
            m.Gone(run, own.incarnation, victim, 0, "signal", -9, -1, "", ""),
        ]
        for message in (*out_of_place, *of_others):
            w.worker.send(encode(message))
        w.host.send(encode(m.Gone(run, w.host_id, victim, 0, "signal", -9, -1, "forged", "")))
        w.host.send(encode(m.Beat(run, w.host_id, (m.ChildBeat(victim, 0, 1, 999, 999),))))
        w.worker.settle()
        w.host.settle()
        for _ in range(10):
            ledger.check(next(it))
        stats = audit(it)
        refused = {reason: n - before.get(reason, 0) for reason, n in stats["refused"].items()}
        assert refused["unexpected"] == len(out_of_place) + 1
        assert refused["stale"] == len(of_others)
        assert (stats["losses"], stats["replaced"], stats["fragments"]["lost"]) == ({}, 0, 0)


def test_what_was_said_once_is_not_heard_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Genuine Readys, recorded and sent again: by a stranger, by a welcomed peer, and as the worker's own."""
    recorded: list[bytes] = []

    def recording(header: bytes) -> m.Message:
        message = decode(header)
        if isinstance(message, m.Ready):
            recorded.append(header)
        return message

    monkeypatch.setattr("zrl.nodes.collator.decode", recording)
    ledger = Ledger()
    with rolling(stamps()) as it, Stranger(it.urls[0]) as stranger, contextlib.ExitStack() as opened:
        drive(it, ledger, lambda: len(recorded) > 20 and len(ledger.from_stamps) == 2)
        w = opened.enter_context(Welcomed(it))
        genuine = list(recorded[:20])
        before = it.stats()["refused"]
        for header in genuine:
            stranger.send(header)
            w.worker.send(header)
        stranger.settle()
        w.worker.settle()
        collator = it._collator
        for header in genuine:  # as if from its own connection
            incarnation = decode(header).incarnation
            peer = collator.peers.workers[incarnation].peer
            collator._post(collator._on_message, peer, header, NO_REST)
        until(lambda: sum(it.stats()["refused"].values()) >= sum(before.values()) + 60)
        for _ in range(10):
            ledger.check(next(it))
        refused = {reason: n - before.get(reason, 0) for reason, n in audit(it)["refused"].items()}
        assert refused["unknown"] == refused["stale"] == 20
        assert refused.get("seq repeated", 0) + refused.get("slot not granted", 0) == 20


class _NoRest:
    more = False


NO_REST: Any = _NoRest()


# ── with keys ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tap:
    """Between a host and a learner: passes bytes on, and keeps those of the host."""

    def __init__(self, port: int) -> None:
        self.to, self.kept, self.ends = port, bytearray(), list[socket.socket]()
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = self.door.getsockname()[1]
        self.threads = [threading.Thread(target=self.serve)]
        self.threads[0].start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            near = self.door.accept()[0]
            far = socket.create_connection(("127.0.0.1", self.to))
            self.ends += [near, far]
            self.threads += [
                threading.Thread(target=self.pump, args=a) for a in ((near, far, True), (far, near, False))
            ]
            for thread in self.threads[-2:]:
                thread.start()

    def pump(self, source: socket.socket, sink: socket.socket, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if keep:
                    self.kept += data
                sink.sendall(data)

    def close(self) -> None:
        for end in (self.door, *self.ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self.threads:
            thread.join(LIMIT)


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[PipelineRollout]:
    """With the keys in ``a``, for a host with those in ``b``."""
    tmp_path.chmod(0o700)
    keys_in(tmp_path)
    with cluster.rollout("E", CountingActor(), 4, 1, 1, 1, bind="tcp://127.0.0.1:*", keys=tmp_path / "a") as it:
        yield it


def test_a_recorded_connection_cannot_be_played_again(learner: PipelineRollout, tmp_path: Path) -> None:
    """Whoever sees all that is sent between the two can neither read it nor repeat it."""
    port = int(learner.urls[-1].rpartition(":")[2])
    with contextlib.ExitStack() as opened:
        tap = opened.enter_context(contextlib.closing(Tap(port)))
        link = Link(f"tcp://127.0.0.1:{tap.port}", keys=k.host_keys(tmp_path / "b"))
        opened.callback(link.close)
        mine = dataclasses.replace(hello("host"), name="a-name-to-look-for", count=1)
        link.send(mine)
        welcome = link.receive(LIMIT)
        assert isinstance(welcome, m.Welcome)
        until(lambda: learner.stats()["hosts"] == 1)
        link.send(m.Bye(welcome.run_id, mine.incarnation))
        assert isinstance(link.receive(LIMIT), m.ByeAck)
    assert mine.name.encode() not in tap.kept
    assert mine.incarnation not in tap.kept
    before = learner.stats()
    assert before["hosts"] == 0
    for piece in (len(tap.kept), 64):  # at once, and as a slow one says it
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.settimeout(LIMIT)
            with contextlib.suppress(OSError):
                for at in range(0, len(tap.kept), piece):
                    raw.sendall(tap.kept[at : at + piece])
                while raw.recv(1 << 16):  # until it is cut off
                    pass
    after = learner.stats()
    assert after["hosts"] == 0
    assert after["refused"] == before["refused"]


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_host_that_is_revoked_goes_and_another_goes_on(programs: Programs) -> None:
    keys_in(programs.folder, "c")
    url = f"tcp://127.0.0.1:{free_port()}"
    learner = programs.learner(url, "--keys", "a", "--steps", "100M", "--max-lag", "-1")
    bad = programs.worker(url, "--keys", "b", "--id", "bad")
    good = programs.worker(url, "--keys", "c", "--id", "good")
    for host in (bad, good):
        host.wait_for("welcome")
    goes_on(programs, learner)
    revoke = programs.start([*ZRL, "keys", "revoke", "one", "--keys", "a"])
    assert revoke.wait() == 0, revoke.text
    bad.wait_for("has revoked the key")
    until(lambda: status_of(url, programs.folder, "--keys", "c")["hosts"] == 1, LIMIT)
    goes_on(programs, learner)
    status = status_of(url, programs.folder, "--keys", "c")
    assert status["refused"]["revoked_message"] > 0
    assert status["refused"]["key_revoked"] > 0
    assert {row["host"] for row in status["peers"]} == {"good"}
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    assert good.wait() == 0, good.text
    assert bad.process.poll() is None


@pytest.mark.long
@pytest.mark.timeout(120)
def test_another_learner_with_keys_of_its_own_gets_nothing(programs: Programs) -> None:
    """It has taken the place of the one that the host knows."""
    keys_in(programs.folder)
    (programs.folder / "other").mkdir(mode=0o700)
    keys_in(programs.folder / "other")
    url = f"tcp://127.0.0.1:{free_port()}"
    learner = programs.learner(url, "--keys", "other/a")
    learner.wait_for("start workers with")
    host = programs.worker(url, "--keys", "b", "--give-up-after", "3")
    assert host.wait() == 3, host.text
    assert re.search("refused the handshake|did not answer|handshake", host.text), host.text
    learner.process.send_signal(signal.SIGINT)
    learner.wait()
    assert "welcome" not in host.text
