"""The host's side of its children: start them, hear how each one ends, signal them, end them all.

    zygote = Zygote.start("zrl.nodes.worker:main", payload=(factory, actor), run_dir=…, log_dir=…)
    child = zygote.fork("worker-0", (index, incarnation, url))
    loop.add_reader(zygote.fileno(), lambda: handle(zygote.events()))
    …
    zygote.close(deadline)

No threads, no polling: all news come through one descriptor. Nothing waits for the zygote's imports either; children
asked for before they are done are forked as soon as they are. A zygote that imports does not read, and the pair holds
little: so only a few requests are under way at a time, and each `Started` makes room for the next.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import cloudpickle  # type: ignore[import-untyped]

from zrl.errors import ConfigError, ProcessError
from zrl.nodes.pipe import (
    End,
    Ended,
    Fork,
    Ready,
    Signal,
    Start,
    Started,
    Surroundings,
    Unframer,
    Warned,
    fill,
    frame,
)
from zrl.nodes.prestart import PRELOAD, Launched, take_prestarted

SEND_TIMEOUT = 10.0  # seconds that a message may wait for a zygote that does not read
MOST_ASKED = 8  # children that are asked for and not yet there; also what a pair of 8 KB holds, as on macOS
CLOSE_TIMEOUT = 5.0  # seconds for `close`, when nobody said how long
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Lost:
    """The zygote ended without being asked; its children, whose ends were reported before this, went with it."""

    why: str


Event = Started | Warned | Ended | Lost
Target = str | Callable[..., object]


@dataclass(eq=False)
class Child:
    """One child: `pid` is None until we heard that it has started, `ended` until we heard that it has ended."""

    serial: int
    name: str
    log: Path
    pid: int | None = None  # never 0, which os.kill takes for all of us
    ended: Ended | None = None


@dataclass(eq=False)
class Zygote:
    """A zygote, and its children, which are forks of it. Made by `start`; to be used by one thread at a time.

    Attributes:
        children: those whose end was not reported yet, by serial number.
        ready: what the zygote said when its imports were done; None until then.
        log: the zygote's own output.
    """

    mode: ClassVar[Literal["fork", "spawn"]] = "fork"

    run_dir: Path
    log_dir: Path
    process: subprocess.Popen[bytes]
    _socket: socket.socket
    children: dict[int, Child] = field(default_factory=dict)
    ready: Ready | None = None
    _keep_log: Callable[[Path], Path] = field(default=lambda log: log)
    _unframer: Unframer = field(default_factory=Unframer)
    _events: deque[Event] = field(default_factory=deque)
    _n_forked: int = 0
    _asked: set[int] = field(default_factory=set)  # serials of children on their way
    _queue: dict[int, list[Fork | Signal]] = field(default_factory=dict)  # by serial: what waits until fewer are
    _over: bool = False  # the zygote's end of the pair is closed
    _closed: bool = False

    @classmethod
    def start(
        cls,
        target: Target,
        payload: object,
        *,
        run_dir: Path,
        log_dir: Path,
        preload: Sequence[str] = (),
        keep_log: Callable[[Path], Path] = lambda log: log,
    ) -> Self:
        """Start the zygote and return at once, while it imports.

        Args:
            target: what every child runs, ``target(payload, *args)``: a callable, or ``"module:function"``.
            payload: for all children, as large as it may be; sent once, loaded by each child. Like a callable `target`
                it may be defined in a notebook or an unguarded script: cloudpickle sends such things by value.
            run_dir: folder that exists and is removed at the end, also when this process is killed.
            log_dir: gets ``zygote.log`` and one ``<name>.log`` per child; made if it does not exist.
            preload: modules to import besides `PRELOAD`; they must not start threads.
            keep_log: makes sure that a log that an error names stays; its path then.

        Raises:
            ConfigError: the target or the payload cannot be pickled, or there can be no `log_dir`.
            ProcessError: the process cannot be started.
        """
        run_dir, log_dir = run_dir.absolute(), log_dir.absolute()
        try:
            log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"logs: the folder {log_dir} cannot be made: {error.strerror}; choose another") from error
        surroundings, log = Surroundings.here(), log_dir / "zygote.log"
        data = _pickled("the environment factory or the actor", (target, payload))
        start = Start(cls.mode, str(run_dir), -1, (*PRELOAD, *preload), surroundings, os.getpid())
        if cls.mode == "fork" and (prestarted := take_prestarted()) is not None:
            with contextlib.suppress(OSError):  # it has ended this very moment
                return cls._begin(prestarted, start, data, log, keep_log)
        return cls._begin(Launched(), start, data, log, keep_log)

    @classmethod
    def _begin(cls, launched: Launched, start: Start, data: bytes, log: Path, keep_log: Callable[[Path], Path]) -> Self:
        with launched, _appended(log) as output:
            fill(launched.payload_fd, data)
            message = frame(replace(start, payload_fd=launched.payload_fd, late=launched.alive))
            # before there is a zygote: one whose host is killed right now knows what to remove
            sent = launched.say(message, start.surroundings, output)
            if not launched.alive:
                launched.launch(start.surroundings, output)
            zygote = cls(Path(start.run_dir), log.parent, *launched.take(), _keep_log=keep_log)
        zygote._send_bytes(message[sent:])
        return zygote

    @property
    def log(self) -> Path:
        return self.log_dir / "zygote.log"

    def fork(self, name: str, args: tuple[Any, ...] = ()) -> Child:
        """Ask for a child; `Started` or, should that fail, `Ended` will be among the events.

        Args:
            name: for messages and the log file: letters, digits, ``.``, ``_``, ``-``. A replacement may have the name
                of its predecessor, and then goes on with its log.
            args: arguments after the payload; small.

        Raises:
            ConfigError: the name will not do, or the arguments cannot be pickled.
            ProcessError: there is no zygote any more, or it does not listen.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"name: expected letters, digits, '.', '_' or '-', not {name!r:.120}")
        if self._closed or self._over:
            raise ProcessError(f"{name} cannot be started: the zygote has ended; its log: {self._keep_log(self.log)}")
        pickled = _pickled(f"the arguments of {name}", args)
        self._n_forked += 1
        child = Child(self._n_forked, name, self.log_dir / f"{name}.log")
        self.children[child.serial] = child
        self._queue[child.serial] = [Fork(child.serial, name, str(child.log), pickled)]
        self._ask()
        return child

    def kill(self, child: Child) -> None:
        """SIGKILL, to the child and to its own children. Nothing happens if it has ended. One whose turn to start has
        not come never starts: that it has `Ended` is among the events at once, and nothing else says so."""
        self._end_child(child, signal.SIGKILL)

    def terminate(self, child: Child) -> None:
        """SIGTERM; otherwise like `kill`."""
        self._end_child(child, signal.SIGTERM)

    def dump(self, child: Child) -> None:
        """Have the stacks of all its threads written into its log. Nothing happens if it has ended."""
        self._signal(child, signal.SIGUSR1)

    def fileno(self) -> int:
        """A descriptor that is readable when `events` has news; for good after `Lost`, so stop watching it then. Look
        for yourself after `kill` and `terminate`."""
        return self._socket.fileno()

    def events(self) -> list[Event]:
        """What happened since the last call, without waiting."""
        self._receive()
        events = list(self._events)
        self._events.clear()
        return events

    def wait_event(self, timeout: float) -> Event | None:
        """The next event, or None after `timeout` seconds without one."""
        deadline = time.monotonic() + timeout
        while not self._events and not self._over and self._wait(deadline):
            self._receive()
        return self._events.popleft() if self._events else None

    def close(self, deadline: float | None = None) -> None:
        """End all children and the zygote, and remove the run directory; idempotent. `events` tells how they ended.

        Children get SIGHUP; SIGKILL after a third of the time; after two thirds the zygote gets SIGUSR2, and SIGKILL
        after five sixths, of which its children die too.

        Args:
            deadline: when to be done, on ``time.monotonic()``; in 5 s, if None. In the past: kill at once.
        """
        if self._socket.fileno() < 0:
            return
        self._closed = True  # nothing more begins; this may be interrupted, and called again
        now = time.monotonic()
        left = CLOSE_TIMEOUT if deadline is None else max(0.0, deadline - now)
        with contextlib.suppress(ProcessError):
            self._send(End(left / 3), timeout=left / 3)
        if not self._await_end(now + left * 2 / 3):
            self.process.send_signal(signal.SIGUSR2)
            if not self._await_end(now + left * 5 / 6):
                self.process.kill()
        self._reap()
        self._all_ended("ended with the zygote")
        self._socket.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _signal(self, child: Child, signum: signal.Signals) -> None:
        """Through the zygote: it is the one who knows that the pid is still the child's."""
        if child.ended is not None or self._closed:
            return
        if waiting := self._queue.get(child.serial):
            waiting.append(Signal(child.serial, signum))
        else:
            self._send(Signal(child.serial, signum))

    def _end_child(self, child: Child, signum: signal.Signals) -> None:
        if not self._closed and child.serial in self._queue:
            del self._queue[child.serial]
            self._take(Ended(child.serial, None, child.name, None, signum, ""))
        else:
            self._signal(child, signum)

    def _ask(self) -> None:
        """Ask for those whose turn it is."""
        while self._queue and len(self._asked) < MOST_ASKED and not (self._closed or self._over):
            serial = next(iter(self._queue))
            self._asked.add(serial)
            for message in self._queue.pop(serial):
                self._send(message)

    def _send(self, message: object, timeout: float = SEND_TIMEOUT) -> None:
        self._send_bytes(frame(message), timeout)

    def _send_bytes(self, data: bytes, timeout: float = SEND_TIMEOUT) -> None:
        self._socket.settimeout(max(timeout, 1e-3))
        try:
            self._socket.sendall(data)
        except TimeoutError:
            self.process.kill()  # part of a message may be on its way: there is no going on
            log = self._keep_log(self.log)
            raise ProcessError(f"the zygote does not listen (for {timeout:.0f} s); its log: {log}") from None
        except OSError:
            pass  # it has ended: the next `events` says so, and why

    def _wait(self, deadline: float) -> bool:
        """Whether there is something to read before the deadline."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _receive(self) -> None:
        """Take all that is there."""
        if self._over or self._socket.fileno() < 0:
            return
        if self._read():
            with contextlib.suppress(ProcessError):  # it was killed for that, and is `Lost` next time
                self._ask()
            return
        self._over = True
        if not self._closed:
            self._lost()

    def _read(self) -> bool:
        """Take all that is there; whether there can be more."""
        self._socket.setblocking(False)
        try:
            while data := self._socket.recv(1 << 16):
                for message in self._unframer.feed(data):
                    self._take(message)
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False

    def _take(self, message: Ready | Started | Warned | Ended) -> None:
        if isinstance(message, Ready):
            self.ready = message
            return
        self._events.append(message)
        if isinstance(message, Warned):
            return
        self._asked.discard(message.serial)
        if isinstance(message, Started):
            self.children[message.serial].pid = message.pid
        else:
            self.children.pop(message.serial).ended = message

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _await_end(self, deadline: float) -> bool:
        while not self._over and self._wait(deadline):
            self._receive()
        return self._over

    def _lost(self) -> None:
        code = self._reap()
        how = f"signal {-code}" if code < 0 else f"status {code}"
        why = f"the zygote ended with {how}"
        self._all_ended(why)
        self._events.append(Lost(f"{why}; the end of its log, {self._keep_log(self.log)}:\n{_tail(self.log)}"))

    def _all_ended(self, why: str) -> None:
        for child in self.children.values():
            child.ended = Ended(child.serial, child.pid, child.name, None, None, why)
            self._events.append(child.ended)
        self.children.clear()
        self._queue.clear()

    def _reap(self) -> int:
        """Exit status of the zygote, which has closed its end of the pair and so is about to go, or was killed."""
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Spawner(Zygote):
    """The same, with a fresh interpreter for each child: for what does not survive a fork; slower by its imports."""

    mode: ClassVar[Literal["fork", "spawn"]] = "spawn"


@contextlib.contextmanager
def _appended(log: Path) -> Iterator[int]:
    try:
        file = open(log, "ab")  # noqa: SIM115
    except OSError as error:
        raise ProcessError(f"the zygote cannot be started: {error}") from error
    with file:
        yield file.fileno()


def _pickled(what: str, value: object) -> bytes:
    try:
        data: bytes = cloudpickle.dumps(value)
        return data
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError, RuntimeError) as error:
        raise ConfigError(
            f"{what} cannot be sent to a worker: {error}; keep locks, files, sockets and running things out of it"
        ) from error


def _tail(log: Path) -> str:
    try:
        return log.read_bytes()[-2048:].decode(errors="replace")
    except OSError as error:
        return f"({error})"
