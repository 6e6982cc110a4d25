"""Addresses, options, and reading sockets by turns: real sockets in this process."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from zrl.errors import ConfigError, ProtocolError
from zrl.net import sockets as z
from zrl.net.addresses import MAX_SOCKET_PATH, pub_url, reachable, run_directory
from zrl.net.link import Link
from zrl.net.observer import Observer

LIMIT = 5.0  # seconds


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[z.Context]:
    """A context that holds on to its sockets, and closes them at the end."""
    made = z.make_context()
    opened: list[z.Socket] = []
    make = made.socket

    def keep(kind: int) -> z.Socket:
        opened.append(make(kind))
        return opened[-1]

    monkeypatch.setattr(made, "socket", keep)
    yield made
    made.destroy()


@pytest.fixture
def folder() -> Iterator[Path]:
    made = run_directory()
    yield made
    shutil.rmtree(made)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def pair(context: z.Context, folder: Path) -> tuple[z.Socket, z.Socket]:
    router, dealer = z.make_router(context), z.make_dealer(context)
    z.connect(dealer, z.bind(router, f"ipc://{folder}/r"))
    until(lambda: z.send(dealer, b"hello"))
    return router, dealer


def read(socket: z.Socket, n: int) -> list[tuple[bytes, bytes]]:
    got: list[tuple[bytes, bytes]] = []

    def enough() -> bool:
        z.drain(socket, lambda peer, header, rest: got.append((peer, header)))
        return len(got) >= n

    until(enough)
    return got


def test_there_and_back(context: z.Context, folder: Path) -> None:
    router, dealer = pair(context, folder)
    ((peer, header),) = read(router, 1)
    assert (header, len(peer)) == (b"hello", 16)
    assert z.send(router, peer, b"welcome")
    assert read(dealer, 1) == [(b"", b"welcome")]
    assert not z.send(router, b"nobody", b"x")


def test_a_dealer_queues_nothing_for_a_learner_that_is_not_there(context: z.Context, folder: Path) -> None:
    dealer = z.make_dealer(context)
    z.connect(dealer, f"ipc://{folder}/nobody")
    assert not z.send(dealer, b"x")


@pytest.mark.parametrize(
    ("frames", "problem"),
    [([40, 60], ""), ([100], ""), ([0, 100, 0], ""), ([40], "40 bytes"), ([], "0 bytes"), ([40, 61], "more than")],
)
def test_payloads_fill_their_place_exactly(context: z.Context, folder: Path, frames: list[int], problem: str) -> None:
    router, dealer = pair(context, folder)
    read(router, 1)
    place, raised = bytearray(100), []

    def handle(peer: bytes, header: bytes, rest: z.Rest) -> None:
        if header != b"ready":
            return
        try:
            rest.into(memoryview(place))
        except ProtocolError as error:
            raised.append(str(error))

    z.send(dealer, b"ready", *(b"p" * n for n in frames))
    z.send(dealer, b"after")
    until(lambda: z.waiting(router))
    after: list[bytes] = []
    z.drain(router, handle, max_messages=1)
    until(lambda: z.drain(router, lambda peer, header, rest: after.append(header)) or after)
    assert after == [b"after"]  # the rest of the payload was not taken for a message
    assert (problem in raised[0] and len(raised) == 1) if problem else place == b"p" * 100


def test_a_turn_ends_after_so_many_messages(context: z.Context, folder: Path) -> None:
    router, dealer = pair(context, folder)
    for _ in range(9):
        z.send(dealer, b"x", b"payload that nobody reads")
    seen: list[bytes] = []
    until(lambda: z.drain(router, lambda p, h, r: seen.append(h), max_messages=1) or len(seen) == 10)
    while len(seen) < 10:
        before = len(seen)
        z.drain(router, lambda p, h, r: seen.append(h), max_messages=4)
        assert len(seen) - before <= 4
    z.send(dealer, b"y")
    z.send(dealer, b"y")
    until(lambda: z.waiting(router))
    until(lambda: z.drain(router, lambda p, h, r: None, max_messages=2, max_seconds=0.0) is not None)


def test_a_long_payload_that_nobody_wants_is_skipped_in_turns(context: z.Context, folder: Path) -> None:
    router, dealer = pair(context, folder)
    assert z.send(dealer, b"long", *[b""] * (3 * z.MOST_SKIPPED))
    assert z.send(dealer, b"next")
    heard: list[bytes] = []
    turns = 0

    def over() -> bool:
        nonlocal turns
        turns += z.drain(router, lambda who, header, rest: heard.append(header))
        return heard == [b"hello", b"long", b"next"]

    until(over)
    assert turns >= 2  # after which something was left


def test_a_handler_that_raises_loses_only_its_message(context: z.Context, folder: Path) -> None:
    router, dealer = pair(context, folder)
    read(router, 1)
    z.send(dealer, b"bad", b"payload")
    z.send(dealer, b"good")
    until(lambda: z.waiting(router))

    def fail(peer: bytes, header: bytes, rest: z.Rest) -> None:
        raise KeyError(header)

    with pytest.raises(KeyError):
        z.drain(router, fail)
    assert [header for _, header in read(router, 1)] == [b"good"]


def test_a_frame_that_is_too_long_cuts_only_its_sender(context: z.Context, folder: Path) -> None:
    router, dealer = z.make_router(context), z.make_dealer(context)
    watch = z.Disconnections(dealer)
    url = z.bind(router, f"ipc://{folder}/r")
    z.connect(dealer, url)
    until(lambda: z.send(dealer, b"fine"))
    read(router, 1)
    assert not watch.seen()
    z.send(dealer, bytes(z.MAX_FRAME + z.CURVE_NBYTES + 1))
    until(watch.seen)
    watch.close()


def test_a_payload_in_crumbs_is_refused_before_it_keeps_others_waiting(context: z.Context, folder: Path) -> None:
    router, dealer = pair(context, folder)
    read(router, 1)
    place, outcomes = bytearray(100), []

    def handle(peer: bytes, header: bytes, rest: z.Rest) -> None:
        try:
            rest.into(memoryview(place))
            outcomes.append("received")
        except ProtocolError as error:
            outcomes.append(str(error))

    for n in (z.MOST_SKIPPED - 1, z.MOST_SKIPPED):
        z.send(dealer, b"ready", *[b""] * n, bytes(100))
    z.send(dealer, b"ready", bytes(100))

    def all_read() -> bool:
        z.drain(router, handle)
        return len(outcomes) == 3

    until(all_read)
    assert outcomes == ["received", "a payload of 100 bytes in more than 1024 frames", "received"]


def test_a_subscription_that_is_too_long_cuts_only_its_sender(context: z.Context, folder: Path) -> None:
    """libzmq would hold whatever somebody sends to a PUB, until the end of a frame of any length."""
    pub = z.make_pub(context)
    url = z.bind(pub, f"ipc://{folder}/p")
    honest = z.make_sub(context, url, b"status\0\0", max_nbytes=100)
    greedy = z.make_subscriber(context, bytes(z.MAX_SUBSCRIPTION), max_nbytes=100)
    watch = z.Disconnections(greedy)
    z.connect(greedy, url)
    until(watch.seen)
    until(lambda: z.send(pub, b"status\0\0{}") and honest.poll(1))
    watch.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux looks")
def test_a_peer_that_reads_nothing_is_cut(context: z.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all that it asks for would wait for it in the learner's memory."""
    monkeypatch.setattr(z, "UNREAD_MS", 500)
    router = z.make_router(context)
    port = int(z.bind(router, "tcp://127.0.0.1:*").rpartition(":")[2])
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\0" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", port))
        peer.sendall(greeting)
        assert len(peer.recv(64, socket.MSG_WAITALL)) == 64
        peer.sendall(b"\x04" + bytes([len(ready)]) + ready + b"\0\x05hello")
        ((who, header),) = read(router, 1)
        assert header == b"hello"
        deadline = time.monotonic() + 8 * LIMIT  # the system looks at 0.2, 0.4, 0.8 … s
        while z.send(router, who, b"what it asked for", bytes(100_000)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_what_a_peer_can_leave_with_a_learner_that_stands_still(context: z.Context, folder: Path) -> None:
    """Some messages, however many it sends; the others stay with it."""
    router = z.make_router(context)
    url = z.bind(router, f"ipc://{folder}/l")
    theirs = z.make_context()
    dealer = z.make_dealer(theirs)
    z.connect(dealer, url)
    assert dealer.poll(int(LIMIT * 1000), zmq.POLLOUT)
    for _ in range(1000):
        z.send(dealer, b"x", bytes(100_000))
    time.sleep(0.5)  # in which all of them would get through
    theirs.destroy()
    read = 0
    while router.poll(200):
        router.recv_multipart()
        read += 1
    assert 0 < read < 2 * z.MOST_WAITING
    router.close()


def test_a_slow_subscriber_gets_the_newest(context: z.Context, folder: Path) -> None:
    pub = z.make_pub(context)
    url = z.bind(pub, f"ipc://{folder}/p")
    sub = z.make_sub(context, url, b"weights\0", max_nbytes=1 << 20)
    until(lambda: z.send(pub, b"weights\0first") and sub.poll(1))
    for i in range(300):
        z.send(pub, b"weights\0%03d" % i)
        z.send(pub, b"status\0\0{}")
    last: list[bytes] = []
    until(lambda: z.drain(sub, lambda p, frame, r: last.append(frame)) or last[-1:] == [b"weights\x00299"])
    assert all(frame.startswith(b"weights\0") for frame in last)
    assert len(last) < 300


def test_loopback_has_the_url_to_connect_to(context: z.Context) -> None:
    router = z.make_router(context)
    url = z.bind(router, "tcp://localhost:*")
    assert url.startswith("tcp://127.0.0.1:")
    with pytest.raises(ConfigError, match="in use"):
        z.bind(z.make_router(context), url)
    assert pub_url(url) == f"tcp://127.0.0.1:{int(url.rpartition(':')[2]) + 1}"


def test_an_ipc_address_in_use_is_not_stolen(context: z.Context, folder: Path) -> None:
    url = f"ipc://{folder}/r"
    z.bind(z.make_router(context), url)
    with pytest.raises(ConfigError, match="in use"):
        z.bind(z.make_router(context), url)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("tcp://0.0.0.0:5555", "--keys"),
        ("tcp://*:5555", "expected"),
        ("tcp://192.168.0.1:5555", "--insecure"),
        ("tcp://example.org:5555", "loopback|expected"),
        ("udp://127.0.0.1:5555", "expected"),
        ("ipc://relative", "absolute"),
        ("ipc:///nowhere/at/all", "no folder"),
        ("ipc:///tmp/open-to-all", "0700"),
        ("ipc:///" + "x" * MAX_SOCKET_PATH, "shorter"),
    ],
)
def test_addresses_that_are_refused(context: z.Context, url: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        z.bind(z.make_router(context), url)


def test_nonsense_to_connect_to(context: z.Context) -> None:
    with pytest.raises(ConfigError, match="expected"):
        z.connect(z.make_dealer(context), "nonsense")
    with pytest.raises(ConfigError, match="expected"):
        z.make_sub(context, "nonsense", b"topic", max_nbytes=1)


@pytest.mark.parametrize("kind", [Link, Observer])
@pytest.mark.parametrize("url", ["tcp://no such host:5555", "ipc:///" + "x" * MAX_SOCKET_PATH])
def test_who_cannot_connect_lets_go_of_everything(kind: type[Link | Observer], url: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        kind(url)


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:65535", "tcp://127.0.0.1:x", "tcp://127.0.0.1"])
def test_no_port_next_to_it(url: str) -> None:
    with pytest.raises(ConfigError, match="port"):
        pub_url(url)


def test_the_run_directory_is_ours_alone_and_its_sockets_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    made = run_directory()
    assert made.stat().st_mode & 0o777 == 0o700
    assert len(f"{made}/learner.sock.pub") <= MAX_SOCKET_PATH
    made.rmdir()


def test_chunks_add_up() -> None:
    payload = bytes(range(256)) * 4
    parts = z.chunks(memoryview(payload), 300)
    assert [len(p) for p in parts] == [300, 300, 300, 124]
    assert b"".join(parts) == payload
    assert z.chunks(memoryview(b"")) == []


def test_options() -> None:
    context = z.make_context()
    router, dealer = z.make_router(context), z.make_dealer(context)
    assert (router.get(zmq.LINGER), dealer.get(zmq.LINGER)) == (0, 0)
    assert router.get(zmq.MAXMSGSIZE) == z.MAX_FRAME + z.CURVE_NBYTES
    context.destroy()


@pytest.mark.parametrize("url", ["ipc:///run/l", "tcp://127.0.0.1:5", "tcp://[::1]:5", "tcp://10.0.0.7:5"])
def test_what_was_bound_to_one_address_is_reached_there(url: str) -> None:
    assert reachable(url) == url


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_the_wildcard_is_announced_as_an_address_or_a_name(host: str) -> None:
    url = reachable(f"tcp://{host}:5555")
    assert url.startswith("tcp://")
    assert url.endswith(":5555")
    assert host not in url
