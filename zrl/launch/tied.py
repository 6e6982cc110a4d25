"""A ``zrl`` command as a child that the kernel kills when its parent ends, however that ends.

    parent ─► python -m zrl.launch.tied PARENT COMMAND… ─► asks for SIGKILL at its parent's death ─► exec COMMAND

The child asks for it itself, before it becomes the command: nothing of ours then runs between fork and exec in a parent
with threads of other libraries.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from zrl.errors import ProcessError

_PR_SET_PDEATHSIG = 1


def start(words: Sequence[str], folder: str | None = None) -> subprocess.Popen[bytes]:
    """``zrl WORDS`` as a child, in a process group of its own: Ctrl-C in the terminal is its parent's business.

    Args:
        words: of the command.
        folder: where to run it; None: here.

    Raises:
        ProcessError: not called by the main thread: it is that thread's end which the kernel means by a parent's.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ProcessError("a tied process must be started by the main thread")
    command = [sys.executable, "-m", "zrl", *words]
    tied = [sys.executable, "-m", "zrl.launch.tied", str(os.getpid())]
    return subprocess.Popen([*tied, *command], stdin=subprocess.DEVNULL, cwd=folder, process_group=0)


def status(child: subprocess.Popen[bytes]) -> int | None:
    """Its exit status, as a shell has it; None while it runs."""
    code = child.poll()
    return 128 - code if code is not None and code < 0 else code


def stop(child: subprocess.Popen[bytes], grace: float) -> int:
    """SIGTERM, once, if it has not ended; after `grace` seconds SIGKILL. Its exit status."""
    if child.poll() is None:
        child.terminate()
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    code = status(child)
    assert code is not None
    return code


def become(parent: int, command: Sequence[str]) -> NoReturn:
    """Tie this process to its parent, and become `command`; ends with 1 if another process is its parent by now."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(command[0], list(command))


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
