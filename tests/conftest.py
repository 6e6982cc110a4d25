"""What holds for every test: one torch thread, no window system, temporary files in one place, and nothing left behind.

A test that leaves something behind fails by itself, in its clean-up, and the message names what it left; the tests
after it start from what they find. The check costs about 2 ms a test.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import hypothesis
import pytest
import torch
import uvloop

LINUX = sys.platform == "linux"
GRACE = 1.0  # seconds for what is about to end: a thread past its last line, a child that was told to go

#: What libraries open once, at first use, and keep.
KEPT_OPEN = ("/dev/urandom", "/dev/random", "/dev/nvidia", "/sys/")

# A time limit for one example says more about the machine than about the code; pytest-timeout bounds the whole.
hypothesis.settings.register_profile("zrl", deadline=None)
hypothesis.settings.load_profile("zrl")


#: Temporary files of the tests and of the processes that they start; a short path, for sockets.
#: Beside that of the process that started this one, where the tests run in several.
TEMPORARY = Path(tempfile.mkdtemp(prefix="zt-", dir=os.environ.setdefault("ZT_TMPDIR", tempfile.gettempdir())))
os.environ["TMPDIR"] = tempfile.tempdir = str(TEMPORARY)
os.environ.pop("XDG_RUNTIME_DIR", None)  # where folders of runs would be


def pytest_sessionfinish() -> None:
    shutil.rmtree(TEMPORARY, ignore_errors=True)


def pytest_sessionstart() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background by a shell; processes inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    uvloop.new_event_loop().close()  # libuv opens a pipe at first use and keeps it: nobody's leak
    if LINUX:
        resource_tracker.ensure_running()  # multiprocessing starts it at first use and keeps it: nobody's leak


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail the test after which a child, a thread, a descriptor or shared memory of ours is left."""
    before = held()
    yield
    left = what_is_left(before)
    for kind, thing in left:
        if kind == "child process":
            end(thing)
    if left:
        pytest.fail("the test left behind:\n" + "\n".join(f"  {line}" for line in left.values()), pytrace=False)


Held = dict[tuple[str, Hashable], str]  # (kind, identity) -> what to call it in a message


def held() -> Held:
    """All that this process holds now and a test could leave behind."""
    threads: Held = {
        ("thread", thread): f"thread {thread.name!r} (daemon={thread.daemon})" for thread in threading.enumerate()
    }
    everywhere = threads | folders()
    return everywhere | children() | descriptors() | segments() | mappings() if LINUX else everywhere


def what_is_left(before: Held) -> Held:
    """What is held beyond `before`, also after a garbage collection and a moment of grace."""

    def new() -> Held:
        return {key: name for key, name in held().items() if key not in before}

    if not new():
        return {}
    gc.collect()
    deadline = time.monotonic() + GRACE
    while (left := new()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def children() -> Held:
    """Children of this process, zombies too."""
    found: Held = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            for pid in (task / "children").read_text().split():
                found["child process", int(pid)] = f"child process {pid}: {command_line(pid)}"
    return found


def command_line(pid: str) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return words[:200] or "ended, but nobody waited for it"
    return "?"


def descriptors() -> Held:
    found: Held = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed the folder
            target = os.readlink(f"/proc/self/fd/{fd}")
            # fonts that matplotlib keeps; memory that `multiprocessing`, so an AsyncVectorEnv, keeps for the next one
            if not target.startswith(KEPT_OPEN) and not target.endswith(".ttf") and "/pym-" not in target:
                found["descriptor", (fd, target)] = f"descriptor {fd}: {target}"
    return found


def folders() -> Held:
    """Folders of a run, with its socket. Logs that an error names stay on purpose."""
    found = (path for path in TEMPORARY.glob("zrl-*") if not path.name.startswith("zrl-logs-"))
    return {("folder", path): f"folder {path}" for path in found}


def segments() -> Held:
    """Files in /dev/shm with a name of ours, or made by this process through torch."""
    ours = ("zrl", f"torch_{os.getpid()}_")
    return {("segment", name): f"segment /dev/shm/{name}" for name in os.listdir("/dev/shm") if name.startswith(ours)}


def mappings() -> Held:
    """Rings and boards that are still mapped: closing their descriptor does not unmap them."""
    maps = Path("/proc/self/maps").read_bytes()
    if b"memfd:zrl" not in maps:
        return {}
    lines = (line.decode() for line in maps.splitlines() if b"memfd:zrl" in line)
    return {("mapping", line.split()[0]): f"mapping {line}" for line in lines}


def end(pid: Hashable) -> None:
    """Kill and reap a child that was left behind, so that it cannot disturb or outlive the rest of the run."""
    assert isinstance(pid, int)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
