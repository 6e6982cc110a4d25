"""Vector environments in the hot loop against bare loops: one process, one thread of torch, T = 64.

    python scripts/bench_vector.py [--seconds 0.3] [--rounds 21]

As in ``bench_collect.py`` loops take turns, rates are of CPU time (threads of an EnvPool included), and every ratio is
the median of the rounds' ratios. A bare loop calls the actor's forward with sampling and ``step`` of the same kind of
environment, which resets itself as it likes, and records nothing. The last line is one flat JSON object:

- ``vector_over_bare``: `collect` with a NumPy vector environment of 1,024 columns that resets its
  columns itself (SAME_STEP); episodes of 200 steps, all truncated: 5 columns end in each step.
- ``vector_late_over_bare``: the same, but ended columns are reset by a call of their own (NEXT_STEP).
- ``vector_short_over_bare``: this again with episodes of some 22 steps: 46 columns end in each step.
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
from bench_collect import Actor, Rate, in_turns, ratio, run_for
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.data.fragment import Slot

T = 64
N_NUMPY, N_POOL = 1024, 256


class Vector(VectorEnv[Any, Any, Any]):
    """An environment of `n` columns in NumPy, in either of the modes in which it resets itself."""

    def __init__(self, name: str, n: int, n_state: int, limit: int, mode: AutoresetMode) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.num_envs = n
        single = gym.make(name)
        self.single_observation_space, self.single_action_space = single.observation_space, single.action_space
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self._state = np.zeros((n, n_state))
        self._ended = np.zeros(n, bool)
        self._limit = limit
        # so that not all columns reach the limit at once
        self._length = np.arange(n) % limit
        self._same_step = mode is AutoresetMode.SAME_STEP

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if options:
            self._begin(options["reset_mask"])
        else:
            self._state[:] = self._first(self.num_envs)
        return self._state.astype(np.float32), {}

    def _begin(self, mask: Any) -> None:
        self._state[mask] = self._first(np.count_nonzero(mask))
        self._ended[mask] = False
        self._length[mask] = 0

    def _first(self, n: Any) -> Any:
        return self.np_random.uniform(-0.05, 0.05, (n, self._state.shape[1]))

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        begun = self._ended
        self._move(actions)
        self._length += 1
        if begun.any():  # the step of these columns is to begin their episode
            self._begin(begun.copy())
        terminated, truncated = self._is_over(), self._length >= self._limit
        ended = terminated | truncated
        info: dict[str, Any] = {}
        obs = self._state.astype(np.float32)
        if not self._same_step:
            self._ended = ended
        elif ended.any():
            info = {"final_obs": obs, "_final_obs": ended}
            self._begin(ended)
            obs = self._state.astype(np.float32)
        return obs, np.ones(self.num_envs), terminated, truncated, info

    def _move(self, actions: Any) -> None:
        raise NotImplementedError

    def _is_over(self) -> Any:
        raise NotImplementedError


class CartPoles(Vector):
    """The dynamics of CartPole-v1: an actor that has learnt nothing keeps a pole up for some 22 steps."""

    def __init__(self, n: int) -> None:
        super().__init__("CartPole-v1", n, 4, 500, AutoresetMode.NEXT_STEP)

    def _move(self, actions: Any) -> None:
        x, v, angle, w = self._state.T
        force = np.where(actions == 1, 10.0, -10.0)
        cos, sin = np.cos(angle), np.sin(angle)
        push = (force + 0.05 * w * w * sin) / 1.1
        spin = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos * cos / 1.1))
        slide = push - 0.05 * spin * cos / 1.1
        self._state = np.stack([x + 0.02 * v, v + 0.02 * slide, angle + 0.02 * w, w + 0.02 * spin], 1)

    def _is_over(self) -> Any:
        return (np.abs(self._state[:, 0]) > 2.4) | (np.abs(self._state[:, 2]) > 0.2095)


class MountainCars(Vector):
    """The dynamics of MountainCar-v0: an actor that has learnt nothing never arrives, and is cut after 200 steps."""

    def __init__(self, n: int, mode: AutoresetMode) -> None:
        super().__init__("MountainCar-v0", n, 2, 200, mode)

    def _first(self, n: Any) -> Any:
        return np.stack([self.np_random.uniform(-0.6, -0.4, n), np.zeros(n)], 1)

    def _move(self, actions: Any) -> None:
        x, v = self._state.T
        v = np.clip(v + (actions - 1) * 0.001 - 0.0025 * np.cos(3 * x), -0.07, 0.07)
        x = np.clip(x + v, -1.2, 0.6)
        self._state = np.stack([x, np.where((x <= -1.2) & (v < 0), 0.0, v)], 1)

    def _is_over(self) -> Any:
        return self._state[:, 0] >= 0.5


def mountain_cars() -> Vector:
    return MountainCars(N_NUMPY, AutoresetMode.SAME_STEP)


def late_mountain_cars() -> Vector:
    return MountainCars(N_NUMPY, AutoresetMode.NEXT_STEP)


def cart_poles() -> Vector:
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
    late = env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
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
                if late:
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
    actor, driver = Actor(), Actor(2)
    loops: dict[str, Rate] = {
        "bare": bare(driver, mountain_cars(), N_NUMPY),
        "late_bare": bare(driver, late_mountain_cars(), N_NUMPY),
        "short_bare": bare(actor, cart_poles(), N_NUMPY),
    }
    contexts: dict[str, Context] = {}
    loops["vector"], contexts["share_"] = collecting(driver, mountain_cars, N_NUMPY)
    loops["late"], contexts["late_share_"] = collecting(driver, late_mountain_cars, N_NUMPY)
    loops["short"], contexts["short_share_"] = collecting(actor, cart_poles, N_NUMPY)
    if importlib.util.find_spec("envpool"):
        loops["envpool_bare"] = bare(actor, pool_env(), N_POOL)
        loops["envpool"], contexts["envpool_share_"] = collecting(actor, pool_env, N_POOL)
    for loop in loops.values():
        loop(min(0.3, args.seconds))
    for ctx in contexts.values():
        ctx.times.clear()
    rates = in_turns(loops, args.seconds, args.rounds)
    result: dict[str, float] = {
        "vector_over_bare": ratio(rates, "vector", "bare"),
        "vector_late_over_bare": ratio(rates, "late", "late_bare"),
        "vector_short_over_bare": ratio(rates, "short", "short_bare"),
        "envpool_over_bare": ratio(rates, "envpool", "envpool_bare"),
        **{
            f"{prefix}{name}": round(x, 3) for prefix, ctx in contexts.items() for name, x in ctx.times.shares().items()
        },
        **{f"{name}_steps_per_s": round(statistics.median(values)) for name, values in rates.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
