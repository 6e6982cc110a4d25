"""A subscriber of a learner's status, against a real PUB."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zrl.errors import ConfigError
from zrl.net import sockets as z
from zrl.net.addresses import pub_url, run_directory
from zrl.net.codec import TOPIC_STATUS
from zrl.net.observer import Observer, parse

LIMIT = 10.0  # seconds


@pytest.fixture
def url() -> Iterator[str]:
    folder: Path = run_directory()
    yield f"ipc://{folder}/learner.sock"
    shutil.rmtree(folder)


@contextlib.contextmanager
def publishing(url: str) -> Iterator[z.Socket]:
    context = z.make_context()
    pub = z.make_pub(context)
    z.bind(pub, pub_url(url))
    try:
        yield pub
    finally:
        pub.close()
        context.term()


def status(version: int) -> bytes:
    return TOPIC_STATUS + json.dumps({"run_id": "ab", "version": version}).encode()


def hear(observer: Observer, pub: z.Socket, frame: bytes) -> dict[str, object]:
    """Publish until it is heard: a subscription takes a moment to arrive."""
    deadline = time.monotonic() + LIMIT
    while True:
        z.send(pub, frame)
        found = observer.next(0.05)
        if found is not None:
            return found
        assert time.monotonic() < deadline


def test_it_hears_a_learner_that_comes_later_and_its_successor(url: str) -> None:
    with Observer(url) as observer:
        assert observer.next(0.0) is None
        for version in (1, 2):
            with publishing(url) as pub:
                assert hear(observer, pub, status(version))["version"] == version
                while observer.next(0.05) is not None:
                    pass


def test_what_is_no_status_is_passed_over_and_counted(url: str) -> None:
    with publishing(url) as pub, Observer(url) as observer:
        hear(observer, pub, status(1))
        while observer.next(0.05) is not None:
            pass
        z.send(pub, TOPIC_STATUS + b"[")
        assert observer.next(0.5) is None
        assert observer.n_odd == 1
        z.send(pub, status(2))
        found = observer.next(LIMIT)
        assert found is not None
        assert found["version"] == 2


def test_it_waits_no_longer_than_it_is_told(url: str) -> None:
    with Observer(url) as observer:
        begin = time.monotonic()
        assert observer.next(0.2) is None
        assert 0.15 < time.monotonic() - begin < 2.0


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"run_id": "a"}', b'{"run_id": 1, "version": 1}', b'{"run_id": "a", "version": true}',
     b'{"run_id": "a", "version": 1.0}', b"[" * 100_000, b"\xff"],
)  # fmt: skip
def test_what_is_no_status(data: bytes) -> None:
    assert parse(data) is None


def test_numbers_that_are_no_json_are_none() -> None:
    found = parse(b'{"run_id": "a", "version": 1, "x": NaN, "y": [-Infinity]}')
    assert found == {"run_id": "a", "version": 1, "x": None, "y": [None]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("learner", "expected ipc:///PATH or tcp://HOST:PORT"),
        ("ipc://relative", "expected ipc:///PATH or tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "expected ipc:///PATH or tcp://HOST:PORT"),
        ("tcp://127.0.0.1:65535", "expected a port from 1 to 65534"),
        ("tcp://a b:5555", "expected ipc://PATH or tcp://HOST:PORT"),
    ],
)
def test_urls_that_are_none(wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Observer(wrong)
