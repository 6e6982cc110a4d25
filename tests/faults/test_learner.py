"""Learners that are killed, interrupted, or go away in mid-run: nothing of theirs is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.machinery import DEADLINE, Ledger, StampEnv, alive, stamped, until
from zrl import ClosedError
from zrl.nodes.collator import Collator
from zrl.rollout.pipeline import PipelineRollout

SCRIPT = """
import os, sys, time
from pathlib import Path

import gymnasium as gym
import torch

from zrl import zoo
from zrl.rollout import multi

torch.set_num_threads(1)


class Slow(gym.Wrapper):
    def step(self, action):
        time.sleep(PACE)
        return super().step(action)


def make_env():
    time.sleep(BUILD)
    return Slow(gym.make("CartPole-v1"))


env = gym.make("CartPole-v1")
actor = zoo.default_actor(env.observation_space, env.action_space)
say = Path(sys.argv[1])
phase = sys.argv[2]
PACE, BUILD = (0.001, 30.0 if phase == "start" else 0.0) if phase != "wait" else (0.5, 0.0)


def tell(what):
    it = globals().get("it")
    url = it.urls[0].removeprefix("ipc://") if it else ""
    say.with_suffix(".tmp").write_text(f"{what} {url}")
    say.with_suffix(".tmp").rename(say)


it = multi.rollout(make_env, actor, 8, 2, 2, 4, 2)
if phase == "exit":
    next(it)
    tell("done")
    sys.exit(0)
if phase in ("start", "wait"):
    tell(phase)
for n, batch in enumerate(it):
    if n == 3:
        tell("loop")
    if phase == "raise" and n == 5:
        raise ZeroDivisionError("in the user's loop")
    if phase == "close" and n == 5:
        tell("close")
        it.close()
        time.sleep(60)
"""


class Script:
    """A learner in a process of its own, with the processes that it started."""

    def __init__(self, folder: Path, phase: str) -> None:
        self.said = folder / "said"
        (folder / "learner.py").write_text(SCRIPT)
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            words = [sys.executable, str(folder / "learner.py"), str(self.said), phase]
            self.process = subprocess.Popen(words, stderr=errors)

    def wait_for(self, what: str) -> Path:
        """Until it says so; its run directory."""
        until(lambda: self.said.exists() and self.said.read_text().split()[0] == what, what)
        return Path(self.said.read_text().split()[1]).parent

    def descendants(self) -> list[int]:
        found, level = list[int](), [self.process.pid]
        while level:
            level = [
                int(pid)
                for parent in level
                for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            ]
            found += level
        return found

    def wait(self) -> int:
        return self.process.wait(DEADLINE)


@pytest.fixture
def script(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Script]:
    script = Script(tmp_path, request.param)
    yield script
    script.process.kill()
    script.process.wait()


@pytest.mark.parametrize("script", ["start", "loop"], indirect=True)
def test_a_killed_learner_takes_everything_with_it(script: Script) -> None:
    phase = "start" if "start" in script.process.args else "loop"  # type: ignore[operator]
    run_dir = script.wait_for(phase)
    until(lambda: len(script.descendants()) >= 3, "a zygote and two workers")
    pids = script.descendants()
    assert run_dir.exists()
    script.process.kill()
    script.process.wait()
    deadline = time.monotonic() + 2.0
    while any(map(alive, pids)) or run_dir.exists():
        assert time.monotonic() < deadline, ([pid for pid in pids if alive(pid)], run_dir.exists())
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ["start", "wait", "loop", "close"], indirect=True)
def test_a_signal_in_any_phase_leaves_nothing(script: Script, signum: signal.Signals) -> None:
    phase = script.process.args[-1]  # type: ignore[index]
    run_dir = script.wait_for(str(phase))
    if phase in ("loop", "wait", "start"):
        until(lambda: len(script.descendants()) >= 3, "a zygote and two workers")
    pids = script.descendants()
    script.process.send_signal(signum)
    assert script.wait() == -signum
    until(lambda: not any(map(alive, pids)) and not run_dir.exists(), "the end of all that it started")


@pytest.mark.parametrize("script", ["exit"], indirect=True)
def test_a_learner_that_forgets_to_close_ends_all_the_same(script: Script) -> None:
    run_dir = script.wait_for("done")
    assert script.wait() == 0
    assert not run_dir.exists()
    assert script.errors.read_text() == ""


@pytest.mark.parametrize("script", ["raise"], indirect=True)
def test_an_exception_in_the_loop_of_the_user(script: Script) -> None:
    run_dir = script.wait_for("loop")
    assert script.wait() == 1
    assert not run_dir.exists()
    text = script.errors.read_text()
    assert text.endswith("ZeroDivisionError: in the user's loop\n")
    assert text.count("Traceback") == 1


def test_an_iterator_that_is_garbage_is_closed() -> None:
    it = stamped()
    next(it)
    run_dir = Path(it.urls[0].removeprefix("ipc://")).parent
    del it
    gc.collect()
    assert not run_dir.exists()


def test_several_threads_may_close_at_once() -> None:
    it = stamped()
    next(it)
    closers = [threading.Thread(target=it.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(DEADLINE)
    with pytest.raises(ClosedError):
        next(it)


def test_an_interrupt_in_next_loses_nothing() -> None:
    ledger = Ledger()
    with stamped(lambda: StampEnv(0.02), max_lag=0) as it:
        ledger.check(next(it))
        for _ in range(3):
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                take_until_interrupted(it, ledger)
            timer.join()
        for _ in range(3):
            ledger.check(next(it))
        stats = it.stats()
        assert 0 <= stats["fragments"]["consumed"] - 2 * ledger.n <= 2 * 3  # it may have come right behind a batch
        assert stats["fragments"]["dropped"] == 0


@pytest.mark.parametrize("max_lag", [None, 0, 1])
def test_an_interrupt_before_a_batch_is_accounted_for(max_lag: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    with stamped(max_lag=max_lag) as it:
        ledger.check(next(it))
        advance = Collator.advance

        def interrupted(self: Collator, **what: object) -> None:
            if "yielded" in what:
                monkeypatch.setattr(Collator, "advance", advance)
                raise KeyboardInterrupt
            advance(self, **what)  # type: ignore[arg-type]

        monkeypatch.setattr(Collator, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(it)
        for _ in range(6):
            ledger.check(next(it))
        stats = it.stats()
        assert stats["fragments"]["consumed"] == 2 * ledger.n
        assert max_lag != 0 or stats["fragments"]["dropped"] == 0


def take_until_interrupted(it: PipelineRollout, ledger: Ledger) -> None:
    while True:
        batch = next(it)
        ledger.check(batch)


def test_a_loop_that_cannot_be_made_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_loop() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("zrl.nodes.collator.uvloop.new_event_loop", no_loop)
    with pytest.raises(OSError, match="Too many open files"):
        stamped()


def test_what_goes_wrong_in_the_collator_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with stamped() as it:
        next(it)

        def broken(self: Collator, *_: object) -> None:
            raise ZeroDivisionError("in the collator")

        monkeypatch.setattr(Collator, "_copied", broken)
        with pytest.raises(ZeroDivisionError, match="in the collator"):
            take_until_interrupted(it, Ledger())
