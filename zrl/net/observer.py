"""Looking at a learner from outside: a subscriber of its status, which the learner knows nothing of."""

from __future__ import annotations

import json
import math
import time
from types import TracebackType
from typing import Any, Self

import zmq

from zrl.net.addresses import check_connect, pub_url
from zrl.net.codec import TOPIC_STATUS
from zrl.net.sockets import make_context, make_sub
from zrl.protocol.messages import LARGE_HEADER


class Observer:
    """Subscribes at once, in the background, and again whenever the connection is lost. One thread; close it.

    Args:
        url: of the learner's ROUTER.

    Attributes:
        address: of its PUB, to which this connects.
        n_odd: messages that were no status.

    Raises:
        ConfigError: no URL that can be connected to.
    """

    def __init__(self, url: str) -> None:
        check_connect(url)
        self.address = pub_url(url)
        self.n_odd = 0
        self._context = make_context()
        try:
            self._sub = make_sub(self._context, self.address, TOPIC_STATUS, max_nbytes=LARGE_HEADER)
        except BaseException:
            self._context.term()
            raise

    def next(self, timeout: float) -> dict[str, Any] | None:
        """The next status, of whichever run is there; None if none comes within `timeout` seconds. A learner publishes
        one every second, and what is not fetched in time is replaced by the next one."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not self._sub.poll(math.ceil(left * 1000)):
                return None
            status = parse(self._sub.recv(zmq.NOBLOCK)[len(TOPIC_STATUS) :])
            if status is not None:
                return status
            self.n_odd += 1

    def close(self) -> None:
        """Idempotent."""
        if not self._context.closed:
            self._sub.close()
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
