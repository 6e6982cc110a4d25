"""Stopping on a signal: the first one at the next safe point, the second at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """SIGINT or SIGTERM asks for a clean stop. Not an `Exception`, so that nothing swallows it.

    Attributes:
        signum: which of the two.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Turns the first SIGINT or SIGTERM into `Stopped`, at points where nothing can be torn; the second one kills.

    `Stopped` is raised inside `interruptible`, at once, and by `check`; nowhere else. Use as a context manager, in the
    main thread; in another thread it does nothing.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._may_raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the cursor, which a live view may have hidden
            os._exit(128 + signum)
        self._pending = signum
        if self._may_raise:
            raise Stopped(signum)

    @property
    def pending(self) -> int:
        """The signal that has come; 0: none."""
        return self._pending or 0

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self._pending is not None:
            raise Stopped(self._pending)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be given up at any point: waiting, collecting, evaluating."""
        try:
            self._may_raise = True
            self.check()
            yield
        finally:
            self._may_raise = False
