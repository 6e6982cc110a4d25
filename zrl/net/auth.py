"""Who may connect to a learner with keys: the answers to libzmq's questions, before any message of a peer is read.

    peer ── handshake (CURVE) ──► ROUTER, PUB ── ZAP: "this key?" ──► Gate ── 200, user | 400 | 500

libzmq asks over a socket inside the context, for every handshake, and keeps the peer waiting for the answer. A thread
of its own gives it, so that handshakes do not wait for the learner, nor the learner for them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter

import zmq
import zmq.utils.z85 as zmq_z85

from zrl.errors import ZrlError
from zrl.net.keys import Authorized, HostKeys, LearnerKeys, draw
from zrl.net.sockets import (
    HANDSHAKE_MS,
    MAX_FRAME,
    STATUS_OK,
    STATUS_REVOKED,
    STATUS_UNKNOWN,
    ZAP_DOMAIN,
    Context,
    Disconnections,
    Refusal,
    connect,
    make_context,
    make_dealer,
    make_subscriber,
)

ZAP_URL = "inproc://zeromq.zap.01"
MOST_TOLD = 20  # keys whose refusal is logged

logger = logging.getLogger("zrl")


class Gate:
    """Answers whether a key may connect, for all sockets of `context` that are `secure`; make it before they are bound.

    Its thread ends when the context is terminated: terminate it, then `join`.

    Args:
        context: of the learner's sockets.
        keys: the learner's.

    Attributes:
        counters: refusals by reason, and messages that were discarded.

    Raises:
        ConfigError: the folder cannot be trusted or read.
    """

    def __init__(self, context: Context, keys: LearnerKeys) -> None:
        self.counters = Counter({"key_unknown": 0, "key_revoked": 0, "key_odd": 0, "revoked_message": 0})
        self._keys = keys
        self._authorized = Authorized(keys.folder)
        self._told: set[bytes] = set()
        self._socket = context.socket(zmq.REP)
        self._socket.bind(ZAP_URL)
        self._thread = threading.Thread(target=self._serve, name="zrl-keys", daemon=True)
        self._thread.start()

    def admit(self, user: str) -> bool:
        """Whether a message of this user may be handed over; of "", who came over ipc, it may."""
        if not user or self._authorized.admits(user):
            return True
        self.counters["revoked_message"] += 1
        return False

    def check(self, url: str, *, pub: bool = False) -> None:
        """Make sure that a stranger is refused at `url`, where the ROUTER or the PUB is bound.

        Raises:
            ZrlError: it is not, or nobody answers.
        """
        stranger = HostKeys(self._keys.folder / "stranger", draw(), self._keys.pair.public)
        self._told.add(stranger.pair.public)
        try:
            refusal = _knock(url, stranger, pub)
        except TimeoutError:
            raise ZrlError(f"{url}: no answer to a handshake within {HANDSHAKE_MS / 1000:.0f} s") from None
        if refusal is not Refusal.UNKNOWN:
            what = "was let in" if refusal is None else f"was not refused as one, but: {refusal.value}"
            raise ZrlError(f"{url}: a stranger's key {what}; this learner does not start")
        self.counters["key_unknown"] -= 1

    def join(self) -> None:
        """Wait for the end of the thread; after the context was terminated."""
        self._thread.join()

    def _serve(self) -> None:
        try:
            while True:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        except zmq.ContextTerminated:
            self._socket.close()

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """The answer to ``[version, id, domain, address, identity, mechanism, key]``."""
        version, request, domain, address, _, mechanism, *credentials = question
        code, user = STATUS_UNKNOWN, ""
        if (version, domain, mechanism) == (b"1.0", ZAP_DOMAIN, b"CURVE") and [len(x) for x in credentials] == [32]:
            code, user = self._judge(zmq_z85.encode(credentials[0]), address)
        else:
            self.counters["key_odd"] += 1
        return [b"1.0", request, b"%d" % code, b"", user.encode(), b""]

    def _judge(self, key: bytes, address: bytes) -> tuple[int, str]:
        user = self._authorized.user_of(key)
        if user:
            return STATUS_OK, user
        revoked = self._authorized.is_revoked(key)
        self.counters["key_revoked" if revoked else "key_unknown"] += 1
        if key not in self._told and len(self._told) < MOST_TOLD:
            self._told.add(key)
            where = address.decode(errors="replace")
            what = "revoked" if revoked else "not authorized"
            logger.warning("refused a peer from %s: its key '%s' is %s", where, key.decode(), what)
        return (STATUS_REVOKED if revoked else STATUS_UNKNOWN), ""


def _knock(url: str, keys: HostKeys, pub: bool) -> Refusal | None:
    """How a handshake at `url` ends; None: it succeeds. Raises `TimeoutError`."""
    context = make_context()
    socket = make_subscriber(context, b"", max_nbytes=MAX_FRAME) if pub else make_dealer(context)
    events = Disconnections(socket)
    try:
        connect(socket, url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"), keys)
        deadline = time.monotonic() + HANDSHAKE_MS / 1000
        while (left := deadline - time.monotonic()) > 0:
            if events.seen() or events.connected:
                return events.refusal
            poller = zmq.Poller()
            poller.register(events.socket, zmq.POLLIN)
            poller.poll(math.ceil(left * 1000))
        raise TimeoutError
    finally:
        events.close()
        socket.close()
        context.term()
