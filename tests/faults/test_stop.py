"""Workers that stand still: stopped by a signal, hung in an environment, or only waiting; and learners that pause."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import (
    PATIENCE,
    Ledger,
    StampEnv,
    alive,
    audit,
    cpu_seconds,
    drive,
    impatient,
    kid_of,
    kids,
    kill,
    needs_linux,
    phase,
    pid_of,
    rolling,
    rss,
    seen,
    settle,
    stamps,
    state,
    tell,
    until,
)
from zrl.errors import ClosedError, StarvationError, WorkerError
from zrl.nodes.page import Phase

pytestmark = needs_linux


def both(ledger: Ledger) -> bool:
    return len(ledger.from_stamps) == 2


def test_stopped_in_mid_fragment_and_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(stamps(tmp_path), stall_timeout=0.5) as it:
        drive(it, ledger, lambda: both(ledger))
        victim = kid_of(it, 1)
        path = tell(tmp_path, "hold", pid_of(victim))
        drive(it, ledger, lambda: seen(path))
        pid = kill(victim, signal.SIGSTOP)
        known = set(ledger.from_stamps[1])
        drive(it, ledger, lambda: ledger.from_stamps[1] - known)
        assert not alive(pid)
        with pytest.raises(ProcessLookupError):  # too late to matter
            os.kill(pid, signal.SIGCONT)
        stats = audit(it)
        assert stats["losses"] == {"stalled": 1}
        assert stats["fragments"]["lost"] == 1
        assert stats["workers"] == 2


def test_stopped_while_it_waits_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is not standing still; what tells is the Release that it does not take."""
    impatient(monkeypatch, silence=0.5)
    ledger = Ledger()
    with rolling(stamps()) as it:
        drive(it, ledger, lambda: both(ledger))
        settle(it)
        until(lambda: all(phase(kid) is Phase.WAIT for kid in kids(it)))
        pid = kill(kid_of(it, 1), signal.SIGSTOP)
        until(lambda: state(pid) == "T")
        known = set(ledger.from_stamps[1])
        drive(it, ledger, lambda: ledger.from_stamps[1] - known)
        assert not alive(pid)
        stats = audit(it)
        assert stats["losses"] == {"desync": 1}
        assert stats["workers"] == 2


def test_stopped_for_a_short_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(stamps(tmp_path)) as it:
        drive(it, ledger, lambda: both(ledger))
        pids = [pid_of(kid) for kid in kids(it)]
        path = tell(tmp_path, "hold", pids[0])
        drive(it, ledger, lambda: seen(path))
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: [state(pid) for pid in pids] == ["T", "T"])
        path.unlink()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        known = {index: len([k for k in ledger.seen if k[0] == index]) for index in (0, 1)}
        drive(it, ledger, lambda: all(len([k for k in ledger.seen if k[0] == i]) > known[i] + 2 for i in (0, 1)))
        assert [pid_of(kid) for kid in kids(it)] == pids
        stats = audit(it)
        assert stats["losses"] == {}
        assert stats["fragments"]["lost"] == stats["fragments"]["dropped"] == 0


@pytest.mark.parametrize("how", [pytest.param("hold", marks=pytest.mark.long), "gil"])
def test_an_environment_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """Its stacks are in the log of the worker, also where it keeps the GIL."""
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(stamps(tmp_path), stall_timeout=0.5, log_dir=tmp_path / "logs") as it:
        drive(it, ledger, lambda: both(ledger))
        tell(tmp_path, how, pid_of(kid_of(it, 0)))
        known = set(ledger.from_stamps[0])
        drive(it, ledger, lambda: ledger.from_stamps[0] - known)
        assert audit(it)["losses"] == {"stalled": 1}
    log = (tmp_path / "logs" / "worker-0.log").read_text()
    assert "_hold" in log or "_hang_with_the_gil" in log


def test_hung_workers_do_not_hold_up_the_close(tmp_path: Path) -> None:
    with rolling(stamps(tmp_path)) as it, ThreadPoolExecutor(1) as pool:
        next(it)
        pids = [pid_of(kid) for kid in kids(it)]
        paths = [tell(tmp_path, "gil", pids[0]), tell(tmp_path, "hold", pids[1])]
        waiting = pool.submit(lambda: [next(it) for _ in range(1000)])
        until(lambda: seen(paths[0]) and seen(paths[1]))
        it.close()
        with pytest.raises(ClosedError):
            waiting.result(PATIENCE)
    assert not any(map(alive, pids))


def test_a_factory_that_hangs() -> None:
    with rolling(lambda: time.sleep(1000), start_timeout=0.5) as it, pytest.raises(WorkerError) as caught:
        next(it)
    assert "too long to start" in str(caught.value)
    assert caught.value.worker in (0, 1)


def test_steps_that_take_long_are_no_desync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker does not look into its socket while it makes a fragment: a Release that waits there tells nothing."""
    impatient(monkeypatch, silence=0.5)
    ledger = Ledger()
    with rolling(stamps(slow=0.1), n=1, p=1) as it:
        for _ in range(3):
            ledger.check(next(it))
        assert audit(it)["losses"] == {}


def test_a_step_that_takes_long_is_no_desync(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impatient(monkeypatch, silence=0.5)
    ledger = Ledger()
    with rolling(stamps(tmp_path), n=1, p=1) as it, ThreadPoolExecutor(1) as pool:
        drive(it, ledger, lambda: ledger.n_fragments == 3)
        path = tell(tmp_path, "hold", pid_of(kid_of(it, 0)))

        def let_go_later() -> None:
            until(lambda: seen(path))
            time.sleep(1.0)  # how long the step takes
            path.unlink()

        done = pool.submit(let_go_later)
        drive(it, ledger, done.done)
        ledger.check(next(it))
        assert audit(it)["losses"] == {}


class LongReset(StampEnv):
    """The first reset after the end of an episode takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.n_resets = seconds, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.n_resets += 1
        if self.n_resets == 2:
            time.sleep(self.seconds)
        return super().reset(seed=seed, options=options)


@pytest.mark.parametrize(
    ("seconds", "silence"),
    [(0.8, 0.5), pytest.param(20.0, 5.0, marks=[pytest.mark.long, pytest.mark.timeout(120)])],
)
def test_a_reset_that_takes_long_is_legal(monkeypatch: pytest.MonkeyPatch, seconds: float, silence: float) -> None:
    """Longer than the deadlines by which the dead are told: only a call that does not end is a stall."""
    impatient(monkeypatch, silence=silence)
    ledger = Ledger()
    with rolling(functools.partial(LongReset, seconds), stall_timeout=3 * seconds) as it:
        pids = [pid_of(kid) for kid in kids(it)]
        begin = time.monotonic()
        drive(it, ledger, lambda: ledger.n_fragments == 12, PATIENCE + 3 * seconds)
        assert time.monotonic() - begin > seconds
        assert [pid_of(kid) for kid in kids(it)] == pids
        stats = audit(it)
        assert (stats["losses"], stats["dropped"], stats["refused"]) == ({}, {}, {})


@pytest.mark.parametrize(
    ("pause", "seconds"), [(0.3, 1.5), pytest.param(2.0, 60.0, marks=[pytest.mark.long, pytest.mark.timeout(180)])]
)
def test_a_slow_loop_costs_nothing(monkeypatch: pytest.MonkeyPatch, pause: float, seconds: float) -> None:
    """Its workers have filled all slots whenever it comes for a batch, and wait; memory stays where it is."""
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(stamps(), stall_timeout=0.5, starve_timeout=0.5) as it:
        drive(it, ledger, lambda: both(ledger))
        drive(it, ledger, lambda: ledger.n_fragments >= 40)  # whatever grows at first
        settle(it)
        pids = [pid_of(kid) for kid in kids(it)]
        before, memory, begin = [cpu_seconds(pid) for pid in pids], rss(os.getpid()), time.monotonic()
        while time.monotonic() - begin < seconds:
            time.sleep(pause)  # what the user does with a batch
            settle(it)
            ledger.check(next(it))
        used = [cpu_seconds(pid) - was for pid, was in zip(pids, before, strict=True)]
        assert max(used) <= 0.05 + 0.02 * seconds, f"workers used {used} s of CPU in {seconds:.0f} s"
        grown = rss(os.getpid()) - memory
        assert grown < 4 << 20, f"memory grew by {grown:,} bytes"
        assert [pid_of(kid) for kid in kids(it)] == pids
        stats = audit(it)
        assert (stats["losses"], stats["dropped"], stats["refused"]) == ({}, {}, {})


def one_slow(folder: Path, seconds: float) -> Callable[[], StampEnv]:
    """Factory whose environments are slow in whichever worker comes first."""

    def make() -> StampEnv:
        with contextlib.suppress(FileExistsError), open(folder / "slow", "x") as file:
            file.write(str(os.getpid()))
        return StampEnv(slow=seconds if (folder / "slow").read_text() == str(os.getpid()) else 0.0)

    return make


@pytest.mark.long
@pytest.mark.parametrize("max_lag", [None, 0])
def test_one_slow_environment_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, max_lag: int | None
) -> None:
    """A loop that is faster has a notice where a batch must wait for it, however small the deadlines are; else the
    others fill its batches."""
    impatient(monkeypatch, silence=0.3)
    monkeypatch.setattr("zrl.rollout.pipeline.FIRST_COMPLAINT", 0.2)
    ledger = Ledger()
    with rolling(one_slow(tmp_path, 0.1), max_lag=max_lag, stall_timeout=0.5, starve_timeout=0.3) as it:
        drive(it, ledger, lambda: both(ledger))
        caplog.clear()
        before = ledger.n_fragments
        drive(it, ledger, lambda: ledger.n_fragments >= before + (6 if max_lag == 0 else 200))
        stats = audit(it)
        assert stats["losses"] == {}
        shares = Counter(worker for worker, _, _ in ledger.seen)
        if max_lag == 0:
            assert len(set(shares.values())) == 1
            assert "starved: no batch for" in caplog.text
        else:
            assert max(shares.values()) > 5 * min(shares.values())


def test_a_paused_learner_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers wait, which costs no CPU and is no stall, however small the timeouts are."""
    impatient(monkeypatch, silence=0.3)
    ledger = Ledger()
    with rolling(stamps(), stall_timeout=0.5, starve_timeout=0.5) as it:
        drive(it, ledger, lambda: both(ledger))
        settle(it)
        until(lambda: all(phase(kid) is Phase.WAIT for kid in kids(it)))
        pids = [pid_of(kid) for kid in kids(it)]
        before, begin = [cpu_seconds(pid) for pid in pids], time.monotonic()
        until(lambda: time.monotonic() - begin > 2.0)
        used = [cpu_seconds(pid) - was for pid, was in zip(pids, before, strict=True)]
        assert max(used) <= 0.02, f"waiting workers used {used} s of CPU in 2 s"
        for _ in range(10):
            ledger.check(next(it))
        assert [pid_of(kid) for kid in kids(it)] == pids
        stats = audit(it)
        assert stats["losses"] == {}
        assert stats["dropped"] == {}


def test_a_stopped_learner_loses_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clocks went on while it could not look: what it was late by is nobody's fault."""
    impatient(monkeypatch, silence=0.5)
    ledger = Ledger()
    with rolling(stamps(), stall_timeout=0.5) as it:
        drive(it, ledger, lambda: both(ledger))
        pids = [pid_of(kid) for kid in kids(it)]
        pause(1.5)
        for _ in range(10):
            ledger.check(next(it))
        assert [pid_of(kid) for kid in kids(it)] == pids
        assert audit(it)["losses"] == {}


def pause(seconds: float) -> None:
    """Stop this whole process; a helper that was forked before lets it go on."""
    helper = os.posix_spawn(
        "/bin/sh", ["sh", "-c", f"kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"], os.environ
    )
    os.waitpid(helper, 0)


def test_starvation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes back for as long: an error that says why, never a silent end."""
    impatient(monkeypatch, first_delay=60.0, most_delay=60.0)
    ledger = Ledger()
    with rolling(stamps(), starve_timeout=0.5) as it:
        drive(it, ledger, lambda: both(ledger))
        for kid in kids(it):
            kill(kid)
        with pytest.raises(StarvationError, match=r"0 slots are alive, .* lost so far: ") as caught:
            drive(it, ledger, lambda: False)
    losses = re.findall(r"(\d+) (signal|unreachable)", str(caught.value))  # by who was told first of a death
    assert sum(int(n) for n, _ in losses) == 2


@pytest.mark.long
def test_too_few_workers_for_a_batch_starve_too(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, first_delay=60.0, most_delay=60.0)
    ledger = Ledger()
    with rolling(stamps(), p=4, starve_timeout=0.5) as it:
        drive(it, ledger, lambda: both(ledger))
        kill(kid_of(it, 1))
        with pytest.raises(StarvationError, match=r"1 workers with 2 slots are alive, .* needs .* 4 slots"):
            drive(it, ledger, lambda: False)


def test_no_starvation_while_a_replacement_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(slow_to_build(tmp_path), max_lag=0, starve_timeout=0.5) as it:
        drive(it, ledger, lambda: both(ledger))
        (tmp_path / "slow").touch()
        kill(kid_of(it, 1))
        known = set(ledger.from_stamps[1])
        drive(it, ledger, lambda: ledger.from_stamps[1] - known)


def slow_to_build(folder: Path) -> Callable[[], StampEnv]:
    """Factory whose environments take long, once there is a file ``slow``."""

    def make() -> StampEnv:
        if (folder / "slow").exists():
            time.sleep(0.3)
        return StampEnv()

    return make
