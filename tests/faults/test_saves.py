"""Checkpoints of whoever is killed while it saves, and disks on which nothing can be saved."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.world import line, needs_linux, script
from tests.system.programs import DEADLINE, ROOT, ZRL
from zrl.train import checkpoint

pytestmark = needs_linux

#: Forks a process that saves without end, and kills it after as many seconds as it reads.
SAVES = """
import os
import signal
import sys
import time
from pathlib import Path

import torch

from zrl.train import checkpoint

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def save() -> None:
    step = max((int(path.stem[5:]) for path in folder.glob("step_*.pt")), default=0)
    while True:
        step += 1
        weights = {"w": torch.full((20_000,), float(step)), "stamp": torch.tensor(step)}
        saved = checkpoint.save(folder, step, {"weights": weights, "step": step})
        if step % 3 == 0:
            checkpoint.name_it(checkpoint.BEST, saved)
        checkpoint.prune(folder, 3)


print("ready", flush=True)
for words in sys.stdin:
    pid = os.fork()
    if pid == 0:
        save()
    time.sleep(float(words))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("killed", flush=True)
"""


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


@pytest.mark.parametrize("n", [8, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(300)])])
def test_killed_while_it_saves(tmp_path: Path, n: int) -> None:
    """At any moment: the newest is whole, nothing goes back, the links lead to something."""
    rng = random.Random(n)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    before = cut_off = 0
    with script(SAVES, folder, folder=tmp_path) as process:
        assert line(process) == "ready"
        assert process.stdin is not None
        for _ in range(n):
            # the first one waits for the disk's first answer
            print(rng.uniform(0.0, 0.05) + (0.0 if before else 0.3), file=process.stdin, flush=True)
            assert line(process) == "killed"
            skipped: list[str] = []
            path, state = checkpoint.newest(folder, skipped=skipped)
            assert not skipped
            assert step_of(path) == state["step"] == int(state["weights"]["stamp"]) >= before
            assert (state["weights"]["w"] == state["step"]).all()
            assert state["step"] - 1 <= step_of((folder / checkpoint.LATEST).resolve(strict=True)) <= state["step"]
            if (folder / checkpoint.BEST).is_symlink():
                best = (folder / checkpoint.BEST).resolve(strict=True)
                assert checkpoint.load(best)["step"] == step_of(best)
            before = state["step"]
            cut_off += bool(list(folder.glob(".*.part")))
    assert before > n
    if n >= 100:
        assert cut_off > n // 10, "too few kills met a save"
    checkpoint.save(folder, before + 1, state)
    checkpoint.prune(folder, 1)
    assert not list(folder.glob(".*.part")), "what saves that were cut off have left"


# ── a run whose disk does not take a checkpoint ──────────────────────────────────────────────────────────────────────


def mounts_here() -> bool:
    """Whether there can be mounts that nobody else sees."""
    if not shutil.which("unshare") or os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError):
        words = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(words, capture_output=True, timeout=DEADLINE, check=False).returncode == 0
    return False


#: A run of some checkpoints, and then the disk is full.
FULL = """
mount -t tmpfs -o size=512k none runs
"$@"
code=$?
cp -a runs/. kept
exit $code
"""

#: After the first checkpoint, the folder of checkpoints is read-only.
READ_ONLY = """
"$@" &
while [ ! -e runs/*/checkpoints/best ]; do
    kill -0 $! || exit 99
    sleep 0.01
done
cd runs/*/checkpoints
mount --bind . . && mount -o remount,bind,ro . || exit 98
wait $!
code=$?
cd ../../..
cp -a runs/. kept
exit $code
"""


@pytest.mark.skipif(not mounts_here(), reason="mounts need root")
@pytest.mark.parametrize(
    ("how", "why"),
    [
        pytest.param(FULL, "is the disk full?", id="full"),
        pytest.param(READ_ONLY, "Read-only file system", id="read-only", marks=pytest.mark.long),
    ],
)
def test_a_disk_that_takes_no_checkpoint(tmp_path: Path, how: str, why: str) -> None:
    """The run ends with 1 and says so in one line; the checkpoints before it are whole, and it can be resumed."""
    for name in ("runs", "kept"):
        (tmp_path / name).mkdir()
    small = "--algo a2c --n-steps 8 --envs 4 --workers 0 --seed 1 --eval-episodes 0 --keep 1000 --runs runs"
    words = [*ZRL, "train", "CartPole-v1", *small.split(), "--steps", "100M", "--checkpoint-every", "320"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", how, "sh", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("Error: cannot write the checkpoint"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert why in done.stderr
    assert ("is the disk full?" in done.stderr) == (how is FULL)
    (run,) = (tmp_path / "kept").iterdir()
    saved = sorted((run / "checkpoints").glob("step_*.pt"))
    assert [checkpoint.load(path)["step"] for path in saved] == [step_of(path) for path in saved]
    assert (run / "checkpoints" / "latest").resolve(strict=True) == saved[-1].resolve()
    assert not list((run / "checkpoints").glob(".*"))
    assert json.loads((run / "status.json").read_text())["outcome"] == "failed"
