"""A machine with next to no /dev/shm, as containers have it: nothing of ours lies there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.world import PATIENCE, needs_linux, script

pytestmark = needs_linux

TRAIN = """
import os
from zrl.rollout import multi
from tests.faults.world import Ledger, StampEnv
from tests.toys import RandomActor
size = os.statvfs("/dev/shm")
assert size.f_blocks * size.f_frsize == 1 << 20, size
ledger = Ledger()
with multi.rollout(StampEnv, RandomActor(3), 2000, 2, 16, 4, 2) as it:  # fragments of more than 1 MB
    batch = ledger.check(next(it))
    assert it._collator._rings.spec.nbytes > 1 << 20
    ledger.check(next(it))
print("done", os.listdir("/dev/shm"))
"""

UNSHARE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


def test_one_megabyte(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("needs the right to mount")
    with script(TRAIN, folder=tmp_path, command=UNSHARE) as process:
        output, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, output, errors) == (0, "done []\n", "")
