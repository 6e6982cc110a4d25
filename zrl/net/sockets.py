"""Sockets with the options that were measured to matter, and how they are read.

- ``LINGER=0`` on the context: closing never hangs. A last message is acknowledged before its sender closes.
- ROUTER: ``ROUTER_MANDATORY``, so that a peer without a connection is an error instead of silence; ``MAXMSGSIZE``,
  which works only before bind. Its limit is per frame.
- DEALER: ``IMMEDIATE``, so that nothing is queued for a learner that is not there: a restarted one would get it.
- PUB and SUB: ``CONFLATE``, both of them, and one topic per SUB: a slow subscriber gets the newest message, and every
  message is one frame.
- Flow control is slots, never high-water marks.

A context is made after a fork, never before. A socket belongs to one thread.

**The edge.** A socket's file descriptor becomes readable once for all that has arrived, and *any* operation on the
socket, a send too, may swallow that event. So whoever waits for the descriptor reads ``EVENTS`` after every send and
after every turn of reading, and comes back by itself where messages wait. `Endpoint` does.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable

import zmq
import zmq.utils.monitor as zmq_monitor

from zrl.errors import ConfigError, ProtocolError
from zrl.net.addresses import check_bind, in_use

MAX_FRAME = 256 << 10  # bytes: a larger one would keep heartbeats waiting on a slow link
MOST_SKIPPED = 1024  # frames of an unwanted payload that are read in one turn
HANDSHAKE_MS = 5_000
HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


def make_context() -> Context:
    """A context of this process. `term` it when its sockets are closed."""
    context = zmq.Context()
    context.linger = 0
    return context


def make_router(context: Context) -> Socket:
    """The learner's socket for hosts and workers; frames beyond `MAX_FRAME` cut their sender's connection."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    router.setsockopt(zmq.SNDHWM, 0)
    return _with_heartbeats(router)


def make_dealer(context: Context) -> Socket:
    """A host's or worker's socket; `Disconnections` of it first, then `connect` it to the learner's ROUTER."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.ROUTING_ID, b"z" + os.urandom(15))  # may not begin with a zero byte
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    dealer.setsockopt(zmq.SNDHWM, 0)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    return _with_heartbeats(dealer)


def make_pub(context: Context) -> Socket:
    """The learner's socket for what everybody may see; every message is one frame that begins with its topic."""
    pub = context.socket(zmq.PUB)
    pub.setsockopt(zmq.CONFLATE, 1)
    return _with_heartbeats(pub)


def make_sub(context: Context, url: str, topic: bytes, *, max_nbytes: int) -> Socket:
    """A subscriber of one topic; a message of more than `max_nbytes` bytes cuts the connection."""
    sub = context.socket(zmq.SUB)
    sub.setsockopt(zmq.CONFLATE, 1)
    sub.setsockopt(zmq.MAXMSGSIZE, max_nbytes)
    sub.setsockopt(zmq.SUBSCRIBE, topic)
    try:
        connect(_with_heartbeats(sub), url)
    except BaseException:
        sub.close()
        raise
    return sub


def bind(socket: Socket, url: str) -> str:
    """Bind; the URL that others connect to (a port ``*`` is replaced by the one that was found).

    Raises:
        ConfigError: an address that is in use, too long, not ours, or not on this machine; says what to do.
    """
    check_bind(url)
    # libzmq does not resolve names when it binds
    plain = url.replace("tcp://localhost:", "tcp://127.0.0.1:", 1)
    try:
        if plain.startswith("tcp://["):
            socket.setsockopt(zmq.IPV6, 1)
        socket.bind(plain)
    except zmq.ZMQError as error:
        text = in_use(url) if error.errno == errno.EADDRINUSE else f"{url}: {error.strerror}"
        raise ConfigError(text) from None
    endpoint: bytes = socket.get(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
    return endpoint.rstrip(b"\0").decode()


def connect(socket: Socket, url: str) -> None:
    """Connect; in the background, and again whenever the connection is lost.

    Raises:
        ConfigError: no URL that can be connected to.
    """
    try:
        if url.startswith("tcp://["):
            socket.setsockopt(zmq.IPV6, 1)
        socket.connect(url)
    except zmq.ZMQError as error:
        raise ConfigError(f"{url}: {error.strerror}: expected ipc://PATH or tcp://HOST:PORT") from None


def _with_heartbeats(socket: Socket) -> Socket:
    """They find half-open links; libzmq's own thread answers them, however busy the process is."""
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    return socket


class Rest:
    """What follows the header frame of the message in hand: its payload, still in the socket."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    @property
    def more(self) -> bool:
        """Whether another frame follows."""
        return bool(self._socket.get(zmq.RCVMORE))

    def into(self, buffer: memoryview) -> None:
        """Receive the payload into `buffer` (bytes, writable), frame by frame; it must fill it exactly.

        Raises:
            ProtocolError: too few or too many bytes; `buffer` then holds some of them.
        """
        at = 0
        while self.more:
            room = buffer[at:]
            # the size is that of the frame, also where the room was smaller
            size = self._socket.recv_into(room if len(room) else bytearray(1), flags=zmq.NOBLOCK)
            if size > len(room):
                raise ProtocolError(f"a payload of more than {len(buffer)} bytes")
            at += size
        if at != len(buffer):
            raise ProtocolError(f"a payload of {at} bytes, expected {len(buffer)}")

    def skip(self, most: float = math.inf) -> bool:
        """Read what is left of the message, at most so many frames, and forget it; whether that was all."""
        n = 0
        while self.more:
            if n >= most:
                return False
            self._socket.recv(zmq.NOBLOCK)  # the frames of a message arrive together
            n += 1
        return True


#: What to do with a message: (routing id, header frame, its payload). The id is b"" where the socket is no ROUTER.
Handler = Callable[[bytes, bytes, Rest], None]


def drain(socket: Socket, handler: Handler, max_messages: int = 256, max_seconds: float = 0.002) -> bool:
    """Hand over the messages that wait, for one turn at most; whether more are waiting.

    What `handler` does not read of a payload is skipped, if it is long in the turns that follow. If it raises, the
    message counts as read.
    """
    rest = Rest(socket)
    if not rest.skip(MOST_SKIPPED):
        return True
    has_id = socket.type == zmq.ROUTER
    deadline = time.perf_counter() + max_seconds
    for _ in range(max_messages):
        try:
            first = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            break
        try:
            if not has_id:
                handler(b"", first, rest)
            elif rest.more:
                handler(first, socket.recv(zmq.NOBLOCK), rest)
        finally:
            skipped = socket.closed or rest.skip(MOST_SKIPPED)  # closed by the handler
        if socket.closed:
            return False
        if not skipped:
            return True
        if time.perf_counter() >= deadline:
            break
    return waiting(socket)


def waiting(socket: Socket) -> bool:
    """Whether a message can be read now; reading it also takes notice of what the last operation swallowed."""
    events: int = socket.get(zmq.EVENTS)  # type: ignore[assignment]
    return bool(events & zmq.POLLIN)


def send(socket: Socket, *frames: bytes | memoryview) -> bool:
    """Send one message without waiting; False where there is nobody to send it to."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno in (errno.EAGAIN, errno.EHOSTUNREACH):
            return False
        raise
    return True


def chunks(payload: memoryview, size: int = MAX_FRAME) -> list[memoryview]:
    """A payload (bytes) as frames of at most `size` bytes."""
    return [payload[at : at + size] for at in range(0, len(payload), size)]


class Disconnections:
    """Tells whether a DEALER has lost its connection since this was made; make it before `connect`.

    Attributes:
        socket: becomes readable then: to be polled together with the DEALER.
    """

    def __init__(self, dealer: Socket) -> None:
        self._dealer = dealer
        self.socket: Socket = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def seen(self) -> bool:
        """Whether the connection was lost. Does not wait."""
        return waiting(self.socket) and zmq_monitor.recv_monitor_message(self.socket)["event"] == (
            zmq.EVENT_DISCONNECTED
        )

    def close(self) -> None:
        """To be called before the DEALER is closed."""
        self._dealer.disable_monitor()
        self.socket.close()
