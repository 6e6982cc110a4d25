"""`supervise` in this process, against a learner of a few lines on a real socket."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from zrl.errors import ConfigError, ProcessError
from zrl.net import sockets as z
from zrl.net.addresses import MAX_SOCKET_PATH, run_directory
from zrl.net.codec import decode, encode
from zrl.nodes import supervisor
from zrl.nodes.host import Host
from zrl.nodes.supervisor import (
    EXIT_DONE,
    EXIT_LEARNER_LOST,
    EXIT_REFUSED,
    FIRST_DELAY,
    MOST_HOPS,
    SupervisorOptions,
    supervise,
    why_not_followed,
)
from zrl.protocol import messages as m

PATIENCE = 20.0  # seconds
OPTIONS = SupervisorOptions("ipc:///nowhere", "a", 1, "tests.nodes.targets:idle", None, start_method="spawn")


@pytest.fixture
def url() -> Iterator[str]:
    folder: Path = run_directory()
    yield f"ipc://{folder}/l"
    shutil.rmtree(folder)


@pytest.mark.parametrize("url", ["tcp://no such host:5555", "ipc:///" + "x" * MAX_SOCKET_PATH])
def test_what_cannot_be_connected_to_is_an_error_and_no_hang(url: str) -> None:
    with pytest.raises(ConfigError, match="expected ipc://PATH or tcp://HOST:PORT"):
        supervise(dataclasses.replace(OPTIONS, url=url))


def test_workers_that_cannot_be_killed_are_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(host: Host) -> None:
        raise ProcessError("the zygote does not listen")

    monkeypatch.setattr(Host, "end", end)
    with pytest.raises(ProcessError, match="does not listen"):
        supervise(dataclasses.replace(OPTIONS, give_up_after=0.1))


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"log_dir": Path(__file__) / "logs"}, f"{__file__}/logs"), ({"payload": threading.Lock()}, "cannot be sent")],
)
def test_a_start_that_fails_names_the_reason_and_leaves_nothing(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        supervise(dataclasses.replace(OPTIONS, **changes))
    assert text in str(caught.value)


def test_the_connection_is_not_watched_any_more_when_nobody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it breaks in between, now and then, where learner and host end together, and the host hangs."""
    unheard: list[bool] = []

    class Watched(z.Disconnections):
        def stop(self) -> None:
            unheard.append(self.socket.closed)
            super().stop()

    monkeypatch.setattr(supervisor, "Disconnections", Watched)
    assert supervise(dataclasses.replace(OPTIONS, give_up_after=0.1)) == EXIT_LEARNER_LOST
    assert unheard[0] is False


class Learner(threading.Thread):
    """Welcomes a host, keeps it waiting for its weights, and in the end has no use for it."""

    def __init__(self, url: str, n_beats: int) -> None:
        super().__init__()
        self.url, self.n_beats = url, n_beats
        self.heard: list[str] = []
        self._context = z.make_context()
        self._router = z.make_router(self._context)
        z.bind(self._router, url)

    def run(self) -> None:
        try:
            while self._router.poll(int(PATIENCE * 1000)):
                peer, frame = self._router.recv_multipart()
                self._answer(peer, decode(frame))
                if self.heard[-1] == "Reject":
                    break
            self._router.poll(200)  # until it is sent
        finally:
            self._router.close()
            self._context.term()

    def _answer(self, peer: bytes, message: m.Message) -> None:
        self.heard.append(type(message).__name__)
        enough = self.heard.count("Beat") >= self.n_beats
        if isinstance(message, m.Hello):
            answer = m.Reject(RUN, message.incarnation, "full", "", False, "") if enough else welcome(message)
            if enough:
                self.heard.append("Reject")
            z.send(self._router, peer, encode(answer))
        elif isinstance(message, m.Beat) and enough:
            z.send(self._router, peer, encode(m.HelloAgain(RUN, message.incarnation)))
        elif isinstance(message, m.Bye):
            z.send(self._router, peer, encode(m.ByeAck(RUN, message.incarnation)))


RUN = b"r" * 16


def welcome(hello: m.Hello) -> m.Welcome:
    return m.Welcome(
        RUN, hello.incarnation, n_steps=1, n_columns=1, n_slots=1, sticky=False, keep_final_obs=False, info_keys=(),
        worker_mode="train", entropy=bytes(16), index_base=0, env="E", actor="a", version=1, pub_url="ipc:///nowhere",
    )  # fmt: skip


def test_a_host_that_waits_for_its_weights_is_not_silent(url: str) -> None:
    learner = Learner(url, n_beats=2)
    learner.start()
    try:
        assert supervise(dataclasses.replace(OPTIONS, url=url, give_up_after=PATIENCE)) == EXIT_REFUSED
    finally:
        learner.join()
    assert learner.heard[:4] == ["Hello", "Fetch", "Beat", "Beat"]


class Ending(Learner):
    """Does not know its host any more, and then is about to end."""

    def _answer(self, peer: bytes, message: m.Message) -> None:
        self.heard.append(type(message).__name__)
        if isinstance(message, m.Hello) and "Fetch" in self.heard:
            z.send(self._router, peer, encode(m.Reject(RUN, message.incarnation, "draining", "", False, "")))
            self.heard.append("Reject")
        elif isinstance(message, m.Hello):
            z.send(self._router, peer, encode(welcome(message)))
        elif isinstance(message, m.Fetch):
            z.send(self._router, peer, encode(m.HelloAgain(RUN, message.incarnation)))


@pytest.mark.parametrize(("last_run", "code"), [(b"r" * 16, EXIT_DONE), (b"s" * 16, EXIT_LEARNER_LOST)])
def test_a_host_ends_with_its_own_run_and_waits_out_the_end_of_another(
    url: str, monkeypatch: pytest.MonkeyPatch, last_run: bytes, code: int
) -> None:
    hello = Host.hello

    def after_a_run(host: Host) -> m.Hello:
        host.run_id = last_run
        return hello(host)

    monkeypatch.setattr(Host, "hello", after_a_run)
    learner = Ending(url, n_beats=0)
    learner.start()
    try:
        assert supervise(dataclasses.replace(OPTIONS, url=url, give_up_after=5.0)) == code
    finally:
        learner.join()
    assert learner.heard.count("Hello") >= 2


class Redirecting(Learner):
    """Sends every host to the next of some addresses; when there is none left, refuses it."""

    def __init__(self, url: str, *to: str) -> None:
        super().__init__(url, n_beats=0)
        self.to = list(to)

    def _answer(self, peer: bytes, message: m.Message) -> None:
        self.heard.append(type(message).__name__)
        if isinstance(message, m.Hello):
            code, url = ("redirect", self.to.pop(0)) if self.to else ("full", "")
            z.send(self._router, peer, encode(m.Reject(RUN, message.incarnation, code, "go", bool(url), url)))
            if not url:
                self.heard.append("Reject")


def followed(first: str, learners: Sequence[Learner], **changes: Any) -> tuple[int, list[str]]:
    """The exit status of a host that is given the address `first`, and what it said."""
    said: list[str] = []
    for learner in learners:
        learner.start()
    try:
        options = dataclasses.replace(OPTIONS, url=first, give_up_after=PATIENCE, **changes)
        return supervise(options, said.append), said
    finally:
        for learner in learners:
            learner.to = []  # type: ignore[attr-defined]
            nudge(learner)


def nudge(learner: Learner) -> None:
    """Let it refuse somebody, so that it ends."""
    context = z.make_context()
    dealer = z.make_dealer(context)
    try:
        z.connect(dealer, learner.url, None)
        deadline = time.monotonic() + PATIENCE
        hello = dataclasses.replace(HELLO, incarnation=b"n" * 16)
        while learner.is_alive() and time.monotonic() < deadline:
            z.send(dealer, encode(hello))
            learner.join(0.05)
    finally:
        dealer.close()
        context.term()


HELLO = m.Hello(m.NO_ID, b"H" * 16, m.PROTOCOL_VERSION, "host", "a", (), m.NO_ID, "", m.NO_ID, 0, 0, 1)


def test_a_host_goes_where_it_is_sent_to(url: str) -> None:
    second = url + "2"
    code, said = followed(url, [one := Redirecting(url, second), two := Redirecting(second)])
    assert code == EXIT_REFUSED
    assert said[0] == f"sent on to {second}: go"
    assert (one.heard[0], two.heard[0]) == ("Hello", "Hello")
    assert one.to == []


def test_a_host_does_not_go_round_in_circles(url: str) -> None:
    """Three times in a row, then it waits, and begins anew where it was told to."""
    second = url + "2"
    learners = [Redirecting(url, second, second), Redirecting(second, url, url)]
    started = time.monotonic()
    code, said = followed(url, learners)
    assert code == EXIT_REFUSED
    assert said[:4] == [f"sent on to {place}: go" for place in (second, url, second, url)]
    assert said[4] == f"does not go to {url} (1 such so far): it was sent on {MOST_HOPS} times in a row"
    assert time.monotonic() - started >= FIRST_DELAY


def test_a_host_returns_from_where_nobody_answers(url: str) -> None:
    nowhere = url + "2"
    code, said = followed(url, [Redirecting(url, nowhere)], patience_away=0.5)
    assert code == EXIT_REFUSED
    assert said[:2] == [f"sent on to {nowhere}: go", f"nobody answers at {nowhere}"]
    assert "full" in said[2]


def test_a_host_does_not_go_to_other_machines_because_a_learner_says_so(url: str) -> None:
    far = "tcp://192.0.2.1:5555"
    code, said = followed(url, [Redirecting(url, far, "nonsense")])
    assert code == EXIT_REFUSED
    assert said[1].startswith(f"does not go to {far} (1 such so far): it is not on this machine; that needs --keys DIR")
    assert said[3].startswith("does not go to nonsense (2 such so far): nonsense: expected ipc:///PATH or tcp://")


@pytest.mark.parametrize(
    ("url", "first", "keys", "insecure", "followed"),
    [
        ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5555", False, False, True),
        ("ipc:///run/l", "tcp://[::1]:5555", True, False, True),
        ("tcp://10.0.0.2:5555", "tcp://127.0.0.1:5555", False, False, False),
        ("tcp://gpu02:5555", "tcp://gpu01:5555", True, False, True),
        ("tcp://gpu02:5555", "tcp://gpu01:5555", False, True, True),
        ("tcp://localhost:5555", "tcp://gpu01:5555", True, True, False),
        ("ipc:///run/l", "tcp://gpu01:5555", True, True, False),
        ("http://gpu02:5555", "tcp://gpu01:5555", True, True, False),
        ("", "tcp://gpu01:5555", True, True, False),
    ],
)
def test_which_redirects_are_followed(url: str, first: str, keys: bool, insecure: bool, followed: bool) -> None:
    assert (why_not_followed(url, first, keys=keys, insecure=insecure) == "") == followed


class Leaving(Redirecting):
    """Welcomes a host once, and is gone: its address is empty from then on."""

    def _answer(self, peer: bytes, message: m.Message) -> None:
        self.heard.append(type(message).__name__)
        if isinstance(message, m.Hello):
            z.send(self._router, peer, encode(welcome(message)))
        elif isinstance(message, m.Fetch):
            self.heard.append("Reject")  # the last word


def test_a_host_looks_first_for_the_learner_that_welcomed_it(url: str) -> None:
    second = url + "2"
    code, said = followed(url, [Redirecting(url, second), Leaving(second)], patience_away=3.0)
    assert code == EXIT_REFUSED
    assert said[0] == f"sent on to {second}: go"
    assert said[1] == "the connection to the learner broke"
    assert said[2] == f"nobody answers at {second}"
    assert "full" in said[3]


class Strange(Learner):
    """Welcomes a host with what no learner of ours would say."""

    def __init__(self, url: str, **strange: Any) -> None:
        super().__init__(url, n_beats=0)
        self._strange = strange

    def _answer(self, peer: bytes, message: m.Message) -> None:
        self.heard.append(type(message).__name__)
        me = message.incarnation
        if isinstance(message, m.Hello):
            z.send(self._router, peer, encode(dataclasses.replace(welcome(message), **self._strange)))
        elif isinstance(message, m.Fetch):
            huge = m.Weights(RUN, me, 1, supervisor.MAX_WEIGHTS_NBYTES, bytes(16), 0, 1)
            z.send(self._router, peer, encode(huge), b"less than that")
            z.send(self._router, peer, encode(m.Weights(RUN, me, 1, 4, bytes(16), zlib.crc32(b"1234"), 1)), b"1234")
        elif isinstance(message, m.Bye):
            z.send(self._router, peer, encode(m.ByeAck(RUN, me)))
            self.heard.append("Reject")


@pytest.mark.parametrize(
    ("strange", "text"),
    [
        ({"pub_url": "udp://127.0.0.1:5"}, "what the learner publishes: udp://127.0.0.1:5: expected"),
        ({"pub_url": "tcp://no such\x1b host:5"}, "what the learner publishes: tcp://no such\\x1b host:5: "),
        ({"index_base": 65535}, "no indices for 2 workers"),
    ],
)
def test_a_welcome_that_leads_nowhere_refuses_the_host(url: str, strange: dict[str, Any], text: str) -> None:
    said: list[str] = []
    learner = Strange(url, **strange)
    learner.start()
    try:
        assert supervise(dataclasses.replace(OPTIONS, url=url, count=2), said.append) == EXIT_REFUSED
    finally:
        learner.join()
    assert text in said[-1]


class Nonsense(Learner):
    """Says what is no message, again and again."""

    def _answer(self, peer: bytes, message: m.Message) -> None:
        for _ in range(10 * supervisor.MOST_WARNINGS):
            z.send(self._router, peer, b"\xc1 \x1b[2J")
        z.send(self._router, peer, encode(m.Reject(RUN, message.incarnation, "full", "", False, "")))
        self.heard += [type(message).__name__, "Reject"]


def test_a_learner_that_makes_no_sense_does_not_fill_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    learner = Nonsense(url, n_beats=0)
    learner.start()
    try:
        assert supervise(dataclasses.replace(OPTIONS, url=url)) == EXIT_REFUSED
    finally:
        learner.join()
    said = [text for text in caplog.messages if text.startswith("from the learner: ")]
    assert len(said) == supervisor.MOST_WARNINGS
    assert not any("\x1b" in text for text in said)


def test_a_status_that_is_none_is_no_heartbeat() -> None:
    for version in (b"Infinity", b"1e400", b"NaN", b"[1]", b'"x"'):
        run: Any = supervisor._Run.__new__(supervisor._Run)
        run._hello, run._heard = welcome(NOBODY), -1.0
        run._on_status(b"", b'status\0\0{"run_id": "' + RUN.hex().encode() + b'", "version": ' + version + b"}", None)
        assert run._heard == -1.0


NOBODY = m.Hello(RUN, bytes(16), m.PROTOCOL_VERSION, "host", "a", (), bytes(16), "", bytes(16), 0, 0, 1)
