"""Too little of what the system gives: the error says what there is too little of, and nothing hangs or aborts."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.faults.world import PATIENCE, ROOT, StampEnv, needs_linux
from tests.toys import StepResult
from zrl.nodes.limits import kills_for_memory

pytestmark = needs_linux

FEW_FILES = """
import sys
from tests.faults.world import rolling, stamps
import resource
n, workers = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))
if __name__ == "__main__":
    with rolling(stamps(), n=workers, p=workers) as it:
        it.wait_for_workers(workers)
        for _ in range(3):
            next(it)
        print("ok", it.stats()["workers"], it.stats()["losses"])
"""


@pytest.mark.parametrize(
    ("files", "workers", "says"),
    [
        (96, 2, "ok 2 {}"),
        (64, 16, "ConfigError: 16 workers take up to "),
        (16, 2, "ConfigError: 2 workers take up to "),
    ],
)
def test_few_open_files(files: int, workers: int, says: str) -> None:
    words = [sys.executable, "-c", FEW_FILES, str(files), str(workers)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert says in done.stdout + done.stderr, done.stderr
    assert done.returncode == (0 if says.startswith("ok") else 1)
    if done.returncode:
        assert f"this process may have {files}: raise the limit (ulimit -n " in done.stderr


def test_a_host_with_few_open_files() -> None:
    words = [sys.executable, "-m", "zrl", "worker", "--connect", "ipc:///nowhere/l", "--count", "64"]

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False, preexec_fn=few
    )
    assert done.returncode == 2
    assert "64 workers take up to " in done.stderr


LEAK = """
import sys
from tests.faults.test_limits import Leaking, enter
from tests.faults.world import rolling

if __name__ == "__main__":
    enter(sys.argv[1])
    try:
        with rolling(Leaking, n=1, p=1, k=2) as it:
            while True:
                next(it)
    except Exception as error:
        print(type(error).__name__, error)
"""


class Leaking(StampEnv):
    """Takes 20 MB with every step, and keeps it."""

    def step(self, action: Any) -> StepResult:
        self.kept = [*getattr(self, "kept", []), np.ones(20 << 20, np.uint8)]
        return super().step(action)


def enter(group: str) -> None:
    """Go into this control group."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def group() -> Iterator[str]:
    """A control group that may take 1.5 GB."""
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory").is_dir()
    path = (root / "memory" if v1 else root) / f"zrl-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no control groups here: {error}")
    try:
        try:
            (path / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(1536 << 20))
        except OSError as error:
            pytest.skip(f"no limits of control groups here: {error}")
        yield str(path)
    finally:
        deadline = time.monotonic() + PATIENCE
        while path.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # until the last process is gone
                path.rmdir()
            time.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.long
def test_an_environment_that_leaks_is_killed_and_named(group: str) -> None:
    """By the kernel, again and again, until the budget is spent."""
    words = [sys.executable, "-c", LEAK, group]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert "WorkerError" in done.stdout, done.stdout + done.stderr
    assert "the kernel killed it, since its control group (container, job) was out of memory" in done.stdout


LARGE = """
import sys
from tests.faults.test_limits import Wide, enter
from tests.faults.world import rolling

if __name__ == "__main__":
    enter(sys.argv[1])
    try:
        with rolling(Wide, n=1, p=1, k=40) as it:
            next(it)
    except Exception as error:
        print(type(error).__name__, error)
"""


class Wide(StampEnv):
    """Has observations of 8 MB: a fragment of world's size takes 80."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (8 << 20,), np.uint8)

    def observe(self) -> Any:
        return np.zeros(8 << 20, np.uint8)


@pytest.mark.long
def test_a_control_group_that_is_too_small_for_the_rings(group: str) -> None:
    """The one that wants them is told so: nobody is killed for touching what was promised."""
    words = [sys.executable, "-c", LARGE, group]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "WorkerError" in done.stdout, done.stdout + done.stderr
    assert "bytes of shared memory: ENOMEM" in done.stdout
    assert "bytes are available" in done.stdout


def test_kills_are_counted_in_either_version(tmp_path: Path) -> None:
    own, groups = tmp_path / "self", tmp_path / "groups"
    own.mkdir()
    (groups / "memory" / "a").mkdir(parents=True)
    (groups / "b").mkdir()
    assert kills_for_memory(str(tmp_path), str(groups)) == 0
    (groups / "memory" / "a" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (groups / "b" / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 5\noom_group_kill 0\n")
    (own / "cgroup").write_text("9:name=systemd:/\n4:memory:/a\n0::/\n")
    assert kills_for_memory(str(tmp_path), str(groups)) == 3
    (own / "cgroup").write_text("0::/b\n")
    assert kills_for_memory(str(tmp_path), str(groups)) == 5
