"""A worker's connection to the learner: one DEALER, used by one thread that has no event loop.

Its connection is its life: once it breaks, a message may be lost on either side, so it is not mended. `LinkLost` ends
the incarnation; the host starts another.
"""

from __future__ import annotations

import contextlib
import math
import time

import zmq

from zrl.errors import ProtocolError
from zrl.net.codec import decode, encode
from zrl.net.keys import HostKeys
from zrl.net.sockets import Disconnections, Rest, connect, make_context, make_dealer, send, why_refused
from zrl.protocol.messages import Message


class LinkLost(Exception):
    """The connection to the learner broke, or never came about."""


class Link:
    """Connects at once, in the background. Make it after the fork that made the process; close it.

    Args:
        url: of the learner's ROUTER.
        connect_timeout: seconds within which the first message must find a connection.
        keys: of this worker's host.

    Attributes:
        n_odd: messages that could not be decoded.

    Raises:
        ConfigError: no URL that can be connected to.
    """

    def __init__(self, url: str, *, connect_timeout: float = 30.0, keys: HostKeys | None = None) -> None:
        self.n_odd = 0
        self._url, self._keys = url, keys
        self._timeout = connect_timeout
        with contextlib.ExitStack() as opened:
            self._context = make_context()
            opened.callback(self._context.term)
            self._dealer = make_dealer(self._context)
            opened.callback(self._dealer.close)
            self._broken = Disconnections(self._dealer)
            opened.callback(self._broken.close)
            connect(self._dealer, url, keys)
            self._opened = opened.pop_all()
        self._poller, self._for_sending = zmq.Poller(), zmq.Poller()
        for poller, events in ((self._poller, zmq.POLLIN), (self._for_sending, zmq.POLLOUT)):
            poller.register(self._dealer, events)
            poller.register(self._broken.socket, zmq.POLLIN)

    def send(self, message: Message, *payload: memoryview | zmq.Frame) -> None:
        """Send one message; the first one waits for the connection.

        Raises:
            LinkLost: there is no connection.
            ProtocolError: a field is not what the protocol says.
        """
        frames: tuple[bytes | memoryview | zmq.Frame, ...] = (encode(message), *payload)
        deadline = time.monotonic() + self._timeout
        poller = self._for_sending
        while not send(self._dealer, *frames):
            left = deadline - time.monotonic()
            if self._broken.seen():
                raise LinkLost(self._why(f"no connection to {self._url}"))
            if left <= 0:
                raise LinkLost(f"no connection to {self._url}")
            poller.poll(math.ceil(left * 1000))
        self._timeout = 0.0  # from now on a missing connection is a broken one

    def receive(self, timeout: float | None) -> Message | None:
        """The next message; None if none comes within `timeout` seconds. With None it waits for as long as it takes:
        heartbeats notice a dead link.

        Raises:
            LinkLost: the connection broke.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._broken.seen():
                raise LinkLost(self._why(f"the connection to {self._url} broke"))
            try:
                data = self._dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._poller.poll(None if left is None else math.ceil(left * 1000))
                continue
            Rest(self._dealer).skip()
            try:
                return decode(data)
            except ProtocolError:
                self.n_odd += 1

    def _why(self, otherwise: str) -> str:
        refusal = self._broken.refusal
        return otherwise if refusal is None else why_refused(refusal, self._url, self._keys)

    def close(self) -> None:
        """Close; what was sent and not yet taken by the system is lost, see Bye and ByeAck. Idempotent."""
        self._opened.close()
