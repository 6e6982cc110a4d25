"""Commands of a cluster, run on this machine: what they need, and how to see that nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from zrl.net.keys import authorize, new_pair

ROOT = Path(__file__).parents[2]
DEADLINE = 90.0  # seconds for anything at all
MARK = "ZRL_LAUNCH_TEST"  # in the environment of everything that a test starts
SMALL = ["CartPole-v1", "--algo", "a2c", "--n-steps", "8", "--envs", "4", "--seed", "1", "--eval-episodes", "0"]


def keys_in(folder: Path) -> Path:
    """The folder of keys, as docs/launch.md has it made."""
    server, hosts = new_pair(folder, "server"), new_pair(folder, "hosts")
    authorize(folder, "hosts", hosts)
    assert server
    return folder


def command(path: Path, text: str) -> None:
    """A shell script that can be called by its name."""
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    """For commands: with `zrl` and whatever else is in `folder`/bin first, and a mark."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    command(bin_folder / "zrl", f'exec "{sys.executable}" -m zrl "$@"\n')
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ZRL_", "SLURM_", "RAY_"))},
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        MARK: str(folder),
    }


def marked(folder: Path) -> dict[int, str]:
    """Processes of a test that are left, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(path.name)] = words
    return {pid: words for pid, words in found.items() if words and pid != os.getpid()}


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Fail if a marked process outlives the block; kill whatever does, come what may."""
    try:
        yield
        until(lambda: not marked(folder), lambda: f"still running: {marked(folder)}")
    finally:
        for pid in marked(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not marked(folder), lambda: f"cannot be killed: {marked(folder)}")


def until(done: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def updates(runs: Path) -> int:
    """Lines of metrics in all run folders."""
    return sum(len(file.read_text().splitlines()) for file in runs.glob("*/metrics.jsonl"))


def checkpoints(runs: Path) -> list[int]:
    """Steps of all checkpoints, in order."""
    return sorted(int(file.stem.removeprefix("step_")) for file in runs.glob("*/checkpoints/step_*.pt"))


def free_port() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port


def tool(name: str) -> str | None:
    """A program of the environment that the tests run in, or of the system."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
