"""Looking at a learner from outside: a subscriber of its status, which the learner knows nothing of."""

from __future__ import annotations

import contextlib
import json
import math
import time
from types import TracebackType
from typing import Any, Self

import zmq

from zrl.net.addresses import check_connect, pub_url
from zrl.net.codec import TOPIC_STATUS
from zrl.net.keys import HostKeys
from zrl.net.sockets import Disconnections, connect, make_context, make_subscriber, why_refused
from zrl.protocol.messages import LARGE_HEADER

TRY_AGAIN = 0.5  # seconds after a refusal


class Observer:
    """Subscribes at once, in the background, and again whenever the connection is lost. One thread; close it.

    Args:
        url: of the learner's ROUTER.
        keys: where the learner has some.

    Attributes:
        address: of its PUB, to which this connects.
        n_odd: messages that were no status.
        problem: why the learner refused the last handshake; empty, where it did not.

    Raises:
        ConfigError: no URL that can be connected to.
    """

    def __init__(self, url: str, keys: HostKeys | None = None) -> None:
        check_connect(url)
        self.address = pub_url(url)
        self.n_odd = 0
        self.problem = ""
        self._keys = keys
        self._refused_at: float | None = None  # after that libzmq does not try again
        self._context = make_context()
        try:
            self._open()
        except BaseException:
            self._context.term()
            raise

    def next(self, timeout: float) -> dict[str, Any] | None:
        """The next status, of whichever run is there; None if none comes within `timeout` seconds. A learner publishes
        one every second, and what is not fetched in time is replaced by the next one."""
        deadline = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            if self._refused_at is not None and now - self._refused_at >= TRY_AGAIN:
                self._close()
                self._open()
            self._poller.poll(math.ceil(1000 * max(0.0, min(deadline - now, TRY_AGAIN))))
            self._look()
            status = self._received()
            if status is not None or time.monotonic() >= deadline:
                return status

    def _received(self) -> dict[str, Any] | None:
        try:
            data = self._sub.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        self.problem = ""
        status = parse(data[len(TOPIC_STATUS) :])
        self.n_odd += status is None
        return status

    def _look(self) -> None:
        """Whether the learner refuses us."""
        if self._broken.seen() and self._broken.refusal is not None and self._refused_at is None:
            self._refused_at = time.monotonic()
            self.problem = why_refused(self._broken.refusal, self.address, self._keys)

    def _open(self) -> None:
        self._refused_at = None
        with contextlib.ExitStack() as opened:
            self._sub = make_subscriber(self._context, TOPIC_STATUS, max_nbytes=LARGE_HEADER)
            opened.callback(self._sub.close)
            self._broken = Disconnections(self._sub)
            opened.callback(self._broken.close)
            connect(self._sub, self.address, self._keys)
            self._opened = opened.pop_all()
        self._poller = zmq.Poller()
        self._poller.register(self._sub, zmq.POLLIN)
        self._poller.register(self._broken.socket, zmq.POLLIN)

    def _close(self) -> None:
        self._opened.close()

    def close(self) -> None:
        """Idempotent."""
        if not self._context.closed:
            self._close()
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def parse(data: bytes) -> dict[str, Any] | None:
    """A status, or None where it is none: an object with a text `run_id` and a whole number `version`. NaN and the
    infinities, which are no JSON, are None."""
    try:
        status = json.loads(data, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(status, dict):
        return None
    run_id, version = status.get("run_id"), status.get("version")
    return status if isinstance(run_id, str) and type(version) is int else None
