"""Workers that die: each costs its own fragments and nothing else, and another takes its place."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.world import (
    PATIENCE,
    Ledger,
    audit,
    drive,
    impatient,
    kid_of,
    kids,
    kill,
    needs_linux,
    phase,
    pid_of,
    rolling,
    seen,
    settle,
    stamps,
    state,
    tell,
    until,
)
from zrl.errors import ProcessError
from zrl.nodes.page import Phase
from zrl.rollout.pipeline import PipelineRollout

pytestmark = needs_linux


@pytest.fixture
def it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelineRollout]:
    impatient(monkeypatch)
    with rolling(stamps(tmp_path)) as made:
        yield made


@pytest.fixture
def ledger(it: PipelineRollout) -> Ledger:
    """Both workers have delivered."""
    ledger = Ledger()
    drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
    return ledger


def test_in_mid_fragment(it: PipelineRollout, ledger: Ledger, tmp_path: Path) -> None:
    before = audit(it)
    victim = kid_of(it, 1)
    path = tell(tmp_path, "hold", pid_of(victim))
    drive(it, ledger, lambda: seen(path))
    pid = kill(victim)
    stamps_before = set(ledger.from_stamps[1])
    drive(it, ledger, lambda: ledger.from_stamps[1] - stamps_before)  # its replacement delivers
    after = audit(it)
    assert after["fragments"]["lost"] == before["fragments"]["lost"] + 1
    assert after["losses"] in ({"signal": 1}, {"unreachable": 1})  # who was told first
    assert after["replaced"] == before["replaced"] + 1
    assert after["workers"] == 2
    assert not after["refused"].get("slot not granted")
    assert kid_of(it, 1).generation == victim.generation + 1
    assert not any(k.child.pid == pid for k in kids(it))


def test_between_fragments(it: PipelineRollout, ledger: Ledger) -> None:
    """It waits for slots, all of its own are filled: nothing is being made, so nothing is lost."""
    victim = kid_of(it, 0)
    settle(it)
    until(lambda: phase(victim) is Phase.WAIT)
    before = audit(it)
    pid = kill(victim)
    until(lambda: it.stats()["losses"] == {"signal": 1})
    after = audit(it)
    assert after["fragments"]["lost"] == before["fragments"]["lost"]
    assert after["dropped"].get("gone", 0) >= before["dropped"].get("gone", 0)
    known = set(ledger.from_stamps[0])
    drive(it, ledger, lambda: ledger.from_stamps[0] - known)
    assert kid_of(it, 0, not_pid=pid).generation == victim.generation + 1


def test_all_of_them_at_once(it: PipelineRollout, ledger: Ledger) -> None:
    known = {index: set(found) for index, found in ledger.from_stamps.items()}
    for kid in kids(it):
        kill(kid)
    drive(it, ledger, lambda: all(ledger.from_stamps[i] - known[i] for i in (0, 1)))
    assert audit(it)["workers"] == 2


def test_one_that_exits_with_status_0_is_replaced(it: PipelineRollout, ledger: Ledger, tmp_path: Path) -> None:
    known = set(ledger.from_stamps[0])
    tell(tmp_path, "abort", pid_of(kid_of(it, 0)), "0")
    drive(it, ledger, lambda: ledger.from_stamps[0] - known)
    assert audit(it)["losses"] in ({"exit": 1}, {"unreachable": 1})


@pytest.mark.parametrize("n", [12, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_kills_at_random_moments(it: PipelineRollout, ledger: Ledger, n: int) -> None:
    """Under load: nothing is torn, delivered twice or forgotten, and it goes on."""
    rng = random.Random(n)
    deadline = time.monotonic() + PATIENCE * n
    for _ in range(n):
        for _ in range(rng.randrange(20)):
            ledger.check(next(it))
        victim = rng.choice(kids(it))
        pid = kill(victim)
        drive(it, ledger, lambda pid=pid: not any(k.child.pid == pid for k in kids(it)))  # type: ignore[misc]
        audit(it)
        assert time.monotonic() < deadline
    known = {index: set(found) for index, found in ledger.from_stamps.items()}
    drive(it, ledger, lambda: all(ledger.from_stamps[i] - known[i] or _delivers(it, i) for i in (0, 1)))
    stats = audit(it)
    assert set(stats["losses"]) <= {"signal", "unreachable"}
    assert sum(stats["losses"].values()) == stats["replaced"] == n


def _delivers(it: PipelineRollout, index: int) -> bool:
    return kid_of(it, index).page.read().sent > 0


@pytest.mark.parametrize("max_lag", [0, 1])
@pytest.mark.parametrize("n", [6, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_the_bound_on_lag_holds_under_kills(monkeypatch: pytest.MonkeyPatch, max_lag: int, n: int) -> None:
    impatient(monkeypatch)
    rng = random.Random(max_lag)
    ledger = Ledger()

    with rolling(stamps(), max_lag=max_lag, p=4) as it:
        for _ in range(n):
            for _ in range(rng.randrange(1, 8)):
                batch = ledger.check(next(it))
                assert max(batch.lag) <= max_lag
            kill(rng.choice(kids(it)))
        for _ in range(10):
            assert max(ledger.check(next(it)).lag) <= max_lag
        stats = audit(it)
        assert stats["replaced"] >= 1
        assert max(stats["lag"]) <= max_lag


def test_with_max_lag_0_the_replacement_takes_the_places_of_the_dead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    impatient(monkeypatch)
    ledger = Ledger()
    with rolling(stamps(tmp_path), max_lag=0, p=4) as it:
        first = ledger.check(next(it))
        assert [meta.worker for meta in first.meta] == [0, 1, 0, 1]
        victim = kid_of(it, 1)
        path = tell(tmp_path, "hold", pid_of(victim))
        killer = threading.Thread(target=lambda: (until(lambda: seen(path)), kill(victim)))
        killer.start()
        second = ledger.check(next(it))  # waits for the replacement
        killer.join()
        assert [meta.worker for meta in second.meta] == [0, 1, 0, 1]
        assert [meta.seq for meta in second.meta] == [3, 1, 4, 2]
        assert second.lag == (0, 0, 0, 0)
        assert it._collator.scheduler.n_regranted == 2
        assert ledger.check(next(it)).lag == (0, 0, 0, 0)
        assert audit(it)["fragments"]["lost"] == 1


def test_the_process_that_starts_workers_is_killed(tmp_path: Path) -> None:
    with rolling(stamps()) as it:
        next(it)
        assert it._collator._own is not None
        zygote = it._collator._own.zygote
        run_dir = it._collator._run_dir
        assert run_dir is not None
        pids = [pid_of(kid) for kid in kids(it)]
        zygote.process.send_signal(signal.SIGKILL)

        def go_on() -> None:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                next(it)

        with pytest.raises(ProcessError, match="the zygote ended with signal 9"):
            go_on()
        until(lambda: all(state(pid) in "ZX" for pid in pids))
    assert not run_dir.exists()
