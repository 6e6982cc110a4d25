"""What a host and its zygote tell each other, and how: pickled dataclasses, each after its length, over a socketpair.

    host    ──►  Start, once; then Fork, Signal, End           (end of file means End; before Start: nothing to do)
    zygote  ──►  Ready, once; then for each child Started, Warned now and then, Ended

Both ends are our own processes and no one else can reach the pair, which is why pickle is allowed here and never on a
socket. The dataclasses hold plain values only, so that the zygote itself unpickles nothing of the user's: what a child
is to run travels through as bytes.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

#: Largest traceback that travels, in bytes: the default capacity of a pipe, so that a child need not wait for a reader.
MAX_TRACEBACK = 64 << 10
#: Before a warning in a child's pipe, which ends with its line; a traceback does not begin like that.
WARNING = b"\x1e"
MAX_WARNINGS = 20  # different ones that a child passes on, and a host of its children
MAX_WARNING = 2048  # bytes: what is written to a pipe at once is not torn apart
#: Exit status of a worker whose connection ended: its host starts a fresh one, and no budget is used.
CONNECTION_ENDED = 3
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a process of ours takes over from its host, besides the environment variables and the current folder.

    Attributes:
        path: ``sys.path``, so that the modules beside the user's script are found.
        argv: ``sys.argv``.
        pythonpath: the PYTHONPATH of the host, for the grandchildren; None where there is none.
    """

    path: list[str]
    argv: list[str]
    pythonpath: str | None

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this process."""
        return cls(list(sys.path), list(sys.argv), os.environ.get("PYTHONPATH"))

    def apply(self) -> None:
        """Make them those of this process."""
        sys.path[:], sys.argv[:] = self.path, self.argv
        if self.pythonpath is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = self.pythonpath

    def command(self, *words: str) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a fresh interpreter that runs the zygote's module with these arguments.

        It finds zrl where this process found it, and nothing in the current folder that this process would not find.
        The libraries that compute on several threads are held to one: the zygote must have no other when it forks, and
        a worker is one core's work.
        """
        return [sys.executable, "-P", "-m", "zrl.nodes.zygote", *words], self.environment()

    def environment(self) -> dict[str, str]:
        """That of `command`."""
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return {**os.environ, **one, "PYTHONPATH": os.pathsep.join(self.path)}


@dataclass(frozen=True, slots=True)
class Since:
    """What a zygote would have inherited if it were launched with its `Start`. Stored, and its descriptor sent with the
    message: environments may be large, and who imports does not read.

    Attributes:
        environment: variables.
        cores: that it may use; empty where the system does not say.
    """

    environment: dict[str, str]
    cores: set[int]


@dataclass(frozen=True, slots=True)
class Start:
    """The first message.

    Attributes:
        mode: ``"fork"``: children are forks with everything imported; ``"spawn"``: fresh interpreters.
        run_dir: folder to remove at the end.
        payload_fd: descriptor of the pickled ``(target, payload)``, inherited.
        preload: modules to import before the first fork.
        surroundings: of the host.
        host: its pid.
        late: whether the zygote was there before; then three descriptors come with the message: of its log, of the
            current folder, and of a stored `Since`.
    """

    mode: Literal["fork", "spawn"]
    run_dir: str
    payload_fd: int
    preload: tuple[str, ...]
    surroundings: Surroundings
    host: int
    late: bool = False


@dataclass(frozen=True, slots=True)
class Fork:
    """Start a child. `serial` names it from now on, `log` is the path of its output, `args` are pickled."""

    serial: int
    name: str
    log: str
    args: bytes


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a signal to a child; to its whole group, if it is SIGKILL."""

    serial: int
    signum: int


@dataclass(frozen=True, slots=True)
class End:
    """End all children, SIGHUP first and SIGKILL after `grace` seconds, then the zygote."""

    grace: float


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything is imported, which took `seconds`; `n_threads` is 1 unless an import started some."""

    pid: int
    n_threads: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Started:
    """A child was forked."""

    serial: int
    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class Warned:
    """A child warned of something, and goes on: category and text, in one line."""

    serial: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A child is gone.

    Attributes:
        pid: its process; None if it was never started.
        code: exit status; None if a signal ended it, or nobody knows.
        signal: that signal; None otherwise.
        traceback: of the exception that ended it, with its name; or why it could not be started; or empty.
    """

    serial: int
    pid: int | None
    name: str
    code: int | None
    signal: int | None
    traceback: str


def frame(message: object) -> bytes:
    """The message as it travels."""
    body = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Puts messages together again from the bytes of a stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield pickle.loads(body)


def nameless() -> int:
    """A descriptor of nameless memory; where there is no memfd: of a nameless file."""
    if sys.platform == "linux" and hasattr(os, "memfd_create"):
        return os.memfd_create("zrl-payload")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def fill(fd: int, data: bytes) -> None:
    """Put `data` there, for those who have the descriptor too."""
    with open(fd, "wb", closefd=False) as file:
        file.write(data)


def store(data: bytes) -> int:
    """A descriptor of something `nameless` that holds `data`, for children."""
    fd = nameless()
    try:
        fill(fd, data)
    except BaseException:
        os.close(fd)
        raise
    return fd


def stored(fd: int) -> Any:
    """What `store` stored there, unpickled; the descriptor's position is left alone, because siblings share it."""
    chunks, at = [], 0
    while chunk := os.pread(fd, 1 << 24, at):
        chunks.append(chunk)
        at += len(chunk)
    return pickle.loads(b"".join(chunks))
