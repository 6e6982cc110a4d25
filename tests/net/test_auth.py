"""Handshakes with keys: real sockets, and a thread that answers for them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from zrl.errors import ConfigError, ZrlError
from zrl.net import keys as k
from zrl.net import sockets as z
from zrl.net.addresses import run_directory
from zrl.net.auth import Gate
from zrl.net.codec import TOPIC_STATUS
from zrl.net.link import Link, LinkLost
from zrl.net.observer import Observer
from zrl.protocol import messages as m

LIMIT = 5.0  # seconds
BYE = m.Bye(b"r" * 16, b"i" * 16)


@dataclass
class Learner:
    """Sockets as a learner with keys has them."""

    gate: Gate
    router: z.Socket
    pub: z.Socket
    url: str
    pub_at: str
    ipc: str
    keys: Path

    def hear(self, n: int = 1) -> list[bytes]:
        """Headers of messages that are handed over."""
        heard: list[bytes] = []

        def enough() -> bool:
            z.drain(self.router, lambda peer, header, rest: heard.append(header), admit=self.gate.admit)
            return len(heard) >= n

        until(enough)
        return heard


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = run_directory()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def learner(folder: Path) -> Iterator[Learner]:
    keys = folder / "learner"
    k.new_pair(keys, "server")
    with learning(keys, folder) as made:
        yield made


@contextlib.contextmanager
def learning(keys: Path, folder: Path) -> Iterator[Learner]:
    ours = k.learner_keys(keys)
    context = z.make_context()
    gate = Gate(context, ours)
    router, pub = z.make_router(context), z.make_pub(context)
    try:
        ipc = z.bind(router, f"ipc://{folder}/r")
        z.bind(pub, f"{ipc}.pub")
        z.secure(router, ours.pair)
        z.secure(pub, ours.pair)
        url = z.bind(router, "tcp://127.0.0.1:*")
        with pytest.MonkeyPatch.context() as patch:
            pub_at = z.bind(pub, "tcp://127.0.0.1:*")
            patch.setattr("zrl.net.observer.pub_url", lambda url: pub_at)
            yield Learner(gate, router, pub, url, pub_at, ipc, keys)
    finally:
        router.close()
        pub.close()
        context.term()
        gate.join()


@contextlib.contextmanager
def lone_router() -> Iterator[z.Socket]:
    """A learner's socket without a gate."""
    context = z.make_context()
    router = z.make_router(context)
    try:
        yield router
    finally:
        router.close()
        context.term()


def host(learner: Learner, folder: Path, name: str = "one", *, known: bool = True) -> k.HostKeys:
    """The keys of a new host that trusts the learner."""
    public = k.new_pair(folder / name, name)
    k.authorize(folder / name, "server", k.read_public(learner.keys / "server.public").decode())
    if known:
        k.authorize(learner.keys, name, public)
    return k.host_keys(folder / name)


def refusal(url: str, keys: k.HostKeys | None) -> str:
    """Why the first message finds no connection."""
    with contextlib.closing(Link(url, connect_timeout=LIMIT, keys=keys)) as link:
        with pytest.raises(LinkLost) as caught:
            link.send(BYE)
        return str(caught.value)


def say(url: str, keys: k.HostKeys | None) -> Link:
    link = Link(url, connect_timeout=LIMIT, keys=keys)
    link.send(BYE)
    return link


def test_who_is_authorized_is_heard(learner: Learner, folder: Path) -> None:
    learner.gate.check(learner.url)
    learner.gate.check(learner.pub_at, pub=True)
    with contextlib.closing(say(learner.url, host(learner, folder))):
        assert len(learner.hear()) == 1
    assert not any(learner.gate.counters.values())


def test_ipc_stays_plain(learner: Learner, folder: Path) -> None:
    for keys in (None, host(learner, folder, known=False)):
        with contextlib.closing(say(learner.ipc, keys)):
            assert len(learner.hear()) == 1


def test_an_unknown_key(learner: Learner, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = host(learner, folder, known=False)
    text = refusal(learner.url, keys)
    assert "does not know the key of" in text
    assert f"zrl keys authorize one '{keys.pair.public.decode()}'" in text
    assert learner.gate.counters["key_unknown"] == 1
    assert keys.pair.public.decode() in caplog.text
    k.authorize(learner.keys, "one", keys.pair.public.decode())  # while the learner runs
    with contextlib.closing(say(learner.url, keys)):
        assert len(learner.hear()) == 1


def test_a_revoked_key(learner: Learner, folder: Path) -> None:
    """What it says over the connection that it has is discarded, and it gets no other one."""
    one, two = host(learner, folder), host(learner, folder, "two")
    with contextlib.closing(say(learner.url, one)) as first, contextlib.closing(say(learner.url, two)) as second:
        learner.hear(2)
        k.revoke(learner.keys, "one")
        until(lambda: not learner.gate.admit(f"one {one.pair.public.decode()}"))
        learner.gate.counters.clear()
        first.send(BYE, memoryview(b"payload"))
        until(lambda: z.waiting(learner.router))
        second.send(BYE)
        assert len(learner.hear()) == 1
        assert learner.gate.counters["revoked_message"] == 1
    assert "has revoked the key of" in refusal(learner.url, one)
    assert learner.gate.counters["key_revoked"] == 1


def test_a_new_key_under_an_old_name_does_not_bring_the_old_one_back(learner: Learner, folder: Path) -> None:
    one = host(learner, folder)
    user = f"one {one.pair.public.decode()}"
    assert learner.gate.admit(user)
    k.revoke(learner.keys, "one")
    k.authorize(learner.keys, "one", k.new_pair(folder / "again", "one"))
    until(lambda: not learner.gate.admit(user))


def test_no_keys(learner: Learner) -> None:
    assert "it wants keys (--keys DIR)" in refusal(learner.url, None)


def test_another_learner_than_expected(learner: Learner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(z, "CUT_SECONDS", 0.2)
    keys = host(learner, folder)
    (folder / "one" / "server.public").write_bytes(k.draw().public)
    assert f"another than the one in {folder}/one/server.public" in refusal(learner.url, k.host_keys_at(keys.path))


def test_a_learner_without_keys(learner: Learner, folder: Path) -> None:
    with lone_router() as router:
        assert "it has no keys" in refusal(z.bind(router, "tcp://127.0.0.1:*"), host(learner, folder))


def test_observers_need_a_key(learner: Learner, folder: Path) -> None:
    def status_seen(observer: Observer) -> bool:
        z.send(learner.pub, TOPIC_STATUS + b'{"run_id": "a", "version": 1}')
        return observer.next(0.02) is not None

    with Observer(learner.url) as plain:
        until(lambda: status_seen(plain) or plain.problem)
        assert "it wants keys" in plain.problem
    keys = host(learner, folder, known=False)
    with Observer(learner.url, keys) as observer:
        until(lambda: status_seen(observer) or observer.problem)
        assert "does not know the key" in observer.problem
        k.authorize(learner.keys, "one", keys.pair.public.decode())
        until(lambda: status_seen(observer))
        assert not observer.problem


def test_a_gate_that_stands_open_is_noticed(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    with lone_router() as plain, pytest.raises(ZrlError, match="not refused as one, but: other way"):
        learner.gate.check(z.bind(plain, "tcp://127.0.0.1:*"))
    monkeypatch.setattr(learner.gate, "_judge", lambda key, address: (z.STATUS_OK, "anybody"))
    with pytest.raises(ZrlError, match="a stranger's key was let in"):
        learner.gate.check(learner.url)


def test_without_a_gate_nobody_gets_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(z, "CUT_SECONDS", 0.2)
    pair = k.draw()
    with lone_router() as router:
        z.secure(router, pair)
        url = z.bind(router, "tcp://127.0.0.1:*")
        assert "cut the handshake off" in refusal(url, k.HostKeys(folder / "one", k.draw(), pair.public))


def test_a_folder_that_cannot_be_trusted_lets_nobody_new_in(learner: Learner, folder: Path) -> None:
    one, two = host(learner, folder), host(learner, folder, "two")
    with contextlib.closing(say(learner.url, one)) as link:
        learner.hear()
        learner.keys.chmod(0o755)
        assert "does not know" in refusal(learner.url, two)
        link.send(BYE)
        assert len(learner.hear()) == 1
        learner.keys.chmod(0o700)
    with contextlib.closing(say(learner.url, two)):
        learner.hear()


def test_a_question_that_makes_no_sense_is_refused(learner: Learner) -> None:
    asked = [b"1.0", b"7", b"zrl", b"127.0.0.1", b"", b"PLAIN", b"user", b"password"]
    assert learner.gate._answer(asked) == [b"1.0", b"7", b"400", b"", b"", b""]
    asked[2:] = [b"other", b"127.0.0.1", b"", b"CURVE", b"k" * 32]
    assert learner.gate._answer(asked)[2] == b"400"
    assert learner.gate.counters["key_odd"] == 2


def test_other_machines_only_where_asked_for() -> None:
    with lone_router() as router:
        with pytest.raises(ConfigError, match="--keys DIR"):
            z.bind(router, "tcp://0.0.0.0:*")
        assert z.bind(router, "tcp://0.0.0.0:*", anywhere=True).startswith("tcp://0.0.0.0:")
