"""``python -m zrl.nodes.zygote FD PID [MODULE]…``: imports what workers need, forks them, tells how each one ends.

    host ──── socketpair ────► zygote ──── fork ────► child          (settles, runs its target: see child.py)
         ◄─ Started … Ended ──   │  ◄── error pipe ────┘
                                 └── SIGCHLD → wake-up pipe

Why a process of its own: a fork of the learner would take a copy of its locks, held by threads that do not exist in the
copy, and of its sockets; a fresh interpreter for each worker costs seconds of imports. The zygote has one thread and no
sockets but one end of a pair. It never unpickles or imports anything of the user's but the modules it is told to.

One loop sleeps in poll() and has nothing to time but the ends that it announced. A child's traceback is read from its
pipe before its end is reported, so that it cannot be overtaken. The loop never blocks on a host that does not read.

When the host closes its end, or dies, all children get SIGHUP, SIGKILL shortly after, the run directory is removed,
and the zygote ends. SIGTERM is not for it: who ends a service or a container sends it to every process, and workers
then finish what they have in hand. In mode "spawn" a forked child becomes a fresh interpreter at once; all else is the
same. One that is launched with modules imports those before it reads anything: its host does not know yet what for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass

from zrl.nodes import child
from zrl.nodes.pipe import (
    MAX_TRACEBACK,
    WARNING,
    End,
    Ended,
    Fork,
    Ready,
    Signal,
    Since,
    Start,
    Started,
    Unframer,
    Warned,
    frame,
    stored,
)

GRACE = 0.5  # seconds between SIGHUP and SIGKILL, when nobody said how long: host and children gone within two
LOOK = 1.0  # seconds between two looks whether a host that has sent nothing yet is still there
FINAL = 1.0  # seconds that a killed process may take to go before we leave it to init


@dataclass
class Kid:
    """A child that lives. `pipe` is the reading end of its error pipe, `error` what came through it."""

    request: Fork
    pid: int
    pipe: int
    error: bytearray


class Zygote:
    """The loop and what it knows. `start` is the first message, `host` the socket that it came through."""

    def __init__(self, start: Start, host: socket.socket, unframer: Unframer) -> None:
        self._start = start
        self._host = host
        self._unframer = unframer
        self._out = bytearray()  # for the host, as soon as it takes it
        self._kids: dict[int, Kid] = {}  # by pid
        self._leftovers: dict[int, float] = {}  # groups whose leader is gone, and when to kill the rest
        self._end_at: float | None = None  # when to kill, once we are told to end
        self._killed = False
        self._selector = selectors.PollSelector()  # epoll would be shared with the children
        self._life = os.pipe()
        wake = _wake_on_signals()
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._signalled(wake))
        host.setblocking(False)
        self._selector.register(host, selectors.EVENT_READ, self._from_host)
        self._watch_host()

    def serve(self) -> None:
        """Until the host says so, or is gone, and all children are gone too."""
        while True:
            self._reap()
            self._enforce(time.monotonic())
            self._flush()
            if self._done():
                return
            for key, _ in self._selector.select(self._patience()):
                key.data()

    # ── the host ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _from_host(self) -> None:
        try:
            data = self._host.recv(1 << 16)
        except BlockingIOError:  # nothing new, but it has room again: the loop flushes
            return
        except OSError:
            data = b""
        if not data:
            self._without_host()
        for message in self._unframer.feed(data):
            self.handle(message)

    def _watch_host(self) -> None:
        """A fork of the host (an environment's worker, a data loader's) keeps the host's end of the pair open after its
        death: so watch the host itself too, where the kernel lets us."""
        host = self._start.host
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a kernel before 5.3, or it is gone
                self._selector.register(os.pidfd_open(host), selectors.EVENT_READ, self._without_host)
        if os.getppid() != host:
            self._without_host()

    def _without_host(self) -> None:
        """It is gone, or has closed its end: nobody is told anything any more."""
        if self._host in (watched := self._selector.get_map()):
            self._selector.unregister(self._host)
        for key in [key for key in watched.values() if key.data == self._without_host]:
            self._selector.unregister(key.fileobj)
        self._out.clear()
        self._end(GRACE)

    def handle(self, message: object) -> None:
        """Do what the host asks for."""
        match message:
            case Fork():
                self._fork(message)
            case Signal(serial, signum):
                for kid in self._kids.values():
                    if kid.request.serial == serial:
                        self._send_signal(kid.pid, signum)
            case End(grace):
                self._end(grace)

    def report(self, message: object) -> None:
        """Tell the host, at the end of this turn of the loop."""
        self._out += frame(message)

    def _flush(self) -> None:
        if self._host not in self._selector.get_map():
            return
        with contextlib.suppress(OSError):  # it takes no more now; or is gone, and then reading says so
            while self._out:
                del self._out[: self._host.send(self._out)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        self._selector.modify(self._host, wanted, self._from_host)

    # ── children ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fork(self, request: Fork) -> None:
        if self._end_at is not None:
            self.report(Ended(request.serial, None, request.name, None, None, "not started: everything is ending"))
            return
        try:
            pipe, error_fd = os.pipe()
        except OSError as error:
            self.report(Ended(request.serial, None, request.name, None, None, f"cannot be started: {error}"))
            return
        zygote = os.getpid()
        # A signal that reaches the child before it has settled must neither be lost nor run a handler of ours.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError as error:
            os.close(pipe)
            self.report(Ended(request.serial, None, request.name, None, None, f"cannot be started: {error}"))
            return
        else:
            if pid == 0:
                self._become(request, error_fd, zygote)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(error_fd)
        with contextlib.suppress(OSError):  # it was faster, or is a fresh interpreter already
            os.setpgid(pid, pid)
        os.set_blocking(pipe, False)
        kid = Kid(request, pid, pipe, bytearray())
        self._kids[pid] = kid
        self._selector.register(pipe, selectors.EVENT_READ, lambda: self._drain(kid))
        self.report(Started(request.serial, pid, request.name))

    def _become(self, request: Fork, error_fd: int, zygote: int) -> None:
        """The child's side. It never returns, so no object of the zygote's is ever collected in the child and closes
        a descriptor whose number has become the child's."""
        s = self._start
        job = child.Job(request.name, request.log, request.args, s.payload_fd, error_fd, self._life[0], zygote)
        if s.mode == "spawn":
            child.run_spawned(job, s.surroundings)
        child.run_forked(job)

    def _drain(self, kid: Kid) -> None:
        """Read what there is of its warnings and its traceback."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(kid.pipe, MAX_TRACEBACK):
                kid.error += data
            self._forget(kid)  # end of file
        while kid.error.startswith(WARNING) and b"\n" in kid.error:
            line, _, kid.error = kid.error.partition(b"\n")
            self.report(Warned(kid.request.serial, line[len(WARNING) :].decode(errors="replace")))

    def _forget(self, kid: Kid) -> None:
        if kid.pipe in self._selector.get_map():
            self._selector.unregister(kid.pipe)

    def _reap(self) -> None:
        """Report every child that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if kid := self._kids.pop(pid, None):
                self._ended(kid, os.waitstatus_to_exitcode(status))

    def _ended(self, kid: Kid, code: int) -> None:
        self._drain(kid)  # all that it wrote is in the pipe by now
        self._forget(kid)  # if grandchildren hold the other end, there was no end of file
        os.close(kid.pipe)
        ended, sig = (code, None) if code >= 0 else (None, -code)
        text = bytes(kid.error[:MAX_TRACEBACK]).decode(errors="replace")
        self.report(Ended(kid.request.serial, kid.pid, kid.request.name, ended, sig, text))
        # Its own children, an AsyncVectorEnv's, end with it. Those that clean up (multiprocessing's resource tracker
        # removes shared memory) get a moment. A group with members keeps its number, so we cannot hit a stranger.
        with contextlib.suppress(OSError):
            os.killpg(kid.pid, signal.SIGTERM)
            self._leftovers[kid.pid] = time.monotonic() + GRACE

    def _send_signal(self, pid: int, signum: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(pid, signum)
        if signum == signal.SIGKILL:
            with contextlib.suppress(OSError):
                os.killpg(pid, signum)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _end(self, grace: float) -> None:
        """Ask all children to end; the second time only the deadline can move, and only forward."""
        end_at = time.monotonic() + grace
        if self._end_at is None:
            for pid in self._kids:
                self._send_signal(pid, signal.SIGHUP)
        self._end_at = end_at if self._end_at is None else min(self._end_at, end_at)

    def _enforce(self, now: float) -> None:
        """Kill what is past its time."""
        if self._end_at is not None and self._end_at <= now and not self._killed:
            self._killed = True
            for pid in self._kids:
                self._send_signal(pid, signal.SIGKILL)
        for group in [group for group, at in self._leftovers.items() if self._killed or at <= now or _gone(group)]:
            del self._leftovers[group]
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)

    def _patience(self) -> float | None:
        """Seconds until there is something to enforce; None: for ever."""
        times = list(self._leftovers.values())
        if self._end_at is not None:
            times.append(self._end_at + FINAL if self._killed else self._end_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _done(self) -> bool:
        if self._end_at is None:
            return False
        return not (self._kids or self._leftovers) or (self._killed and time.monotonic() > self._end_at + FINAL)

    def _signalled(self, fd: int) -> None:
        """A child ended, which the loop looks after, or we are to."""
        if signal.SIGUSR2 in os.read(fd, 1 << 12):
            self._end(GRACE)

    def last_words(self) -> None:
        """What the host has not taken yet."""
        with contextlib.suppress(OSError):
            self._host.settimeout(FINAL)
            self._host.sendall(self._out)


def _gone(group: int) -> bool:
    """Whether a process group has no member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _wake_on_signals() -> int:
    """A descriptor that becomes readable when a child ends, or when we are told to."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in (signal.SIGCHLD, signal.SIGUSR2):
        signal.signal(signum, lambda *_: None)  # without a handler of Python's nothing is written
    return reader


def _first_message(host: socket.socket, unframer: Unframer, pid: int) -> tuple[Start | None, list[object], list[int]]:
    """What the host sends first, what came with it, and which descriptors. None: it has ended, or closed its end."""
    poll, fds = select.poll(), list[int]()
    poll.register(host, select.POLLIN)
    while (readable := poll.poll(LOOK * 1000)) or os.getppid() == pid:
        if not readable:
            continue
        data, more, _, _ = socket.recv_fds(host, 1 << 16, 3)
        if not data:
            break
        fds += more
        if messages := list(unframer.feed(data)):
            return messages[0], messages[1:], fds
    return None, [], fds


def _preload(start: Start) -> Ready:
    """Import what children will need, and put it out of the garbage collector's reach, which would touch every page."""
    begin = time.monotonic()
    if start.mode == "fork":
        for module in start.preload:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()
    n_threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
    if n_threads > 1:
        what = f"{n_threads} threads after importing {', '.join(start.preload)}"
        print(f"{what}: a fork may hang; start_method='spawn' is safe", flush=True)
    return Ready(os.getpid(), n_threads, time.monotonic() - begin)


def _catch_up(log: int, folder: int, since: int) -> None:
    """Be as if we had been launched now. What was printed so far goes into the log, as does what fails from here on."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(log, os.pread(1, 1 << 20, 0))
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.fchdir(folder)
    now: Since = stored(since)
    os.environ.clear()
    os.environ.update(now.environment)
    if now.cores:
        os.sched_setaffinity(0, now.cores)
    for fd in (log, folder, since):
        os.close(fd)


def main() -> None:
    """Until the host's end of the pair closes. Words: the pair's descriptor, the host, what to import at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.argv[1] == "--one":
        child.resume(int(sys.argv[2]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # comes with SIGCONT where we are stopped and the host dies
    host, pid = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    with contextlib.suppress(Exception):  # what fails is imported again, when there is a log to say so
        for module in sys.argv[3:]:
            importlib.import_module(module)
    unframer = Unframer()
    start, more, fds = _first_message(host, unframer, pid)
    if start is None:
        return
    try:
        if start.late:
            _catch_up(*fds)
        for fd in (host.fileno(), start.payload_fd):
            os.set_inheritable(fd, False)
        start.surroundings.apply()
        zygote = Zygote(start, host, unframer)
        zygote.report(_preload(start))
        for message in more:
            zygote.handle(message)
        zygote.serve()
        zygote.last_words()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the host reads our log, which may be in the run directory, and then removes that
    shutil.rmtree(start.run_dir, ignore_errors=True)
    os._exit(0)  # without the interpreter's clean-up: the host waits for us


if __name__ == "__main__":
    from zrl.nodes.zygote import main as imported  # not the copy of this module that is called __main__

    imported()
