"""Ctrl-C, and what it must not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class Uninterrupted:
    """Holds Ctrl-C back until the end of a ``with``, so that what stands there is done as a whole or not at all.

    Its handler raises KeyboardInterrupt between any two lines, also between "taken" and "noted that it was taken". Only
    the main thread runs handlers; in others this does nothing. Takes 3 µs; must not surround what waits.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], object] | None = None
        self._missed: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # else it is ignored, or ends the process
                self._handler = handler
                signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._missed = signum, frame

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._missed is not None:
                self._handler(*self._missed)
