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

import enum
import errno
import math
import os
import struct
import time
from collections.abc import Callable

import zmq

from zrl.errors import ConfigError, ProtocolError
from zrl.net.addresses import check_bind, in_use
from zrl.net.keys import HostKeys, Pair

MAX_FRAME = 256 << 10  # bytes: a larger one would keep heartbeats waiting on a slow link
CURVE_NBYTES = 33  # that encryption adds to a frame (RFC 26, MESSAGE), and libzmq's limit counts
MOST_SKIPPED = 1024  # frames of an unwanted payload that are read in one turn
MOST_WAITING = 64  # messages of a peer that wait here to be read; what it sends beyond that stays with it
MAX_SUBSCRIPTION = 1024  # bytes: of what a PUB receives, topics of 8 bytes and handshakes
SMALL_FRAME = 4096  # bytes: a payload of smaller frames than this, but for the first 1024, is refused
HANDSHAKE_MS = 5_000
CONNECT_MS = 3_000  # then anew: the system itself waits longer with every try, half a minute after a cut of one
HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000
UNREAD_MS = 20_000  # that a peer may leave what was sent to it in the network, before it is cut
ZAP_DOMAIN = b"zrl"
STATUS_OK, STATUS_UNKNOWN, STATUS_REVOKED = 200, 400, 500  # what ZAP may answer; 300 would tell the peer nothing
CUT_SECONDS = 1.5  # of handshakes that are cut without a word, after which that is the answer

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
Frames = list[zmq.Frame]


def make_context() -> Context:
    """A context of this process. `term` it when its sockets are closed."""
    context = zmq.Context()
    context.linger = 0
    return context


def make_router(context: Context) -> Socket:
    """The learner's socket for hosts and workers; frames beyond `MAX_FRAME` cut their sender's connection."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME + CURVE_NBYTES)
    router.setsockopt(zmq.SNDHWM, 0)
    router.setsockopt(zmq.RCVHWM, MOST_WAITING)
    # Heartbeats wait in line behind what a peer does not read, and what it has asked for would pile up here for ever.
    router.setsockopt(zmq.TCP_MAXRT, UNREAD_MS)
    return _with_heartbeats(router)


def make_dealer(context: Context) -> Socket:
    """A host's or worker's socket; `Disconnections` of it first, then `connect` it to the learner's ROUTER."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.ROUTING_ID, b"z" + os.urandom(15))  # may not begin with a zero byte
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME + CURVE_NBYTES)
    dealer.setsockopt(zmq.SNDHWM, 0)
    dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    return _with_heartbeats(dealer)


def make_pub(context: Context) -> Socket:
    """The learner's socket for what everybody may see; every message is one frame that begins with its topic. Frames
    beyond `MAX_SUBSCRIPTION` cut their sender's connection."""
    pub = context.socket(zmq.PUB)
    pub.setsockopt(zmq.CONFLATE, 1)
    pub.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION)  # of what comes in alone
    return _with_heartbeats(pub)


def make_subscriber(context: Context, topic: bytes, *, max_nbytes: int) -> Socket:
    """A subscriber of one topic, to be connected; a message of more than `max_nbytes` bytes cuts the connection."""
    sub = context.socket(zmq.SUB)
    sub.setsockopt(zmq.CONFLATE, 1)
    sub.setsockopt(zmq.MAXMSGSIZE, max_nbytes)
    sub.setsockopt(zmq.SUBSCRIBE, topic)
    return _with_heartbeats(sub)


def make_sub(context: Context, url: str, topic: bytes, *, max_nbytes: int, keys: HostKeys | None = None) -> Socket:
    """A `make_subscriber` that is connected."""
    sub = make_subscriber(context, topic, max_nbytes=max_nbytes)
    try:
        connect(sub, url, keys)
    except BaseException:
        sub.close()
        raise
    return sub


def secure(socket: Socket, pair: Pair) -> None:
    """From here on, what is bound is for those alone who are let in (`zrl.net.auth`), encrypted. libzmq looks at these
    options when it binds: what was bound before stays plain."""
    socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)


def bind(socket: Socket, url: str, *, anywhere: bool = False) -> str:
    """Bind; the URL that others connect to (a port ``*`` is replaced by the one that was found).

    Args:
        socket: to be bound.
        url: where.
        anywhere: also to an address that other machines can reach.

    Raises:
        ConfigError: an address that is in use, too long, not ours, or not on this machine; says what to do.
    """
    check_bind(url, anywhere=anywhere)
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


def connect(socket: Socket, url: str, keys: HostKeys | None = None) -> None:
    """Connect; in the background, and again whenever the connection is lost. With keys tcp is encrypted; what is bound
    to ipc is always plain.

    Raises:
        ConfigError: no URL that can be connected to.
    """
    try:
        if url.startswith("tcp://["):
            socket.setsockopt(zmq.IPV6, 1)
        if keys is not None and url.startswith("tcp://"):
            socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret)
            socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
        socket.connect(url)
    except zmq.ZMQError as error:
        raise ConfigError(f"{url}: {error.strerror}: expected ipc://PATH or tcp://HOST:PORT") from None


def _with_heartbeats(socket: Socket) -> Socket:
    """They find half-open links; libzmq's own thread answers them, however busy the process is."""
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
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
            ProtocolError: too few or too many bytes, or so many frames that reading them would keep others waiting;
                `buffer` then holds some of them.
        """
        at = n = 0
        most = MOST_SKIPPED + len(buffer) // SMALL_FRAME
        while self.more:
            n += 1
            if n > most:
                raise ProtocolError(f"a payload of {len(buffer)} bytes in more than {most} frames")
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


#: Whether a message of the user with this id may be handed over; the id is "" where the connection needed no key.
Admit = Callable[[str], bool]


def drain(
    socket: Socket,
    handler: Handler,
    max_messages: int = 256,
    max_seconds: float = 0.002,
    admit: Admit | None = None,
) -> bool:
    """Hand over the messages that wait, for one turn at most; whether more are waiting. Those that `admit` does not
    admit are skipped; it is for a ROUTER alone.

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
            first, user = (socket.recv(zmq.NOBLOCK), "") if admit is None else _with_user(socket)
        except zmq.Again:
            break
        try:
            if not has_id:
                handler(b"", first, rest)
            elif rest.more and (admit is None or admit(user)):
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


def _with_user(socket: Socket) -> tuple[bytes, str]:
    frame = socket.recv(zmq.NOBLOCK, copy=False)
    try:
        user = str(frame.get("User-Id"))
    except zmq.ZMQError:  # a connection without keys has none
        user = ""
    return frame.bytes, user


def waiting(socket: Socket) -> bool:
    """Whether a message can be read now; reading it also takes notice of what the last operation swallowed."""
    events: int = socket.get(zmq.EVENTS)  # type: ignore[assignment]
    return bool(events & zmq.POLLIN)


def send(socket: Socket, *frames: bytes | memoryview | zmq.Frame) -> bool:
    """Send one message without waiting; False where there is nobody to send it to. What is no `zmq.Frame` is copied."""
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


def lasting_frames(payload: memoryview) -> Frames:
    """The frames of a payload (bytes) that is sent again and again with other contents, and never copied: what is in
    the memory counts when libzmq comes to it. It must not be written before the other side has said that it has it.

    Made once, for each frame that is made costs a message to the thread in which pyzmq forgets it.
    """
    return [zmq.Frame(chunk, copy=False, track=False) for chunk in chunks(payload)]


class Refusal(enum.Enum):
    """Why a handshake came to nothing, as far as the side that connected can tell."""

    UNKNOWN = "unknown"  # the key is not authorized
    REVOKED = "revoked"
    OTHER_WAY = "other way"  # one side has keys, the other has not
    CUT = "cut"  # without a word, again and again


class Disconnections:
    """Tells whether a DEALER or SUB has lost its connection since this was made, or has been refused one; make it
    before `connect`.

    A learner that cuts a handshake without a word may be one that ends: libzmq tries again, and only what lasts is a
    refusal. After any other refusal libzmq does not try again.

    Attributes:
        socket: becomes readable then: to be polled together with the other.
        connected: whether there is a connection, as of the last event.
        refusal: why there is none; None: there is, was, or may still be one.
    """

    def __init__(self, watched: Socket) -> None:
        self._watched = watched
        self.connected = False
        self._cut_since: float | None = None
        self.refusal: Refusal | None = None
        self.socket: Socket = watched.get_monitor_socket(_WATCHED)

    def seen(self) -> bool:
        """Whether the connection was lost or refused. Does not wait."""
        while waiting(self.socket):
            if self.take(self.socket.recv_multipart(zmq.NOBLOCK)[0]):
                return True
        return False

    def take(self, frame: bytes) -> bool:
        """Take notice of an event, the first frame of a message of `socket`; as `seen`."""
        event, value = struct.unpack("=HI", frame)
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.connected, self._cut_since, self.refusal = True, None, None
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.refusal = Refusal.REVOKED if value == STATUS_REVOKED else Refusal.UNKNOWN
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self.refusal = Refusal.OTHER_WAY
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and value in (errno.EPIPE, errno.ECONNRESET):
            now = time.monotonic()
            self._cut_since = now if self._cut_since is None else self._cut_since
            if now - self._cut_since >= CUT_SECONDS:
                self.refusal = Refusal.CUT
        elif event == zmq.EVENT_DISCONNECTED and self.connected:
            self.connected = False
            return True
        return self.refusal is not None

    def stop(self) -> None:
        """No more events, so that `socket` may be closed. If that were closed before, and the connection broke in
        between, libzmq's thread would wait for ever for somebody to take the event, and this call for that thread."""
        self._watched.disable_monitor()

    def close(self) -> None:
        """To be called before the other is closed."""
        self.stop()
        self.socket.close()


def why_refused(refusal: Refusal, url: str, keys: HostKeys | None) -> str:
    """What a refusal means for the one who connects, and what to do."""
    if url.startswith("ipc://"):
        return f"what is at {url} cut the handshake off: is it a learner?"
    if keys is None:
        perhaps = "; or nobody listens behind that address" if refusal is Refusal.CUT else ""
        return f"the learner at {url} refused the handshake: it wants keys (--keys DIR){perhaps}"
    own, key = keys.path.with_name(f"{keys.path.name}.public"), keys.pair.public.decode()
    if refusal is Refusal.UNKNOWN:
        return (
            f"the learner at {url} does not know the key of {own}; on its machine: "
            f"zrl keys authorize {keys.path.name} '{key}' --keys DIR"
        )
    if refusal is Refusal.REVOKED:
        return f"the learner at {url} has revoked the key of {own}; make another pair, and have that one authorized"
    if refusal is Refusal.OTHER_WAY:
        return f"the learner at {url} refused the handshake: it has no keys; leave --keys out, or start it with --keys"
    return (
        f"the learner at {url} cut the handshake off: probably its key is another than the one in "
        f"{keys.path.with_name('server.public')}, or it has none; compare that with server.public on its machine"
    )


_WATCHED = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
