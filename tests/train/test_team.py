"""What several learners agree on, with the votes of the others written down."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

import pytest

from tests.toys import CountingActor, CountingEnv
from zrl.config import TrainConfig
from zrl.errors import ConfigError, StarvationError
from zrl.rollout import same
from zrl.train.ranks import Rank
from zrl.train.setup import n_optimizer_steps
from zrl.train.stop import Stopped
from zrl.train.team import Team, Vote

READY = Vote(batch=1, n_env_steps=10, n_optimizer_steps=4)


class Scripted(Team):
    """Learner 0 of two; what learner 1 says is known beforehand."""

    def __init__(self, others: Sequence[Vote]) -> None:
        self.rank = Rank(0, 2)
        self.others = list(others)
        self.said: list[Vote] = []

    def vote(self, own: Vote = READY) -> list[Vote]:
        self.said.append(own)
        return [own, self.others.pop(0)]

    def report(self, hosts: Any) -> None:
        self._here = {"a": 2}


def agreed(
    others: Sequence[Vote], batches: Sequence[object], goal: int = 0, signum: int = 0
) -> tuple[Scripted, tuple[Any, int] | None]:
    team, left = Scripted(others), list(batches)

    def say(batch: object) -> Vote:
        return Vote(goal=goal, signum=signum) if batch is None else READY._replace(goal=goal, signum=signum)

    return team, team.batch(lambda seconds: left.pop(0), say)


def test_nobody_begins_before_all_have_a_batch() -> None:
    waiting = Vote()
    team, got = agreed([waiting, waiting, READY._replace(n_env_steps=6), READY], [None, "mine"])
    assert got == ("mine", 16)
    assert [vote.batch for vote in team.said] == [0, 1, 1]
    assert {vote.workers for vote in team.said} == {2}


@pytest.mark.parametrize("mine", ["mine", None])
def test_a_signal_to_one_stops_all(mine: str | None) -> None:
    with pytest.raises(Stopped) as caught:
        agreed([READY._replace(signum=int(signal.SIGTERM))], [mine])
    assert caught.value.signum == signal.SIGTERM


def test_who_was_asked_to_stop_or_is_at_the_goal_waits_for_no_batch() -> None:
    with pytest.raises(Stopped):
        agreed([Vote()], [], signum=2)
    assert agreed([Vote()], [], goal=1)[1] is None
    assert agreed([Vote(goal=1)], ["mine"])[1] is None


def test_different_numbers_of_optimizer_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"10 and 9 actions, which makes 4 and 3 minibatches"):
        agreed([READY._replace(n_env_steps=9, n_optimizer_steps=3)], ["mine"])


@pytest.mark.parametrize(("algo", "minibatch", "steps"), [("a2c", 3, 1), ("ppo", 8, 3), ("ppo", 7, 6), ("ppo", 1, 24)])
def test_how_many_optimizer_steps_an_update_takes(algo: str, minibatch: int, steps: int) -> None:
    config = TrainConfig(algo=algo, minibatch=minibatch, epochs=3).resolved(0)
    with same.rollout(CountingEnv, CountingActor(), n_steps=4, n_envs=2) as rollout:
        batch = next(rollout)
        batch.hx = ()
        assert n_optimizer_steps(config, batch) == steps


def test_the_reason_of_another_is_raised_as_what_it_was() -> None:
    class Store:
        def __init__(self, end: str) -> None:
            self.end = end

        def check(self, keys: list[str]) -> bool:
            return bool(self.end)

        def get(self, key: str) -> bytes:
            return self.end.encode()

    def why(end: str) -> BaseException:
        team = Scripted([])
        team._store = Store(end)  # type: ignore[assignment]
        return team._why(RuntimeError("[pair.cc] Connection closed by peer [::1]:1. This is typically …"))

    starved = why('{"kind": "StarvationError", "rank": 1, "text": "no workers"}')
    assert isinstance(starved, StarvationError)
    assert str(starved) == "learner 1: no workers"
    stopped = why('{"kind": "Stopped", "rank": 1, "text": "15"}')
    assert isinstance(stopped, Stopped)
    assert stopped.signum == 15
    for end in ("", "{", '{"kind": "KeyError", "rank": 1, "text": "x"}'):
        assert type(why(end)).__name__ == "TeamError"
    assert str(why("")) == "another learner is gone, or does not answer: [pair.cc] Connection closed by peer [::1]:1."
