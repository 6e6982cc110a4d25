"""Workers that are killed, stopped, hang or raise, under a learner that goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.machinery import (
    DEADLINE,
    Ledger,
    Pushover,
    StampEnv,
    T,
    alive,
    books_balance,
    hold_the_gil,
    stamped,
    until,
)
from zrl import StarvationError, WorkerError
from zrl.nodes.host import Patience
from zrl.rollout import local
from zrl.rollout.pipeline import PipelineRollout


@pytest.fixture(autouse=True)
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget for tests: restarts at once."""

    def patience(**values: Any) -> Patience:
        return Patience(**{"first_delay": 0.01, "most_delay": 0.05, "restarts": 50, **values})

    monkeypatch.setattr(local, "Patience", patience)


def go_on(it: PipelineRollout, ledger: Ledger, done: Callable[[], bool]) -> None:
    """Take batches until it is so."""
    deadline = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < deadline
        ledger.check(next(it))


def running(it: PipelineRollout, ledger: Ledger, n: int = 3) -> None:
    """Take batches until both workers have delivered, and n more."""
    go_on(it, ledger, lambda: len(ledger.pids) >= 2)
    for _ in range(n):
        ledger.check(next(it))


@pytest.mark.parametrize("pace", [0.0, 0.003], ids=["between fragments", "in mid-fragment"])
@pytest.mark.parametrize("max_lag", [None, 0, 1])
def test_a_killed_worker_is_replaced_and_nothing_is_torn(pace: float, max_lag: int | None) -> None:
    ledger = Ledger()
    with stamped(lambda: StampEnv(pace), max_lag=max_lag) as it:
        running(it, ledger)
        for n in range(1, 4):
            victim = max(pid for pid in ledger.pids if alive(pid))
            os.kill(victim, signal.SIGKILL)
            before = len(ledger.pids)
            go_on(it, ledger, lambda: len(ledger.pids) > before)  # noqa: B023
            assert it.stats()["replaced"] == n
            assert it.stats()["losses"] == {"signal": n}
            assert books_balance(it)
        if max_lag is not None:
            assert max(it.stats()["lag"]) <= max_lag


@pytest.mark.long
def test_many_random_kills_under_load() -> None:
    ledger, draw = Ledger(), random.Random(1)
    with stamped(lambda: StampEnv(0.0005), n_actors=4, n_buffers=8) as it:
        running(it, ledger)
        for _ in range(60):
            victims = [pid for pid in ledger.pids if alive(pid)]
            if victims:
                os.kill(draw.choice(victims), signal.SIGKILL)
            for _ in range(draw.randrange(20)):
                ledger.check(next(it))
        assert books_balance(it)


def test_a_stopped_worker_is_given_up_and_a_late_sigcont_changes_nothing() -> None:
    ledger = Ledger()
    with stamped(lambda: StampEnv(0.002), stall_timeout=0.5) as it:
        running(it, ledger)
        victim = max(ledger.pids)
        os.kill(victim, signal.SIGSTOP)
        before = len(ledger.pids)
        go_on(it, ledger, lambda: len(ledger.pids) > before)
        assert set(it.stats()["losses"]) == {"stalled"}
        assert not alive(victim)
        for _ in range(5):
            ledger.check(next(it))


def test_a_short_stop_costs_nothing() -> None:
    ledger = Ledger()
    with stamped(lambda: StampEnv(0.001)) as it:
        running(it, ledger)
        victim = max(ledger.pids)
        os.kill(victim, signal.SIGSTOP)
        for _ in range(3):
            ledger.check(next(it))
        os.kill(victim, signal.SIGCONT)
        for _ in range(10):
            ledger.check(next(it))
        stats = it.stats()
        assert stats["losses"] == {}
        assert stats["fragments"]["lost"] == 0
        assert alive(victim)


def sleep_for_ever(step: int) -> None:
    if step >= 3 * T:
        time.sleep(3600)


def sleep_with_the_gil(step: int) -> None:
    if step >= 3 * T:
        hold_the_gil(3600)


@pytest.mark.parametrize("fault", [sleep_for_ever, sleep_with_the_gil])
def test_a_hung_environment_is_killed_with_its_stacks_in_the_log(fault: Callable[[int], None], tmp_path: Path) -> None:
    ledger = Ledger()
    with stamped(lambda: StampEnv(fault=fault), stall_timeout=0.5, log_dir=tmp_path) as it:
        running(it, ledger, n=0)
        go_on(it, ledger, lambda: len(ledger.pids) >= 4)
        assert set(it.stats()["losses"]) == {"stalled"}
    logs = "".join(log.read_text() for log in tmp_path.glob("worker-*.log"))
    assert fault.__name__ in logs


def test_an_environment_that_hangs_at_once_is_an_error() -> None:
    def hang(step: int) -> None:
        time.sleep(3600)

    it = stamped(lambda: StampEnv(fault=hang), stall_timeout=0.5)
    with pytest.raises(WorkerError, match="was killed") as caught:
        next(it)
    assert caught.value.at_start


def test_a_factory_that_hangs_is_an_error() -> None:
    def factory() -> StampEnv:
        time.sleep(3600)
        raise AssertionError

    with (
        stamped(factory, start_timeout=0.7) as it,
        pytest.raises(WorkerError, match="took too long to start and was killed"),
    ):
        next(it)


def raise_in_the_second_fragment(step: int) -> None:
    if step == T + 2:
        raise RuntimeError("the board fell off the table")


def test_later_exceptions_are_replaced_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "Patience", lambda **values: Patience(restarts=2, first_delay=0.01, **values))
    ledger = Ledger()
    it = stamped(lambda: StampEnv(fault=raise_in_the_second_fragment), n_actors=1, n_per_batch=1)
    with pytest.raises(WorkerError, match="failed again after 2 restarts") as caught:
        go_on(it, ledger, lambda: False)
    assert ledger.n <= 3  # one each, but those that were dropped with their worker
    assert caught.value.worker == 0
    assert caught.value.env_index == 0
    assert not caught.value.at_start
    assert "the board fell off the table" in caught.value.remote_traceback


class Bitter(Pushover):
    """Raises, but not in the process that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.home = os.getpid()

    def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> Any:
        if os.getpid() != self.home:
            raise ArithmeticError("not far from home")
        return super().forward(obs, act, rew, fin)


def test_an_exception_in_the_actor() -> None:
    from zrl.rollout import single

    it = single.rollout(StampEnv, Bitter(), T, 2)
    with pytest.raises(WorkerError, match=r"ActorError.*not far from home") as caught:
        next(it)
    assert caught.value.env_index == -1
    assert "ArithmeticError" in caught.value.remote_traceback


def test_a_paused_learner_loses_nothing_and_its_workers_sleep() -> None:
    ledger = Ledger()
    with stamped(stall_timeout=0.3) as it:
        running(it, ledger)
        until(lambda: it.stats()["slots"]["worker"] == 0, "workers to run out of slots")
        pids = [pid for pid in ledger.pids if alive(pid)]
        before = sum(map(cpu_ticks, pids))
        time.sleep(1.5)  # five times the patience with a stall
        assert sum(map(cpu_ticks, pids)) - before <= 2
        ledger.check(next(it))
        assert it.stats()["losses"] == {}


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_starvation_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "Patience", lambda **values: Patience(first_delay=60.0, most_delay=60.0, **values))
    ledger = Ledger()
    with stamped(starve_timeout=0.5) as it:
        running(it, ledger)
        for pid in ledger.pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(StarvationError, match=r"0 workers with 0 slots are alive.*2 signal"):
            go_on(it, ledger, lambda: False)


def test_a_stall_of_the_learner_itself_costs_no_worker() -> None:
    """The collator's thread stands still for longer than its patience with others."""
    with stamped(lambda: StampEnv(0.001), stall_timeout=0.4) as it:
        ledger = Ledger()
        running(it, ledger)
        it._collator._post(lambda: time.sleep(1.0))
        for _ in range(20):
            ledger.check(next(it))
        assert it.stats()["losses"] == {}
