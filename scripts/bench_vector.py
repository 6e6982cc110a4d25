"""Vector environments in the hot loop against bare loops: one process, one thread of torch, T = 64.

    python scripts/bench_vector.py [--seconds 0.3] [--rounds 21]

As in ``bench_collect.py`` loops take turns, rates are of CPU time (threads of an EnvPool included), and every ratio is
the median of the rounds' ratios. A bare loop calls the actor's forward with sampling and ``step`` of the same kind of
environment, which resets itself as it likes, and records nothing. The last line is one flat JSON object:

- ``vector_over_bare``: `collect` with a NumPy vector environment of 1,024 columns.
- ``envpool_over_bare``: `collect` with CartPole-v1 in an EnvPool of 256 columns; 0 where EnvPool is not installed.
- ``share_env`` and so on: time by stage of the first, ``envpool_share_env`` and so on of the second.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from bench_collect import Actor, Rate, run_for
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.data.fragment import Slot

T = 64
N_NUMPY, N_POOL = 1024, 256


class CartPoles(VectorEnv[Any, Any, Any]):
    """CartPole-v1 in NumPy, all columns at once. The step after an end begins the next episode, unless it was reset."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 (Gymnasium's way)

    def __init__(self, n: int) -> None:
        self.num_envs = n
        single = gym.make("CartPole-v1")
        self.single_observation_space, self.single_action_space = single.observation_space, single.action_space
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self._state = np.zeros((4, n))
        self._ended = np.zeros(n, bool)
        self._length = np.zeros(n, int)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._begin(options["reset_mask"] if options else np.ones(self.num_envs, bool))
        return self._state.T.astype(np.float32), {}

    def _begin(self, mask: Any) -> None:
        self._state[:, mask] = self.np_random.uniform(-0.05, 0.05, (4, np.count_nonzero(mask)))
        self._ended[mask] = False
        self._length[mask] = 0

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        x, v, angle, w = self._state
        force = np.where(actions == 1, 10.0, -10.0)
        cos, sin = np.cos(angle), np.sin(angle)
        push = (force + 0.05 * w * w * sin) / 1.1
        spin = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos * cos / 1.1))
        slide = push - 0.05 * spin * cos / 1.1
        begun = self._ended
        self._state = np.stack([x + 0.02 * v, v + 0.02 * slide, angle + 0.02 * w, w + 0.02 * spin])
        self._length += 1
        if begun.any():
            self._begin(begun.copy())
        terminated = (np.abs(self._state[0]) > 2.4) | (np.abs(self._state[2]) > 0.2095)
        truncated = self._length >= 500
        self._ended = terminated | truncated
        return self._state.T.astype(np.float32), np.ones(self.num_envs), terminated, truncated, {}


def numpy_env() -> CartPoles:
    return CartPoles(N_NUMPY)


def pool_env(seed: Any = 1) -> Any:
    import envpool

    return envpool.make("CartPole-v1", env_type="gymnasium", num_envs=N_POOL, seed=seed, num_threads=1)


def collecting(actor: Actor, factory: Callable[..., Any], n: int) -> tuple[Rate, Context]:
    ctx = build(factory, actor, CollectOptions(T, n, entropy=1))
    slot = Slot(ctx.spec)

    def once() -> int:
        before = ctx.times.n_env_steps
        collect(ctx, slot)
        return ctx.times.n_env_steps - before

    return lambda seconds: run_for(seconds, once), ctx


def bare(actor: Actor, env: Any, n: int) -> Rate:
    obs = env.reset()[0]
    act, rew = torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, n)
    fin = torch.zeros(1, n, dtype=torch.bool)

    def once() -> int:
        nonlocal obs
        begun = 0  # steps that were none: they only began an episode
        with torch.inference_mode():
            for _ in range(T):
                actions, _, _ = actor(torch.from_numpy(obs).unsqueeze(0), act, rew, fin, hx=None)
                obs, _, terminated, truncated, _ = env.step(actions[0].numpy())
                begun += int(np.count_nonzero(terminated | truncated))
        return T * n - begun

    return lambda seconds: run_for(seconds, once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each loop in each round")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    actor = Actor()
    loops: dict[str, Rate] = {"bare": bare(actor, numpy_env(), N_NUMPY)}
    loops["vector"], ctx = collecting(actor, numpy_env, N_NUMPY)
    contexts = {"share_": ctx}
    if importlib.util.find_spec("envpool"):
        loops["envpool_bare"] = bare(actor, pool_env(), N_POOL)
        loops["envpool"], contexts["envpool_share_"] = collecting(actor, pool_env, N_POOL)
    for loop in loops.values():
        loop(min(0.3, args.seconds))
    for ctx in contexts.values():
        ctx.times.clear()
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, loop in loops.items():
            rates[name].append(loop(args.seconds))

    def ratio(a: str, b: str) -> float:
        if a not in rates:
            return 0.0
        return round(statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True)), 3)

    for name, values in rates.items():
        print(f"{name:15s} {statistics.median(values):12,.0f} steps/s")
    result: dict[str, float] = {
        "vector_over_bare": ratio("vector", "bare"),
        "envpool_over_bare": ratio("envpool", "envpool_bare"),
        **{
            f"{prefix}{name}": round(x, 3) for prefix, ctx in contexts.items() for name, x in ctx.times.shares().items()
        },
        **{f"{name}_steps_per_s": round(statistics.median(values)) for name, values in rates.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
