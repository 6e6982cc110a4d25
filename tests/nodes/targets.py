"""What the children of the tests run. Imported by name in the children, so nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any


def end(_: object, code: int) -> None:
    raise SystemExit(code)


def end_with_message(_: object) -> None:
    sys.exit("no such thing")


def end_at_once(_: object, code: int) -> None:
    os._exit(code)


def fail(_: object, text: str) -> None:
    raise ValueError(text)


def warn_and_fail(_: object) -> None:
    warnings.warn("mind\nthis: é", stacklevel=1)
    warnings.warn("x" * 5000, stacklevel=1)
    raise ValueError("the reason")


def fail_with_cause(_: object) -> None:
    try:
        dict[str, int]()["key"]
    except KeyError as error:
        raise RuntimeError("consequence") from error


def crash(_: object) -> None:
    ctypes.string_at(0)


def write(payload: object, path: str, *more: object) -> None:
    """The payload and the arguments, as a sign of life; whole or not at all."""
    with open(f"{path}.part", "w") as file:
        file.write(repr((payload, *more)))
    os.rename(f"{path}.part", path)


def write_result(payload: Any, path: str) -> None:
    write(payload(), path)


def hang(_: object, path: str = "") -> None:
    if path:
        write(None, path)
    while True:
        signal.pause()


def idle(_: object, job: object) -> None:
    hang(None)


def hang_without_ears(_: object, path: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hang(None, path)


def describe_self(_: object, path: str) -> None:
    """What a child is made of: its descriptors, signals, threads, group, parent, program and arguments."""
    import torch

    write(
        None,
        path,
        {
            "fds": sorted(
                (int(fd), os.readlink(f"/proc/self/fd/{fd}"))
                for fd in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{fd}")
            ),
            "sigint": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
            "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "threads": threading.active_count(),
            "torch_threads": torch.get_num_threads(),
            "leads_group": os.getpgid(0) == os.getpid(),
            "main": sorted(name for name in vars(sys.modules["__main__"]) if not name.startswith("__")),
            "pythonpath": os.environ.get("PYTHONPATH"),
            "argv": sys.argv,
        },
    )
    hang(None)


def have_children(_: object, path: str, *, ignore: bool = False) -> None:
    """One grandchild by fork, one by exec; then wait."""
    pid = os.fork()
    if pid == 0:
        if ignore:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hang(None)
    other = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    write(None, path, [pid, other.pid])
    hang(None)


def have_children_and_fail(_: object, path: str) -> None:
    pid = os.fork()
    if pid == 0:
        hang(None)
    write(None, path, [pid])
    raise ValueError("with a grandchild left")


def vector_env(_: object, path: str) -> None:
    import gymnasium

    envs = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="async")
    with contextlib.closing(envs):
        observations, _info = envs.reset(seed=1)
        write(None, path, observations.shape)


def say_when(_: object, path: str) -> None:
    write(None, path, time.monotonic())


def deep_wait(_: object, path: str) -> None:
    def where_it_hangs() -> None:
        hang(None, path)

    where_it_hangs()


def host(run_dir: str, log_dir: str, mode: str, n: int, out: str) -> None:
    """A host with `n` children that hang; tells the pids, and waits to be killed."""
    from zrl.nodes.children import Spawner, Zygote

    kind = Zygote if mode == "fork" else Spawner
    zygote = kind.start("tests.nodes.targets:hang", None, run_dir=Path(run_dir), log_dir=Path(log_dir))
    ready = [f"{run_dir}/up-{i}" for i in range(n)]
    children = [zygote.fork(f"worker-{i}", (ready[i],)) for i in range(n)]
    while not all(os.path.exists(path) for path in ready):
        zygote.wait_event(0.05)
    write(None, out, [zygote.process.pid, *(child.pid for child in children)])
    signal.pause()


if __name__ == "__main__":
    host(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
