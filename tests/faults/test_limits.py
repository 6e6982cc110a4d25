"""Too little of what the system gives: the error says what there is too little of, and nothing hangs or aborts."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from tests.faults.world import PATIENCE, ROOT, needs_linux

pytestmark = needs_linux

FEW_FILES = """
import sys
from tests.faults.world import rolling, stamps
import resource
n, workers = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))
if __name__ == "__main__":
    with rolling(stamps(), n=workers, p=workers) as it:
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
