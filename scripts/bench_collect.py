"""The hot loop against bare loops: one process, one thread, CartPole-v1, B = 16, T = 64.

    python scripts/bench_collect.py [--seconds 0.2] [--rounds 41]

Every rate is the median over rounds; within a round the loops take turns, so that a drifting machine moves all of
them, and every ratio is the median of the rounds' ratios. The last line is one flat JSON object:

- ``collect_over_bare``: `collect` against a loop that calls ``env.step``, the same actor's forward and Gumbel-max
  sampling, and records nothing.
- ``collect_over_plain``: `collect` against a plain loop with softmax and multinomial that records into NumPy arrays.
- ``nested_over_flat``: `collect` with an observation of 6 leaves against one with 1.
- ``recurrent_over_bare``: `collect` with a GRU against its own bare loop.
- ``sticky_over_plain``: real environment steps per second with ``sticky`` against without.
- ``share_env`` and so on: time by stage of the plain flat case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from zrl import BaseActorModule, algo
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import collect
from zrl.data.fragment import Slot

B, T = 16, 64
Rate = Callable[[float], float]  # seconds to run for → environment steps per second


class Actor(BaseActorModule):
    """4-64-64 with two logits and a value; over six leaves, the leaves are concatenated first."""

    def __init__(self, n: int = 4, *, nested: bool = False, recurrent: bool = False, naive: bool = False) -> None:
        super().__init__()
        self.sample = multinomial if naive else algo.categorical
        self.body = nn.Sequential(nn.Linear(n, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.core = nn.GRU(64, 64) if recurrent else None
        self.policy, self.baseline = nn.Linear(64, 2), nn.Linear(64, 1)
        self.nested = nested

    def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> tuple[Any, Any, Any]:
        x = self.body(torch.cat([obs[k] for k in "abcdef"], -1) if self.nested else obs)
        if self.core is None:
            hx = ()
        else:
            x, hx = algo.unroll(self.core, x, x.new_zeros(1, x.shape[1], 64) if hx is None else hx, fin)
        logits = self.policy(x)
        return self.sample(logits), hx, {"value": self.baseline(x).squeeze(-1), "logits": logits}


def multinomial(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits[0].softmax(-1), 1).T


class SixLeaves(gym.ObservationWrapper[Any, Any, Any]):
    """The observation under six keys."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Dict(dict.fromkeys("abcdef", env.observation_space))

    def observation(self, observation: Any) -> dict[str, Any]:
        return dict.fromkeys("abcdef", observation)


def make_env() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", disable_env_checker=True)


def make_nested() -> gym.Env[Any, Any]:
    return SixLeaves(make_env())


def run_for(seconds: float, once: Callable[[], int]) -> float:
    """Calls of `once`, which returns its environment steps, for at least `seconds`: steps per second of CPU time.

    Nothing here waits, so on an idle machine that is the time on the clock; on another one it leaves out, for all loops
    alike, what other processes took.
    """
    steps, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds:
        steps += once()
    return steps / spent


def collecting(actor: Actor, factory: Callable[[], Any], *, sticky: bool = False) -> tuple[Rate, Any]:
    ctx = build(factory, actor, CollectOptions(T, B, entropy=1, sticky=sticky))
    slot = Slot(ctx.spec)

    def once() -> int:
        before = ctx.times.n_env_steps
        collect(ctx, slot)
        return ctx.times.n_env_steps - before

    return lambda seconds: run_for(seconds, once), ctx


def bare(actor: Actor) -> Rate:
    """Environments, forward and sampling; nothing is recorded. Only a recurrent actor is told of the ends."""
    envs = [make_env() for _ in range(B)]
    obs = [env.reset(seed=j)[0] for j, env in enumerate(envs)]
    act, rew = torch.zeros(1, B, dtype=torch.int64), torch.zeros(1, B)
    fin = torch.zeros(1, B, dtype=torch.bool)
    hx: Any = None

    def once() -> int:
        nonlocal fin, hx
        with torch.inference_mode():
            for _ in range(T):
                x = torch.from_numpy(np.array(obs)).unsqueeze(0)
                actions, hx, _ = actor(x, act, rew, fin, hx=hx)
                ended = []
                for j, a in enumerate(actions[0].tolist()):
                    obs[j], _, terminated, truncated, _ = envs[j].step(a)
                    if terminated or truncated:
                        obs[j] = envs[j].reset()[0]
                        ended.append(j)
                if actor.core is not None:
                    fin = torch.zeros(1, B, dtype=torch.bool)
                    fin[0, ended] = True
        return T * B

    return lambda seconds: run_for(seconds, once)


def plain(actor: Actor) -> Rate:
    """What one writes first: the actor samples with softmax and multinomial, and NumPy arrays record every leaf."""
    envs = [make_env() for _ in range(B)]
    obs = [env.reset(seed=j)[0] for j, env in enumerate(envs)]
    all_obs = np.zeros((T, B, 4), np.float32)
    all_act, all_rew = np.zeros((T, B), np.int64), np.zeros((T, B), np.float32)
    all_fin, all_val = np.zeros((T, B), bool), np.zeros((T, B), np.float32)
    all_logits = np.zeros((T, B, 2), np.float32)
    act, rew, fin = torch.zeros(1, B, dtype=torch.int64), torch.zeros(1, B), torch.zeros(1, B, dtype=torch.bool)

    def once() -> int:
        with torch.inference_mode():
            for t in range(T):
                all_obs[t] = obs
                actions, _, info = actor(torch.from_numpy(all_obs[t]).unsqueeze(0), act, rew, fin, hx=None)
                all_logits[t], all_val[t] = info["logits"][0].numpy(), info["value"][0].numpy()
                all_act[t] = actions[0].numpy()
                for j, a in enumerate(actions[0].tolist()):
                    obs[j], all_rew[t, j], terminated, truncated, _ = envs[j].step(a)
                    all_fin[t, j] = terminated or truncated
                    if all_fin[t, j]:
                        obs[j] = envs[j].reset()[0]
        return T * B

    return lambda seconds: run_for(seconds, once)


def in_turns(loops: dict[str, Rate], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Rates of each loop, one a round; printed as medians."""
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            rates[name].append(loop(seconds))
    for name, values in rates.items():
        print(f"{name:15s} {statistics.median(values):12,.0f} steps/s")
    return rates


def ratio(rates: dict[str, list[float]], a: str, b: str) -> float:
    """Median of the rounds' ratios of two loops; 0 where one of them was not run."""
    if a not in rates or b not in rates:
        return 0.0
    return round(statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each loop in each round")
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flat, naive, nested, recurrent = Actor(), Actor(naive=True), Actor(24, nested=True), Actor(recurrent=True)
    collect_flat, ctx = collecting(flat, make_env)
    loops: dict[str, Rate] = {
        "collect": collect_flat,
        "bare": bare(flat),
        "plain": plain(naive),
        "nested": collecting(nested, make_nested)[0],
        "recurrent": collecting(recurrent, make_env)[0],
        "recurrent_bare": bare(recurrent),
        "sticky": collecting(flat, make_env, sticky=True)[0],
    }
    for loop in loops.values():
        loop(min(0.3, args.seconds))
    ctx.times.clear()
    rates = in_turns(loops, args.seconds, args.rounds)
    result: dict[str, float] = {
        "collect_over_bare": ratio(rates, "collect", "bare"),
        "collect_over_plain": ratio(rates, "collect", "plain"),
        "nested_over_flat": ratio(rates, "nested", "collect"),
        "recurrent_over_bare": ratio(rates, "recurrent", "recurrent_bare"),
        "sticky_over_plain": ratio(rates, "sticky", "collect"),
        **{f"share_{name}": round(x, 3) for name, x in ctx.times.shares().items()},
        **{f"{name}_steps_per_s": round(statistics.median(values)) for name, values in rates.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
