"""The guard against leaks catches each kind of leak, names it, and lets clean tests pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TESTS = """
import mmap, os, subprocess, sys, tempfile, threading
from multiprocessing import get_context
from pathlib import Path

kept = []
idle = threading.Event()

def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "the-sleeper"])

def memfd():
    fd = os.memfd_create("zrl-guard")
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd

def test_leaks_process():
    kept.append(sleeper())

def test_leaks_zombie():
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def test_leaks_daemon_thread():
    threading.Thread(target=idle.wait, name="the-daemon", daemon=True).start()

def test_leaks_plain_thread():
    threading.Thread(target=idle.wait, name="the-plain-one").start()

def test_leaks_descriptor():
    kept.append(os.pipe())

def test_leaks_memfd():
    kept.append(memfd())

def test_leaks_mapping():
    fd = memfd()
    kept.append(mmap.mmap(fd, mmap.PAGESIZE, trackfd=False) if sys.version_info >= (3, 13) else mapped_only(fd))
    os.close(fd)

def mapped_only(fd):
    import ctypes
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(mmap.PAGESIZE)
    return libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))

def test_leaks_folder():
    tempfile.mkdtemp(prefix="zrl-")

def test_clean_logs_that_stay():
    tempfile.mkdtemp(prefix="zrl-logs-")

def test_leaks_segment():
    Path(f"/dev/shm/zrl-guard-{os.getpid()}").touch()

def test_clean_uses_all_of_it():
    before = threading.active_count()
    child = sleeper()
    child.kill()
    child.wait()
    thread = threading.Thread(target=lambda: None)
    thread.start()
    fd = memfd()
    mmap.mmap(fd, mmap.PAGESIZE).close()
    os.close(fd)

def test_clean_just_ending():
    child = sleeper()
    child.terminate()
    threading.Thread(target=child.wait).start()
    threading.Timer(0.05, lambda: None).start()

def test_clean_cycle():
    class Owner:
        def __init__(self):
            self.me, (self.a, self.b) = self, os.pipe()
        def __del__(self):
            os.close(self.a)
            os.close(self.b)
    Owner()

def test_clean_multiprocessing():
    process = get_context("spawn").Process(target=print)
    process.start()
    process.join()
    process.close()

def test_clean_end():
    idle.set()
    Path(f"/dev/shm/zrl-guard-{os.getpid()}").unlink()
"""

LEAKS = {
    "process": "child process *the-sleeper*",
    "zombie": "child process *nobody waited for it*",
    "daemon_thread": "thread 'the-daemon' (daemon=True)",
    "plain_thread": "thread 'the-plain-one' (daemon=False)",
    "descriptor": "descriptor *: pipe:*",
    "memfd": "descriptor *: /memfd:zrl-guard*",
    "mapping": "mapping *memfd:zrl-guard*",
    "folder": "folder *zrl-*",
    "segment": "segment /dev/shm/zrl-guard-*",
}


def test_each_leak_fails_the_test_that_leaked(pytester: pytest.Pytester) -> None:
    guard = Path(__file__).with_name("conftest.py").read_text()
    assert "GRACE = 1.0" in guard
    pytester.makeconftest(guard.replace("GRACE = 1.0", "GRACE = 0.3"))  # it is waited out once a leak
    pytester.makepyfile(test_it=TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    n_clean = TESTS.count("def test_clean_")
    result.assert_outcomes(passed=n_clean + len(LEAKS), errors=len(LEAKS))
    for leak, message in LEAKS.items():
        result.stdout.fnmatch_lines([f"*ERROR at teardown of test_leaks_{leak} *", "*left behind:*", f"*{message}"])
