"""A child, from the moment it exists until it ends: it cuts what ties it to the zygote, then runs its target.

    fork:   settle ─► work                  spawn:   settle ─► exec of a fresh interpreter ─► resume ─► work

`settle` leaves the child with its log as output, one pipe for warnings and a traceback, and no descriptor of anybody
else's. It dies with its zygote, which dies with the host. Ctrl-C in the terminal is the learner's business: SIGINT is
ignored, and the child leads a process group of its own, so that its own children (an AsyncVectorEnv's) can be ended
with it. SIGHUP ends it: its zygote sends that. SIGTERM does, too, unless the target has a milder use for it. SIGUSR1
writes all stacks into its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NoReturn, TextIO

from zrl.nodes.pipe import MAX_TRACEBACK, MAX_WARNING, MAX_WARNINGS, WARNING, Surroundings, store, stored

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # before the fork: loading it afterwards is time in every child


@dataclass(frozen=True, slots=True)
class Job:
    """What a child is to do.

    Attributes:
        name: for messages, such as ``worker-3``.
        log: path of its output.
        args: pickled tuple of the arguments after the payload.
        payload_fd: descriptor of the pickled ``(target, payload)``.
        error_fd: where warnings go, and at last a traceback.
        life_fd: end of file there means that the zygote is gone; needed where the kernel does not kill us then.
        zygote: pid of the parent.
    """

    name: str
    log: str
    args: bytes
    payload_fd: int
    error_fd: int
    life_fd: int
    zygote: int

    @property
    def descriptors(self) -> set[int]:
        """Those that are the child's own."""
        return {self.payload_fd, self.error_fd, self.life_fd}


def run_forked(job: Job) -> NoReturn:
    """The life of a forked child. All signals are blocked when it begins."""
    _end_with(job, lambda: settle(job, ()), lambda: work(job))


def run_spawned(job: Job, surroundings: Surroundings) -> NoReturn:
    """The same in a fresh interpreter."""
    _end_with(job, lambda: settle(job, (signal.SIGUSR1,)), lambda: _execute(job, surroundings))


def resume(fd: int) -> NoReturn:
    """The second half of a spawned child, in the fresh interpreter: what to do is stored at `fd`."""
    job, surroundings = stored(fd)
    os.close(fd)
    for own in job.descriptors:
        os.set_inheritable(own, False)
    _end_with(job, surroundings.apply, lambda: _listen(job, ()), lambda: work(job))


def _execute(job: Job, surroundings: Surroundings) -> NoReturn:
    fd = store(pickle.dumps((job, surroundings)))
    for own in (fd, *job.descriptors):
        os.set_inheritable(own, True)
    command, environment = surroundings.command("--one", str(fd))
    os.execve(command[0], command, environment)


def _end_with(job: Job, *steps: Callable[[], object]) -> NoReturn:
    """Run them, send the traceback if there is one, and end here and now, whatever stands further up the stack."""
    code = 1
    try:
        for step in steps:
            step()
        code = 0
    except SystemExit as end:
        code, message = _status(end)
        if message:
            _report(job, message)
    except BaseException as error:
        _report(job, "".join(traceback.format_exception(error)))
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)  # no clean-up of the zygote's, whose copy we are


def _status(end: SystemExit) -> tuple[int, str]:
    """Exit status of ``sys.exit(…)``, and its message, as the interpreter would have it."""
    if end.code is None:
        return 0, ""
    if isinstance(end.code, int):
        return end.code & 0xFF, ""
    return 1, str(end.code)


def _report(job: Job, text: str) -> None:
    """Into the log, and to the host: the end of it, if it is too long."""
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr, flush=True)
    head = f"{job.name} (pid {os.getpid()}):\n".encode()
    body = text.encode(errors="backslashreplace")
    room = MAX_TRACEBACK - len(head)
    if len(body) > room:
        cut = b"[...]\n"
        body = cut + body[len(cut) - room :]
    rest = memoryview(head + body)
    with contextlib.suppress(OSError):  # no zygote, nobody to tell
        while rest:
            rest = rest[os.write(job.error_fd, rest) :]


def work(job: Job) -> None:
    """Load the target and the payload, and call it."""
    import torch

    torch.set_num_threads(1)
    _pass_warnings_on(job.error_fd)
    # What the user's code finds as __main__ is empty: it must not be our program, and the user's own is not here.
    # multiprocessing's "spawn" and "forkserver", should an environment use them, then have nothing to import again.
    sys.modules["__main__"] = types.ModuleType("__main__")
    target, payload = stored(job.payload_fd)
    os.close(job.payload_fd)
    args = pickle.loads(job.args)
    if isinstance(target, str):
        module, _, function = target.partition(":")
        target = getattr(importlib.import_module(module), function)
    target(payload, *args)


def _pass_warnings_on(fd: int) -> None:
    """Python's warnings go into the log as ever, and to the host as well: who reads the log of a worker that works?

    Each text once, and at most `MAX_WARNINGS` of them: some carry a number that is another one at each step.
    """
    show = warnings.showwarning
    told: set[str] = set()

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        show(message, category, filename, lineno, file, line)
        text = " ".join(f"{category.__name__}: {message}".split())
        if text in told or len(told) == MAX_WARNINGS:
            return
        told.add(text)
        with contextlib.suppress(OSError):  # no zygote, nobody to tell
            os.write(fd, WARNING + text.encode(errors="backslashreplace")[:MAX_WARNING] + b"\n")

    warnings.showwarning = showwarning


# ── settling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def settle(job: Job, still_blocked: Collection[signal.Signals]) -> None:
    """Become a process of its own. Signals are let in at the end, but for those in `still_blocked`."""
    with contextlib.suppress(PermissionError):  # it is one already: the zygote does the same, whoever comes first
        os.setpgid(0, 0)
    _die_with(job)
    _write_to(job.log)
    _close_all_but(job.descriptors | {0, 1, 2})
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    _listen(job, still_blocked)


def _listen(job: Job, still_blocked: Collection[signal.Signals]) -> None:
    """Stack dumps on SIGUSR1 and at a crash; then let signals in."""
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    if sys.platform != "linux":
        _watch(job.life_fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, still_blocked)


def _die_with(job: Job) -> None:
    """Have the kernel kill this process when the zygote ends. A zygote that ended before we asked is noticed here."""
    if sys.platform == "linux" and _LIBC.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != job.zygote:
        os._exit(1)


def _watch(life_fd: int) -> None:
    """For systems without PR_SET_PDEATHSIG: a thread that waits for the zygote's end. Not seen by a stopped process."""

    def wait() -> None:
        os.read(life_fd, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="zrl-life", daemon=True).start()


def _write_to(log: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(line_buffering=True)


def _close_all_but(kept: Collection[int]) -> None:
    for fd in map(int, os.listdir("/dev/fd")):
        if fd not in kept:
            with contextlib.suppress(OSError):  # the one that listed the folder
                os.close(fd)
