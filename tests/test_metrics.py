"""Arithmetic on counters: every figure here can be worked out by hand."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from zrl.metrics import (
    LONGEST_WINDOW,
    History,
    HostFigures,
    LearnerClock,
    Recent,
    Situation,
    Totals,
    difference,
    verdict,
)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ── the learner's clock ──────────────────────────────────────────────────────────────────────────────────────────────


def test_seconds_by_phase_the_running_one_included() -> None:
    time = Time()
    clock = LearnerClock(time)
    time.now = 105.0
    assert clock.read() == {"wait": 0.0, "publish": 0.0, "train": 0.0}  # before the first next()
    clock.enter("wait")
    time.now = 106.0
    with clock.during("publish"):
        time.now = 108.0
        assert (clock.read(), clock.waiting()) == ({"wait": 1.0, "publish": 2.0, "train": 0.0}, 0.0)
    time.now = 112.0
    assert clock.waiting() == 4.0
    clock.enter("train")
    assert clock.read(120.0) == {"wait": 5.0, "publish": 2.0, "train": 8.0}
    assert sum(clock.read(120.0).values()) == 120.0 - 105.0


def test_publishing_before_the_first_batch_does_not_start_the_clock() -> None:
    time = Time()
    clock = LearnerClock(time)
    with clock.during("publish"):
        time.now += 1.0
    assert sum(clock.read().values()) == 0.0


def test_who_publishes_from_another_thread_does_not_change_the_phase_of_the_users() -> None:
    time = Time()
    clock = LearnerClock(time)
    clock.enter("train")

    def publish() -> None:
        with clock.during("publish"):
            time.now += 3.0

    other = threading.Thread(target=publish)
    other.start()
    other.join()
    assert clock.read() == {"wait": 0.0, "publish": 0.0, "train": 3.0}


def test_a_stopped_clock_stands() -> None:
    time = Time()
    clock = LearnerClock(time)
    clock.enter("wait")
    time.now += 2.0
    clock.stop()
    clock.enter("train")
    time.now += 5.0
    assert clock.read() == {"wait": 2.0, "publish": 0.0, "train": 0.0}


# ── what happened lately ─────────────────────────────────────────────────────────────────────────────────────────────


def totals(now: float, *, busy: float = 0.0, **more: Any) -> Totals:
    """Counters at a moment: of the busy seconds half are env, a quarter actor, a tenth reset."""
    stages = {"env": 0.5 * busy, "actor": 0.25 * busy, "write": 0.0, "reset": 0.1 * busy, "total": busy}
    return Totals(now, stages={**stages, "n_env_steps": 1000 * busy}, **more)


def test_shares_of_workers_and_learner_add_up() -> None:
    old = totals(0.0, busy=10.0, wait=1.0, learner={"wait": 1.0, "train": 1.0, "publish": 0.0}, gather=1.0)
    new = totals(
        10.0,
        busy=26.0,
        wait=5.0,
        learner={"wait": 3.0, "train": 8.0, "publish": 1.0},
        gather=2.0,
        present=20.0,
        batches=40,
        fragments=80,
    )
    recent = difference(old, new)
    assert recent.workers == pytest.approx(
        {"env": 0.4, "actor": 0.2, "write": 0.0, "reset": 0.08, "other": 0.12, "wait": 0.2}
    )
    assert recent.learner == pytest.approx({"wait": 0.2, "train": 0.7, "publish": 0.1, "gather": 0.1})
    assert (recent.env_steps_per_s, recent.batches_per_s, recent.fragments) == (1600.0, 4.0, 80)


@pytest.mark.parametrize(
    ("reported", "idle", "share"),
    [
        (0.0, 0.0, 0.0),  # all that is not reported is being made
        (0.0, 8.0, 8 / 12),  # two workers, of which one waits, and says so only with its next fragment
        (0.0, 20.0, 16 / 20),  # both wait: no more than there was time for
        (6.0, 6.0, 6 / 10),  # seen waiting, and reported already
        (6.0, 9.0, 9 / 13),  # the rest of it is still to be reported
        (50.0, 8.0, 16 / 20),  # a wait that began long before
    ],
)
def test_time_that_nobody_reports_is_wait_where_workers_wait(reported: float, idle: float, share: float) -> None:
    """10 s, two workers, 4 s of them reported as busy."""
    new = totals(10.0, busy=4.0, wait=reported, present=20.0, idle=idle)
    assert difference(totals(0.0), new).workers["wait"] == pytest.approx(share)


def test_rates_by_host_are_those_of_the_window() -> None:
    old = totals(0.0, by_host={"a": HostFigures(10, 1000, 5.0), "b": HostFigures(7, 700, 3.0)})
    new = totals(
        10.0,
        by_host={"a": HostFigures(30, 3000, 15.0), "b": HostFigures(7, 700, 3.0), "c": HostFigures(4, 400, 8.0)},
    )
    recent = difference(old, new)
    assert recent.by_host == {
        "a": {"fragments_per_s": 2.0, "env_steps_per_s": 200.0, "fragment_seconds": 0.5},
        "c": {"fragments_per_s": 0.4, "env_steps_per_s": 40.0, "fragment_seconds": 2.0},
    }
    assert recent.slow_host == ("c", 4.0)


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ({"a": 1.0}, ("", 0.0)),  # slower than whom?
        ({"a": 1.0, "b": 1.9}, ("", 0.0)),
        ({"a": 1.0, "b": 2.0}, ("b", 2.0)),
        ({"a": 1.0, "b": 1.1, "c": 5.5}, ("c", 5.0)),
        ({"a": 1.0, "b": 4.0, "c": 5.0}, ("", 0.0)),  # one fast host does not make the others slow
        ({"a": 0.0, "b": 1.0}, ("", 0.0)),
    ],
)
def test_the_slow_host(seconds: dict[str, float], slow: tuple[str, float]) -> None:
    by_host = {name: HostFigures(1, 1, x) for name, x in seconds.items()}
    assert difference(totals(0.0), totals(1.0, by_host=by_host)).slow_host == slow


def test_no_shares_without_time() -> None:
    recent = difference(totals(0.0), totals(0.0))
    assert (recent.workers, recent.learner, recent.lag, recent.stale) == ({}, {}, {}, 0.0)


def test_lags_and_drops_are_those_of_the_window() -> None:
    old = totals(0.0, lags={0: 10, 3: 5}, fragments=100, stale=50, stale_by={1: 50})
    new = totals(10.0, lags={0: 10, 1: 6, 3: 8}, fragments=200, stale=60, stale_by={1: 50, 2: 6, 4: 4, 5: 1})
    recent = difference(old, new)
    assert recent.lag == {"min": 1, "mean": (6 * 1 + 3 * 3) / 9, "max": 3}
    assert (recent.stale, recent.stragglers) == (0.1, (2, 4))


def looks(history: History, *, every: float, until: float, rate: float, workers: int = 2) -> Recent:
    """What a history says after looks at regular times, with so many fragments a second."""
    recent = Recent()
    for k in range(int(until / every) + 1):
        recent = history.look(totals(k * every, workers=workers, fragments=int(k * every * rate)))
    return recent


@pytest.mark.parametrize(
    ("until", "rate", "seconds", "enough"),
    [
        (0.0, 100.0, 0.0, False),
        (5.0, 100.0, 5.0, True),
        (200.0, 100.0, 10.0, True),
        (199.0, 0.2, 20.0, True),  # 4 fragments, 2 for each of 2 workers, take 20 s
        (40.0, 0.05, 40.0, False),
        (200.0, 0.01, LONGEST_WINDOW, True),  # no more is known of what is as slow as that
    ],
)
def test_the_window_reaches_back_while_fragments_are_few(
    until: float, rate: float, seconds: float, enough: bool
) -> None:
    recent = looks(History(), every=1.0, until=until, rate=rate)
    assert (recent.seconds, recent.enough) == (seconds, enough)


@pytest.mark.parametrize(("idle", "enough"), [(7.9, False), (8.0, True)])
def test_workers_that_were_seen_waiting_are_enough_without_a_fragment(idle: float, enough: bool) -> None:
    assert difference(totals(0.0), totals(5.0, workers=2, present=10.0, idle=idle)).enough == enough


def test_time_before_there_were_workers_does_not_count() -> None:
    history = History()
    for now in (0.0, 3.0):
        assert history.look(totals(now, learner={"wait": now})).learner == {}
    history.look(totals(6.0, workers=2, learner={"wait": 6.0}))
    recent = history.look(totals(8.0, workers=2, fragments=4, learner={"wait": 6.5, "train": 1.5}))
    assert (recent.seconds, recent.enough, recent.learner["wait"]) == (2.0, True, 0.25)


def test_frequent_looks_are_not_all_kept() -> None:
    history = History()
    looks(history, every=0.125, until=200.0, rate=1.0)
    assert len(history._kept) <= 2 * LONGEST_WINDOW + 2


def test_seconds_of_workers_are_added_up_between_two_looks() -> None:
    history = History()
    history.look(totals(0.0, workers=3))
    history.look(totals(4.0, workers=2, waiting=1, busy=4.0))
    recent = history.look(totals(8.0, workers=2, waiting=2, busy=6.0))
    # 16 s of workers, 6 s reported, of the others 4·1 + 4·2 seen waiting: no more than 10 s are left for that
    assert recent.workers["wait"] == pytest.approx(10 / 16)


# ── the verdict ──────────────────────────────────────────────────────────────────────────────────────────────────────


def recently(
    learner_waits: float, workers_wait: float, *, env: float = 0.5, actor: float = 0.2, gather: float = 0.0, **more: Any
) -> Recent:
    shares = {"env": env, "actor": actor, "write": 0.0, "reset": 0.1, "other": 0.0, "wait": workers_wait}
    learner = {"wait": learner_waits, "train": 1.0 - learner_waits, "publish": 0.0, "gather": gather}
    settings = {"seconds": 10.0, "enough": True, "fragments": 100, "batches_per_s": 5.0, **more}
    return Recent(workers=shares, learner=learner, **settings)


BUSY = Situation(recent=recently(0.1, 0.08), workers=2, cores=8, had_workers=True)


def but(**changes: Any) -> Situation:
    return dataclasses.replace(BUSY, **changes)


@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        (
            Situation(why="start some: zrl worker --connect ipc:///l"),
            "no worker yet: start some: zrl worker --connect ipc:///l",
        ),
        (
            but(workers=0, why="lost so far: 2 signal; their logs say why"),
            "no worker is left: lost so far: 2 signal; their logs say why",
        ),
        (
            but(no_batch=7.4, why="1 of 4 fragments ready, 3 with 2 workers, 4 slots alive"),
            "starved: no batch for 7 s: 1 of 4 fragments ready, 3 with 2 workers, 4 slots alive",
        ),
        (
            but(no_batch=7.4, why="…", recent=recently(0.9, 0.0, batches_per_s=0.1)),
            "worker-bound by the environment (60 % of the workers' time): the learner waits 90 % of the time; "
            "more --workers would help",
        ),
        (
            but(max_lag=1, recent=recently(0.1, 0.5, stale=0.052, stragglers=(3,))),
            "5.2 % of the fragments were too old and were dropped, most of them of worker 3; a --max-lag of more than "
            "1, or workers of equal speed, would keep them",
        ),
        (
            but(max_lag=2, recent=recently(0.1, 0.5, stale=0.011, stragglers=(3, 0, 7))),
            "1.1 % of the fragments were too old and were dropped, most of them of workers 3, 0 and 7; a --max-lag of "
            "more than 2, or workers of equal speed, would keep them",
        ),
        (
            but(max_lag=1, recent=recently(0.1, 0.5, stale=0.01, stragglers=(3,))),
            "learner-bound: workers wait 50 % of the time; fewer workers or a larger --batch would lose nothing",
        ),
        (
            but(recent=Recent(seconds=3.0, fragments=1)),
            "too little data yet: 1 fragment in 3 s",
        ),
        (
            but(recent=recently(0.5, 0.5, enough=False, fragments=3)),
            "too little data yet: 3 fragments in 10 s",
        ),
        (
            but(max_lag=0, recent=recently(0.63, 0.4)),
            "synchronous: 63 % of the time goes into collecting and 37 % into learning, one after the other; "
            "--max-lag 1 would overlap the two",
        ),
        (
            but(workers=0, in_process=True, recent=recently(0.7, 0.3)),
            "in-process: 70 % of the time goes into collecting and 30 % into learning, one after the other; "
            "worker processes (--workers) would collect in parallel",
        ),
        (
            but(workers=0, in_process=True, recent=Recent()),
            "too little data yet: 0 fragments in 0 s",
        ),
        (
            but(recent=recently(0.3, 0.05)),
            "worker-bound by the environment (60 % of the workers' time): the learner waits 30 % of the time; "
            "more --workers would help",
        ),
        (
            but(recent=recently(0.55, 0.05), workers=8),
            "worker-bound by the environment (60 % of the workers' time): the learner waits 55 % of the time; there "
            "are as many workers as cores (8), so only a faster one would help",
        ),
        (
            but(recent=recently(0.55, 0.05), workers=500, cores=None),
            "worker-bound by the environment (60 % of the workers' time): the learner waits 55 % of the time; "
            "more --workers would help",
        ),
        (
            but(recent=recently(0.55, 0.05, env=0.2, actor=0.6)),
            "worker-bound by the actor (60 % of the workers' time): the learner waits 55 % of the time; "
            "more --workers would help",
        ),
        (
            but(recent=recently(0.55, 0.05, env=0.2, actor=0.6), workers=9),
            "worker-bound by the actor (60 % of the workers' time): the learner waits 55 % of the time; there are as "
            "many workers as cores (8), so only a smaller one, or more --envs for each of its calls, would help",
        ),
        (
            but(recent=recently(0.05, 0.61)),
            "learner-bound: workers wait 61 % of the time; fewer workers or a larger --batch would lose nothing",
        ),
        (
            but(recent=recently(0.5, 0.4, gather=0.82)),
            "copy-bound: copying fragments into batches takes 82 % of the time, and all wait for it; smaller "
            "observations, such as uint8 for pictures, would help",
        ),
        (
            but(recent=recently(0.5, 0.4, gather=0.1)),
            "slot-bound: the learner waits 50 % of the time, the workers 40 %; more slots for each worker or a larger "
            "--max-lag would let them run ahead",
        ),
        (
            but(max_lag=0, recent=recently(0.63, 0.4, slow_host=("b\x1b[2J", 3.14))),
            "synchronous: 63 % of the time goes into collecting and 37 % into learning, one after the other; "
            "--max-lag 1 would overlap the two; fragments of host b\\x1b[2J take 3.1 times as long as others, every "
            "batch waits for them",
        ),
        (
            but(recent=recently(0.05, 0.61, slow_host=("b", 12.0))),
            "learner-bound: workers wait 61 % of the time; fewer workers or a larger --batch would lose nothing; "
            "fragments of host b take 12.0 times as long as others, no batch waits for them",
        ),
        (
            BUSY,
            "balanced: the learner waits 10 % of the time, the workers 8 %; a change to one alone would make the other "
            "wait",
        ),
    ],
)
def test_the_verdict(situation: Situation, sentence: str) -> None:
    assert verdict(situation) == sentence
