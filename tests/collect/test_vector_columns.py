"""The interface between the loop and the environments fits vector environments: a toy one gives the same record."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.collect.envs import Columns, End
from zrl.collect.streams import env_seeds
from zrl.data.fragment import Array, Row, Slot
from zrl.zoo import GRUActor

T, B = 12, 3


def make_env() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", max_episode_steps=9, disable_env_checker=True)


class VectorColumns:
    """A `SyncVectorEnv` without autoreset, whose ended columns are reset at once in one call."""

    def __init__(self, seeds: Sequence[int]) -> None:
        mode = gym.vector.AutoresetMode.DISABLED
        self.venv = gym.vector.SyncVectorEnv([make_env] * B, autoreset_mode=mode)
        self.n = B
        self.rewards: Array = np.zeros(B)
        self.dummies: Sequence[int] = ()
        self.calls: MutableSequence[int] | memoryview = [0]
        self.seeds: list[int | None] | None = list(seeds)

    def reset(self, row: Row) -> None:
        row.obs[0][:] = self.venv.reset(seed=self.seeds)[0]
        self.seeds = None

    def step(self, row: Row, nxt: Row) -> list[End]:
        obs, self.rewards, terminated, truncated, _ = self.venv.step(nxt.act[0].copy())
        nxt.obs[0][:], nxt.rew[:] = obs, self.rewards
        return [(int(j), bool(terminated[j]), {}) for j in np.flatnonzero(terminated | truncated)]

    def step_some(self, row: Row, nxt: Row, live: Sequence[int]) -> list[End]:
        """A vector environment cannot freeze a column: all are stepped, and what the frozen ones do is discarded."""
        frozen = [j for j in range(B) if j not in live]
        nxt.act[0][frozen] = row.act[0][frozen]
        ends = self.step(row, nxt)
        nxt.obs[0][frozen], nxt.rew[frozen] = row.obs[0][frozen], 0.0
        self.rewards[frozen] = 0.0
        self._reset([j for j, _, _ in ends if j in frozen])
        return [end for end in ends if end[0] in live]

    def begin(self, ends: Iterable[End], row: Row) -> None:
        ended = [j for j, _, _ in ends]
        row.obs[0][ended] = self._reset(ended)[ended]

    def finish(self, frozen: Sequence[int], row: Row) -> None:
        """What the frozen columns did meanwhile is over: their next episode begins in row T."""
        if frozen:
            row.obs[0][frozen] = self._reset(frozen)[frozen]

    def _reset(self, columns: Sequence[int]) -> Any:
        mask = np.isin(np.arange(B), columns)
        return self.venv.reset(options={"reset_mask": mask})[0] if mask.any() else np.zeros((B, 4))

    def close(self) -> None:
        self.venv.close()


class Dummies(VectorColumns):
    """The same where no column can be reset alone: the step after an end only begins the next episode."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.ended: list[int] = []

    def step(self, row: Row, nxt: Row) -> list[End]:
        ended, self.ended = self.ended, []
        firsts = self._reset(ended)
        others = [end for end in super().step(row, nxt) if end[0] not in ended] if len(ended) < B else []
        nxt.obs[0][ended], nxt.rew[ended] = firsts[ended], 0.0
        self.rewards[ended] = 0.0
        self.dummies, self.ended = ended, [j for j, _, _ in others]
        return others

    def begin(self, ends: Iterable[End], row: Row) -> None:
        """Row t+1 keeps the final observation; the next step begins the episode."""


def contexts(columns: type[VectorColumns], *, sticky: bool = False) -> tuple[Context, Context]:
    torch.manual_seed(0)
    env = make_env()
    actor = GRUActor(env.observation_space, env.action_space, hidden=8)
    options = CollectOptions(T, B, entropy=4, sticky=sticky)
    plain, vector = build(make_env, actor, options), build(make_env, actor, options)
    vector.columns.close()
    vector.columns = typed(columns(env_seeds(4, 0, 0, B + 1)[:B]))
    vector.clock = 0
    vector.restart()
    return plain, vector


def typed(columns: Columns) -> Columns:
    return columns


@pytest.mark.filterwarnings("ignore:.*reset_mask.*")
def test_the_record_is_that_of_plain_environments() -> None:
    plain, vector = contexts(VectorColumns)
    mine, theirs = Slot(plain.spec), Slot(vector.spec)
    ends = 0
    for _ in range(6):
        collect(plain, mine)
        theirs.poison()
        collect(vector, theirs)
        ends += int(mine.np.state.fin[1:].sum())
        for leaf, a, b in zip(plain.spec.leaves, mine.arrays, theirs.arrays, strict=True):
            np.testing.assert_array_equal(a, b, leaf.path)
    assert ends > 6
    plain.columns.close()
    vector.columns.close()


def test_sticky_fragments_hang_together() -> None:
    plain, vector = contexts(VectorColumns, sticky=True)
    slot, frozen = Slot(vector.spec), 0
    last = None
    for _ in range(6):
        slot.poison()
        collect(vector, slot)
        first = [a.copy() for a in slot.rows[0].carried]
        if last is not None:
            for a, b in zip(first, last, strict=True):
                np.testing.assert_array_equal(a, b)
        last = [a.copy() for a in slot.rows[T].carried]
        frozen += int((~slot.np.mask).sum())
        assert np.isfinite(slot.np.state.obs).all()
    assert frozen > 0
    plain.columns.close()
    vector.columns.close()


def test_dummy_rows_are_masked_and_reset_the_state() -> None:
    plain, vector = contexts(Dummies)
    slot = Slot(vector.spec)
    collect(vector, slot)
    r = slot.np
    dummies = np.argwhere(~r.mask)
    assert len(dummies) > 0
    for t, j in dummies:
        assert r.state.fin[t, j]
        assert r.state.rew[t + 1, j] == 0
        assert not r.state.fin[t + 1, j]
    # a dummy is no step: lengths and returns count the real ones
    t, j = np.argwhere(r.state.fin[1:] & r.mask)[0]
    assert r.ep_length[t + 1, j] == r.ep_return[t + 1, j] == t + 1
    later = [(t, j) for t, j in np.argwhere(r.state.fin[1:] & r.mask) if (dummies[:, 1] == j).any() and t > 9]
    assert all(r.ep_length[t + 1, j] <= 9 for t, j in later)
    plain.columns.close()
    vector.columns.close()
