"""The launch of a zygote, which may come before anybody knows what it is for.

prestart() ──► process that imports ──┐
import torch, meanwhile               ├──► Zygote.start: its Start goes there, and all else is as ever
the factory, the actor ───────────────┘
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
from typing import Self

from zrl.errors import ProcessError
from zrl.nodes.pipe import Surroundings, nameless

#: What a worker needs besides its own module; most of the start-up time of a fresh interpreter.
PRELOAD = ("torch", "gymnasium", "gymnasium.vector", "zrl.collect.build")


class Launched:
    """A pair, a place for the payload, and soon a process that has the other ends.

    A context manager: at the end of it what nobody has taken is undone.

    Attributes:
        socket: our end of the pair.
        payload_fd: descriptor of something nameless, under the same number in the process.
    """

    def __init__(self) -> None:
        self._host = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._taken = False
        self.payload_fd = nameless()
        try:
            self.socket, self._theirs = socket.socketpair()
        except BaseException:
            os.close(self.payload_fd)
            raise

    def launch(self, surroundings: Surroundings, output: int, *modules: str) -> None:
        """Start the process, which writes to `output` and imports `modules` at once.

        Raises:
            ProcessError: it cannot be started.
        """
        command, environment = surroundings.command(str(self._theirs.fileno()), str(self._host), *modules)
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(self._theirs.fileno(), self.payload_fd),
                process_group=0,  # Ctrl-C in the terminal is for the host alone, also while the zygote imports
            )
        except OSError as error:
            raise ProcessError(f"the zygote cannot be started: {error}") from error
        self._theirs.close()

    @property
    def alive(self) -> bool:
        """Whether there is a process, and one of ours: not if we are a fork."""
        return self._host == os.getpid() and self._process is not None and self._process.poll() is None

    def take(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The process and our end of the pair: whoever takes them ends them."""
        assert self._process is not None
        self._taken = True
        return self._process, self.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._theirs.close()
        os.close(self.payload_fd)
        if self._taken:
            return
        self.socket.close()
        if self._process is not None and self._host == os.getpid():
            self._process.kill()  # it has no children
            self._process.wait()


_launched: Launched | None = None


def prestart() -> None:
    """Begin to start worker processes before it is known for what: call it before torch is imported.

        import zrl

        zrl.prestart()

        import torch
        from zrl.rollout import multi

    The process that workers are forked from then imports torch while this one does, on another core. The first rollout
    of `multi` with ``start_method="fork"`` takes it over, and nothing else changes: environment variables, the current
    folder and ``sys.path`` are those of that rollout. A process that nobody takes over ends with this one, or with
    `end_prestarted`. A second call does nothing while there is one.

    Raises:
        ProcessError: no process can be started.
    """
    global _launched
    if _launched is not None and _launched.alive:
        return
    end_prestarted()
    output = nameless()  # until there is a log
    launched = Launched()
    try:
        launched.launch(Surroundings.here(), output, *PRELOAD, "zrl.nodes.worker")
    except BaseException:
        launched.__exit__()
        raise
    finally:
        os.close(output)
    _launched = launched


def end_prestarted() -> None:
    """End what `prestart` has begun, if nobody has taken it over; idempotent."""
    if (launched := take_prestarted()) is not None:
        launched.__exit__()


def take_prestarted() -> Launched | None:
    """What `prestart` has begun, once, if it is still there."""
    global _launched
    launched, _launched = _launched, None
    if launched is None or launched.alive:
        return launched
    launched.__exit__()  # a fresh one has a log that says why this one ended
    return None


atexit.register(end_prestarted)
