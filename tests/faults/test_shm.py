"""A machine with next to no /dev/shm, as containers have it: nothing of ours lies there. And addresses of memory whose
process is another by now."""

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
        slow = [line for line in errors.splitlines() if line.startswith("starved: no batch for ")]  # a busy machine
        assert (process.returncode, output, errors.splitlines()) == (0, "done []\n", slow)


RING = """
import dataclasses, json, sys
from zrl.data.ring import Ring
ring = Ring.create(100, 2, run_id=bytes(16), incarnation=16 * sys.argv[1].encode(), digest=bytes(16))
print(json.dumps(dataclasses.asdict(ring.address)), flush=True)
sys.stdin.read()
"""

REUSED = """
import json, subprocess, sys
from zrl.data.memory import MemoryAddress
from zrl.data.ring import Ring
from zrl.errors import SharedMemoryError
RING = sys.argv[1]

def owner(who):
    process = subprocess.Popen([sys.executable, "-c", RING, who], stdin=-1, stdout=-1)
    return process, MemoryAddress(**json.loads(process.stdout.readline()))

def attach(who):
    ids = dict(run_id=bytes(16), incarnation=16 * who, digest=bytes(16))
    Ring.attach(address, **ids, slot_nbytes=100, n_slots=2, max_nbytes=1 << 20).close()

first, address = owner("a")
attach(b"a")
first.kill()
first.wait()
with open("/proc/sys/kernel/ns_last_pid", "w") as f:
    f.write(str(first.pid - 1))
second, again = owner("b")
assert again == address, (again, address)  # the same numbers, of another process
try:
    attach(b"a")
except SharedMemoryError as error:
    print(error)
attach(b"b")
second.kill()
second.wait()
"""
OTHER_PIDS = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def may_choose_pids() -> bool:
    words = [*OTHER_PIDS, "sh", "-c", "echo 100 > /proc/sys/kernel/ns_last_pid"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


def test_a_pid_that_is_another_process_by_now(tmp_path: Path) -> None:
    """With a ring of the same size at the same descriptor: what tells is the incarnation in its header."""
    if not may_choose_pids():
        pytest.skip("needs the right to make pid namespaces, and a kernel that lets us choose pids")
    with script(REUSED, RING, folder=tmp_path, command=OTHER_PIDS) as process:
        output, errors = process.communicate(timeout=PATIENCE)
        expected = f"ring: incarnation: expected {(16 * b'a').hex()}, found {(16 * b'b').hex()}\n"
        assert (process.returncode, output, errors) == (0, expected, "")
