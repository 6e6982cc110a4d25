"""Vector environments in worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from tests.faults.world import Ledger, StampEnv, drive, kid_of, kill, needs_linux, rolling, state, until
from tests.rollout.test_multi import batches
from tests.rollout.test_same import same_numbers
from zrl import WorkerError
from zrl.rollout import multi, same
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import GRUActor

T, B = 5, 2


def cart_pole() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", max_episode_steps=8)


def gru() -> GRUActor:
    env = cart_pole()
    return GRUActor(env.observation_space, env.action_space, hidden=8)


def asynchronous() -> AsyncVectorEnv:
    return AsyncVectorEnv([cart_pole] * B)


def synchronous() -> SyncVectorEnv:
    return SyncVectorEnv([cart_pole] * B, autoreset_mode=AutoresetMode.SAME_STEP)


def test_workers_with_vectors_give_the_numbers_of_plain_environments() -> None:
    found = []
    for which in ("plain", "asynchronous", "inline"):
        actor = gru()
        for x in actor.parameters():
            x.data.copy_(0.1 * x.new_ones(x.shape).cumsum(-1).sin())
        if which == "plain":
            found.append(batches(same.rollout(cart_pole, actor, T, B, entropy=11), actor, 6))
            continue
        factory: Any = asynchronous if which == "asynchronous" else synchronous
        how: Any = "inline" if which == "inline" else "fork"
        it = multi.rollout(factory, actor, T, 1, B, 2, 1, entropy=11, max_lag=0, start_method=how)
        found.append(batches(it, actor, 6))
    assert any(batch.episodes for batch in found[0])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert same_numbers(mine, theirs)


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@needs_linux
def test_a_killed_worker_leaves_none_of_its_processes_behind() -> None:
    with rolling(lambda: AsyncVectorEnv([StampEnv] * B)) as it:
        assert isinstance(it, PipelineRollout)
        ledger = Ledger()
        drive(it, ledger, lambda: len(ledger.from_stamps) == 2)
        victim = kid_of(it, 0)
        pid = victim.child.pid
        assert pid
        orphans = children_of(pid)
        assert len(orphans) == B
        kill(victim)
        before = ledger.n_fragments
        drive(it, ledger, lambda: kid_of(it, 0, not_pid=pid) and ledger.n_fragments > before + 4)
        until(lambda: all(state(orphan) in "XZ" for orphan in orphans))
        assert it.stats()["losses"]


class Falls(SyncVectorEnv):
    def step(self, actions: Any) -> Any:
        raise OSError("the cable is out")


def test_an_error_of_all_columns_is_told() -> None:
    it = multi.rollout(lambda: Falls([cart_pole] * B), gru(), T, 1, B, 2, 1)
    with it, pytest.raises(WorkerError, match="vector environment, step: step raised OSError: the cable is out") as e:
        next(it)
    assert e.value.env_index == -1


def test_another_number_of_columns_is_told_before_the_first_batch() -> None:
    it = multi.rollout(asynchronous, gru(), T, 1, 3, 2, 1)
    with it, pytest.raises(WorkerError, match="expected the number of columns of the vector environment, 2, not 3"):
        next(it)
