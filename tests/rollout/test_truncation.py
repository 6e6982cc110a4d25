"""Truncation in real batches: environments whose true values are known in closed form, and an actor that knows them.

With `final_value` every recursion of `zrl.algo` then gives the truth, wherever time limits cut: returns are the values,
advantages are zero. Without it they are wrong by the discounted value of what was cut off.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from zrl import BaseActorModule, Batch, algo
from zrl.rollout import multi, same

T, B, GAMMA = 12, 4, 0.9
N = 6  # states
REWARDS = {"constant": [1.0] * N, "cycle": [1.0, -2.0, 0.5, 4.0, 0.0, 3.0], "line": [1.0, -2.0, 0.5, 4.0, 0.0, 3.0]}


def true_values(kind: str) -> list[float]:
    """v(s), where the step out of s leads to s + 1 and pays ``REWARDS[kind][s]``: a line ends, the others go round."""
    if kind == "constant":
        return [1 / (1 - GAMMA)] * N
    rewards = REWARDS[kind]
    if kind == "cycle":
        once = [sum(GAMMA**k * rewards[(s + k) % N] for k in range(N)) for s in range(N)]
        return [x / (1 - GAMMA**N) for x in once]
    return [sum(GAMMA ** (i - s) * rewards[i] for i in range(s, N)) for s in range(N)]


class Walk(gym.Env[Any, Any]):
    """Starts anywhere. Every episode has another time limit, of 1 to 7 steps."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.observation_space = gym.spaces.Discrete(N + 1)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.left = (int(x) for x in self.np_random.integers([0, 1], [N, 8]))
        return self.state, {}

    def step(self, action: Any) -> Any:
        reward = REWARDS[self.kind][self.state]
        self.state, self.left = self.state + 1, self.left - 1
        if self.kind != "line":
            self.state %= N
        return self.state, reward, self.state == N, self.left == 0, {}


class Knowing(BaseActorModule):
    """Its value is the true one, from a table."""

    table: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor([*true_values(kind), 0.0]))

    def forward(self, obs: Tensor, act: Tensor, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        return torch.zeros_like(obs), (), {"value": self.table[obs]}


def batches(kind: str, how: str, n: int) -> list[Batch]:
    actor, sticky = Knowing(kind), how == "sticky"
    if how == "multi":
        it: Any = multi.rollout(lambda: Walk(kind), actor, T, 2, B, 4, 2, entropy=1, keep_final_obs=True)
    else:
        it = same.rollout(lambda: Walk(kind), actor, T, B, entropy=1, keep_final_obs=True, sticky=sticky)
    with it:
        return [next(it).clone() for _ in range(n)]


def cut_off(batch: Batch) -> tuple[Tensor, Tensor]:
    """For each step: how many steps on its episode was truncated within the fragment, counting itself, and the final
    value there; 0 and 0 where it was not. The slow way."""
    fin, term = batch.state.fin.numpy(), batch.state.term.numpy()
    steps, value = np.zeros(batch.mask.shape), np.zeros(batch.mask.shape)
    for t, j in np.ndindex(steps.shape):
        end = next((i for i in range(t + 1, len(fin)) if fin[i, j]), None)
        if end is not None and not term[end, j]:
            steps[t, j], value[t, j] = end - t, batch.final_value[end, j]
    return torch.from_numpy(steps), torch.from_numpy(value).float()


def close(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    torch.testing.assert_close(found[mask], expected[mask].float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, how) for kind in REWARDS for how in ("same", "sticky")), ("line", "multi")]
)
def test_recursions_are_exact_with_final_values_and_off_by_them_without(kind: str, how: str) -> None:
    n_truncated = n_terminated = 0
    for batch in batches(kind, how, 4):
        s, v, mask = batch.state, batch.actor["value"], batch.mask
        rho = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) * 3
        steps, cut = cut_off(batch)
        n_truncated += int((s.fin & ~s.term)[1:].sum())
        n_terminated += int((s.term[1:] & mask).sum())
        for final in (batch.final_value, None):
            lost = torch.zeros_like(cut) if final is not None else cut
            end: dict[str, Any] = {
                "gamma": GAMMA,
                "bootstrap": batch.bootstrap[0],
                "final_value": None if final is None else final[1:],
            }
            rewards, ends = s.rew[1:], s.fin[1:]
            whole = {**end, "final_value": final}
            close(algo.returns(s.rew, s.fin, **whole)[1:], v - GAMMA**steps * lost, mask)
            close(algo.td_error(rewards, ends, v, **end), -GAMMA * lost * (steps == 1), mask)
            bias = -((GAMMA * 0.8) ** (steps - 1)) * GAMMA * lost
            close(algo.gae(rewards, ends, v, lam=0.8, **end), bias, mask)
            close(algo.n_step(rewards, ends, v, 3, **end), v - GAMMA**steps * lost * (steps <= 3), mask)
            on_policy = algo.vtrace(rewards, ends, v, rho=torch.ones_like(rho), **end)
            close(on_policy.vs, v - GAMMA**steps * lost, mask)
            close(on_policy.adv, -(GAMMA**steps) * lost, mask)
            if final is not None:  # whatever the policies: there is nothing to correct
                off_policy = algo.vtrace(rewards, ends, v, rho=rho, **end)
                close(off_policy.vs, v, mask)
                close(off_policy.adv, torch.zeros_like(v), mask)
        # and from the record alone, with whatever weights the learner has by now
        assert batch.final_obs is not None
        truncated = s.fin & ~s.term
        again = Knowing(kind)(batch.final_obs, s.act, s.rew, torch.zeros_like(s.fin))[2]["value"]
        assert torch.equal(again.where(truncated, 0), batch.final_value)
    assert n_truncated > 4
    assert (n_terminated > 2) == (kind == "line")


def test_how_much_is_lost() -> None:
    """A reward of 1 a step for ever is worth 10; two steps before a time limit of a learner that ignores it, 1.9."""
    for batch in batches("constant", "same", 3):
        s = batch.state
        wrong = algo.returns(s.rew, s.fin, gamma=GAMMA, bootstrap=batch.bootstrap[0])[1:]
        steps, _ = cut_off(batch)
        assert (steps == 2).any()
        torch.testing.assert_close(wrong[steps == 2], torch.full_like(wrong[steps == 2], 1.9))
        right = algo.returns(s.rew, s.fin, gamma=GAMMA, bootstrap=batch.bootstrap[0], final_value=batch.final_value)
        torch.testing.assert_close(right[1:], torch.full_like(wrong, 10.0))
