"""The launch of a zygote, which may come before anybody knows what it is for.

prestart() ──► process that imports ──┐
import torch, meanwhile               ├──► Zygote.start: its Start goes there, and all else is as ever
the factory, the actor ───────────────┘
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from typing import Self

from zrl.errors import ProcessError
from zrl.nodes.pipe import Since, Surroundings, nameless, store

#: What a worker needs besides its own module; most of the start-up time of a fresh interpreter.
PRELOAD = ("torch", "gymnasium", "gymnasium.vector", "zrl.collect.build")


class Launched:
    """A pair, a place for the payload, and soon a process that has the other ends.

    A context manager: at the end of it what nobody has taken is undone.

    Raises:
        ProcessError: too many open files.

    Attributes:
        socket: our end of the pair.
        payload_fd: descriptor of something nameless, under the same number in the process.
    """

    def __init__(self) -> None:
        self._host = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._taken = False
        try:
            self.payload_fd = nameless()
            try:
                self.socket, self._theirs = socket.socketpair()
            except BaseException:
                os.close(self.payload_fd)
                raise
        except OSError as error:
            raise ProcessError(f"the zygote cannot be started: {error}") from error

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

    def say(self, message: bytes, surroundings: Surroundings, output: int) -> int:
        """Send as much of the first message as there is room for, without waiting: how many bytes. With it goes what a
        process that is there already has not inherited.

        Raises:
            OSError: the process has ended.
        """
        self.socket.setblocking(False)
        if self._process is None:
            return self.socket.send(message)
        cores = os.sched_getaffinity(0) if sys.platform == "linux" else set()
        since = store(pickle.dumps(Since(surroundings.environment(), cores)))
        try:
            folder = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
            try:
                return socket.send_fds(self.socket, [message], [output, folder, since])
            finally:
                os.close(folder)
        finally:
            os.close(since)

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.poll() is None

    @property
    def ours(self) -> bool:
        """False in a fork of the process that made it."""
        return self._host == os.getpid()

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
        if self._process is not None:
            self._process.kill()  # it has no children
            self._process.wait()


_launched: Launched | None = None


def prestart() -> None:
    """Begin to start worker processes before it is known for what: call it before torch is imported.

        import zrl

        zrl.prestart()

        import torch
        from zrl.rollout import multi

    The process that workers are forked from then imports torch while this one does, on another core. Whatever first
    starts processes with ``start_method="fork"``, a rollout as a rule, takes it over. The workers find the environment
    variables, the current folder, the ``sys.path`` and the cores of that moment; what torch, Gymnasium or their plugins
    read as they are imported, they read at the call of this. A process that nobody takes over ends with this one, or
    with `end_prestarted`. Does nothing while there is one, nor in the children of `multiprocessing`, which import the
    main module again.

    Raises:
        ProcessError: no process can be started.
    """
    global _launched
    if multiprocessing.parent_process() is not None:
        return
    if _launched is not None and _launched.ours and _launched.alive:
        return
    end_prestarted()
    try:
        output = nameless()  # until there is a log
    except OSError as error:
        raise ProcessError(f"the zygote cannot be started: {error}") from error
    try:
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
    if launched is None:
        return None
    if not launched.ours:
        launched.socket.detach()  # a fork may have closed the descriptor, and have another under its number
        return None
    if launched.alive:
        return launched
    launched.__exit__()  # a fresh one has a log that says why this one ended
    return None


atexit.register(end_prestarted)
