"""Learners as processes of their own: killed, interrupted, or simply at their end; nothing of theirs stays."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.world import PATIENCE, alive, descendants, line, needs_linux, script, state, until

pytestmark = needs_linux

# Not guarded by __name__, as in a notebook. Says what phase it is in, in lines; the last word is for the phase.
LEARNER = """
import os, signal, sys, time
import gymnasium, torch
from zrl.rollout import multi
from tests.faults.world import StampEnv
from tests.toys import RandomActor

phase = sys.argv[1]

def make():
    if phase == "start":
        time.sleep(1000)
    return StampEnv(slow=1000 if phase == "first" else 0)

def fork_a_child():
    if os.fork() == 0:
        os.close(1), os.close(2)
        time.sleep(60)  # an environment's worker, a data loader's
        os._exit(0)

it = multi.rollout(make, RandomActor(3), 4, 2, 2, 4, 2, start_method="spawn" if phase == "spawn" else "fork")
host = it._collator._host
while not all(k.child.pid and (phase in ("start", "spawn") or k.page.read().phase) for k in host.kids.values()):
    time.sleep(0.005)
print(it._collator._run_dir, flush=True)
if phase == "exit":
    next(it)
    sys.exit(0)
if phase == "end":
    next(it)
if phase == "forked":
    fork_a_child()
if phase == "close":
    with it:
        next(it)
        close, it._collator._own.zygote.close = it._collator._own.zygote.close, lambda d: (time.sleep(2), close(d))
        print("closing", flush=True)
elif phase not in ("end",):
    print("up", flush=True)
    for batch in it:
        if phase == "loop":
            print("loop", flush=True)
            while True:
                time.sleep(0.01)
"""


def gone(pids: list[int]) -> bool:
    return not any(map(alive, pids))


def all_of(process: subprocess.Popen[str]) -> list[int]:
    """The learner's processes, itself first."""
    return [process.pid, *descendants(process.pid)]


@pytest.mark.parametrize(
    "phase",
    ["start", *(pytest.param(x, marks=pytest.mark.long) for x in ("loop", "first", "spawn")), "forked", "stopped"],
)
def test_kill_9(tmp_path: Path, phase: str) -> None:
    """However it goes, within 2 s: also where a fork of the learner holds all that it had open."""
    with script(LEARNER, "loop" if phase == "stopped" else phase, folder=tmp_path) as process:
        run_dir = Path(line(process))
        assert line(process) == "up"
        if phase == "loop":
            assert line(process) == "loop"
        pids = all_of(process)
        assert len(pids) >= 4
        if phase == "stopped":  # with a worker that cannot hear
            os.kill(pids[-1], signal.SIGSTOP)
            until(lambda: state(pids[-1]) == "T")
        forks = [pid for pid in pids[1:] if phase == "forked" and b"zrl" not in command(pid)]
        process.kill()
        process.wait(PATIENCE)
        assert len(forks) == (phase == "forked")
        try:
            until(lambda: gone([pid for pid in pids if pid not in forks]), 2.0)
            until(lambda: not run_dir.exists(), 2.0)
            assert left_in(tmp_path) == []
        finally:
            for pid in forks:
                os.kill(pid, signal.SIGKILL)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def left_in(folder: Path) -> list[str]:
    """Names of what a learner left where it makes its temporary files; logs that an error names are to stay."""
    return [path.name for path in folder.iterdir() if path.name.startswith("zrl") and "zrl-logs" not in path.name]


@pytest.mark.parametrize("phase", [pytest.param("exit", marks=pytest.mark.long), "end"])
def test_the_end_of_a_script_without_close(tmp_path: Path, phase: str) -> None:
    with script(LEARNER, phase, folder=tmp_path) as process:
        run_dir = Path(line(process))
        pids = all_of(process)
        begin = time.monotonic()
        output, errors = process.communicate(timeout=PATIENCE)
        assert time.monotonic() - begin < 6.0
        assert (process.returncode, output, errors) == (0, "", "")
        assert gone(pids)
        assert not run_dir.exists()


SHORT = [("start", signal.SIGINT), ("loop", signal.SIGTERM), ("close", signal.SIGINT)]
LONG = [
    ("first", signal.SIGINT),
    ("start", signal.SIGTERM),
    ("first", signal.SIGTERM),
    ("loop", signal.SIGINT),
    ("close", signal.SIGTERM),
]


@pytest.mark.parametrize(("phase", "signum"), [*SHORT, *(pytest.param(*x, marks=pytest.mark.long) for x in LONG)])
def test_a_signal_in_each_phase(tmp_path: Path, phase: str, signum: signal.Signals) -> None:
    with script(LEARNER, phase, folder=tmp_path) as process:
        run_dir = Path(line(process))
        word = line(process)
        if phase == "loop":
            word = line(process)
        assert word == {"loop": "loop", "close": "closing"}.get(phase, "up")
        pids = all_of(process)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == -signum
        assert errors.rstrip().endswith("KeyboardInterrupt") == (signum == signal.SIGINT)
        assert errors.count("Traceback") == (signum == signal.SIGINT)
        until(lambda: gone(pids), 2.0)
        until(lambda: not run_dir.exists(), 2.0)


def test_sigint_to_the_whole_group_is_the_learners_alone(tmp_path: Path) -> None:
    """As a terminal sends it: no worker writes a traceback, and a learner that goes on keeps its workers."""
    text = LEARNER.replace(
        "    for batch in it:",
        "    signal.signal(signal.SIGINT, lambda *_: print('struck', flush=True))\n    print('set', flush=True)\n"
        "    for batch in it:",
    )
    with script(text, "loop", folder=tmp_path, command=["setsid"]) as process:
        run_dir = Path(line(process))
        words = {line(process), line(process), line(process)}
        assert words == {"up", "set", "loop"}
        pids = all_of(process)
        os.killpg(process.pid, signal.SIGINT)
        assert line(process) == "struck"
        assert not any(not alive(pid) for pid in pids)
        assert all("Traceback" not in log.read_text() for log in (run_dir / "logs").iterdir())
        process.terminate()
        process.communicate(timeout=PATIENCE)
        until(lambda: gone(pids), 2.0)
