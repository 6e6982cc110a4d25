"""A socket on an asyncio loop, without losing what the descriptor says only once (`zrl.net.sockets`, "The edge").

No coroutine waits in `recv`, so none is ever cancelled there (under uvloop a message was lost by that): the loop calls
when the descriptor becomes readable, and a turn takes what waits, for 2 ms at most, so that timers and the other
sockets have theirs.
"""

from __future__ import annotations

import asyncio

import zmq

from zrl.net.sockets import Admit, Handler, Socket, drain, send, waiting


class Endpoint:
    """Reads `socket` on `loop` and hands every message to `handler`; sends.

    All calls on the loop's thread. What `handler` raises goes to the loop's exception handler; reading goes on.

    Args:
        socket: bound or connected; closed by `close`.
        loop: asyncio's or uvloop's.
        handler: called with (routing id, header frame, payload); must not wait.
        max_messages: of one turn.
        max_seconds: of one turn.
        admit: whose messages are handed over, for a ROUTER; None: everybody's.
    """

    def __init__(
        self,
        socket: Socket,
        loop: asyncio.AbstractEventLoop,
        handler: Handler,
        *,
        max_messages: int = 256,
        max_seconds: float = 0.002,
        admit: Admit | None = None,
    ) -> None:
        self.socket = socket
        self._loop = loop
        self._handler = handler
        self._limits = (max_messages, max_seconds, admit)
        self._turn: asyncio.Handle | None = None  # the next one, where it is due without the descriptor
        self._reading = False
        self._fd: int = socket.get(zmq.FD)  # type: ignore[assignment]
        loop.add_reader(self._fd, self.read)
        self._after_use()  # what came before the descriptor was watched

    def send(self, *frames: bytes | memoryview) -> bool:
        """Send one message without waiting; False where there is nobody to send it to."""
        sent = send(self.socket, *frames)
        if not self._reading:  # a turn looks for itself when it is over
            self._schedule()  # once for all that is sent in this round of the loop
        return sent

    def close(self) -> None:
        """Stop reading and close the socket; idempotent."""
        if self.socket.closed:
            return
        if self._turn is not None:
            self._turn.cancel()
        self._loop.remove_reader(self._fd)
        self.socket.close()

    def read(self) -> None:
        """Take a turn: called by the loop, and by whoever wants what waits now."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self.socket.closed:
            return
        more = True
        self._reading = True
        try:
            more = drain(self.socket, self._handler, *self._limits)
        finally:
            self._reading = False
            if more and not self.socket.closed:  # the handler may have closed this endpoint
                self._after_use()

    def _after_use(self) -> None:
        """The rule: whatever touched the socket may have swallowed the event, so look for yourself."""
        if waiting(self.socket):
            self._schedule()

    def _schedule(self) -> None:
        if self._turn is None:
            self._turn = self._loop.call_soon(self.read)
