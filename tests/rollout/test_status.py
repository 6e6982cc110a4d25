"""What a running rollout says of itself, and what is seen of it from outside: real workers, a real subscriber."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.faults.world import T, impatient, rolling, stamps, until
from tests.toys import CountingActor, CountingEnv
from zrl import ConfigError
from zrl.net.observer import Observer
from zrl.rollout import multi, same
from zrl.rollout.inline import InlineRollout

WORKER_STATES = ("free", "worker", "ready", "held")


def watched(observer: Observer, condition: Any) -> dict[str, Any]:
    """The first status in which something is so."""

    def look() -> dict[str, Any] | None:
        status = observer.next(5.0)
        assert status is not None, "no status"
        return status if condition(status) else None

    found: dict[str, Any] = until(look)
    return found


def test_from_outside_every_slot_of_every_worker_is_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)  # a status every 0.1 s
    with rolling(stamps(), n=2, k=3, p=2) as it, Observer(it.urls[0]) as observer:
        it.annotate({"env": "Stamp", "return_100": float("nan")})
        for _ in range(20):
            next(it)
        seen = 0
        while seen < 5:
            next(it)
            status = observer.next(0.0)
            if status is None or sum(row["n_slots"] > 0 for row in status["peers"]) < 2:
                continue
            seen += 1
            for row in status["peers"]:
                assert tuple(row["slots"]) == WORKER_STATES
                assert sum(row["slots"].values()) == row["n_slots"] == 3
            for state in WORKER_STATES:
                assert sum(row["slots"][state] for row in status["peers"]) == status["slots"][state]
            f = status["fragments"]
            assert f["committed"] == f["consumed"] + f["dropped"] + f["in_flight"]
        assert status is not None
        assert status["training"] == {"env": "Stamp", "return_100": None}
        assert status["run_id"] == it._publisher.run_id.hex()
        assert status["url"] == it.urls[0]
        assert [row["index"] for row in status["peers"]] == [0, 1]
        assert {row["host"] for row in status["peers"]} == {"learner"}
        moved = watched(observer, lambda s: all(row["calls"] for row in s["peers"]))
        assert all(0 <= row["age"] < moved["uptime"] for row in moved["peers"])


def test_status_is_the_document_of_the_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    with rolling(stamps()) as it, Observer(it.urls[0]) as observer:
        it.annotate({"step": 5})
        n = 0
        while not it.status()["lag"]:  # yielded since the first look at the workers
            next(it)
            n += 1
        published = watched(observer, lambda s: s["batches"] == n)
        status = it.status()
        stats = it.stats()
        assert set(status) == set(published)
        assert status == json.loads(json.dumps(status, allow_nan=False))
        assert set(status) == set(stats) | {"run_id", "lags", "time", "zrl", "uptime", "url", "ending", "training"}
        assert set(status["lag"]) == {"min", "mean", "max"}
        assert sum(status["lags"].values()) == sum(stats["lag"].values()) == 2 * n
        assert set(stats["seconds"]) == set(status["seconds"])
        assert {"learner_wait", "train", "publish"} < set(status["seconds"])
    ended = it.status()
    assert ended["batches"] == n
    assert ended["seconds"]["train"] == it.status()["seconds"]["train"]  # closed: the clock stands


def test_a_loop_that_computes_makes_workers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They say so only with their next fragment, which does not come."""
    impatient(monkeypatch)
    with rolling(stamps()) as it:
        next(it)
        verdict = until(lambda: (v := it.stats()["verdict"]).startswith("learner-bound") and v)
        assert verdict.endswith("fewer workers or a larger --batch would lose nothing")
        shares = it.stats()["shares"]
        assert shares["workers"]["wait"] > 0.3
        assert sum(shares["workers"].values()) == pytest.approx(1.0)
        assert shares["learner"]["train"] > 0.5


def test_a_synchronous_run_says_how_its_time_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    with rolling(stamps(), max_lag=0) as it:
        said = it.status()["verdict"]
        assert said.startswith(("no worker yet: ", "too little data yet: "))

        def train() -> str:
            next(it)
            verdict: str = it.stats()["verdict"]
            return verdict if verdict.startswith("synchronous") else ""

        assert until(train).endswith("--max-lag 1 would overlap the two")


@pytest.mark.parametrize("which", ["same", "inline"])
def test_in_one_process(which: str) -> None:
    it: same.SameRollout | InlineRollout
    if which == "same":
        it = same.rollout(CountingEnv, CountingActor(), T, 2)
    else:
        made = multi.rollout(CountingEnv, CountingActor(), T, 2, 2, 4, 2, start_method="inline")
        assert isinstance(made, InlineRollout)
        it = made
    with it:
        assert it.status()["verdict"] == "too little data yet: 0 fragments in 0 s"
        it.annotate({"env": "Counting"})
        with pytest.raises(ConfigError, match="annotate"):
            it.annotate({"env": object()})

        def train() -> dict[str, Any] | None:
            next(it)
            status = it.status()
            return status if status["verdict"].startswith("in-process: ") else None

        status = until(train)
        assert status == json.loads(json.dumps(status, allow_nan=False))
        assert status["training"] == {"env": "Counting"}
        assert status["lag"] == {"min": 0, "mean": 0.0, "max": 0}
        assert status["env_steps"] == it.stats()["env_steps"] > 0
        assert status["rates"]["env_steps_per_s"] > 0
        for who in ("workers", "learner"):
            shares = {name: x for name, x in status["shares"][who].items() if name != "gather"}
            assert sum(shares.values()) == pytest.approx(1.0)
    assert it.status()["env_steps"] >= status["env_steps"]
