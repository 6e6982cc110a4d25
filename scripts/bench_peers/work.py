"""What is done: environments, sizes, network and update of every work, the same for all systems."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

Env = gym.Env[Any, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """One work. Where a system has no workers, its process steps all the environments.

    Attributes:
        name: what it is called in files and on the command line.
        title: what it is, for people.
        env: which environment, see `make_env`.
        n_envs: environments of each of the two workers.
        n_steps: steps of a fragment.
        update: what follows each batch: none, "a2c" (one step), "ppo" (4 epochs, minibatches of 256, synchronous).
        pool: whether all systems step an EnvPool.
    """

    name: str
    title: str
    env: str
    n_envs: int
    n_steps: int
    update: str = ""
    pool: bool = False
    workers: int = 2

    @property
    def n_all(self) -> int:
        """Environments of all workers: the columns of a batch."""
        return self.workers * self.n_envs


WORKS = {
    work.name: work
    for work in (
        Work("w1", "CartPole-v1, MLP 4-64-64, 2 × 16, T 64", "cartpole", 16, 64),
        Work("w1l", "the same with a step of A2C per batch", "cartpole", 16, 64, "a2c"),
        Work("ppo", "the same with PPO, synchronous", "cartpole", 16, 64, "ppo"),
        Work("w2", "ALE/Pong-v5 as 84 × 84 × 4, Nature CNN, 2 × 4, T 32", "pong", 4, 32),
        Work("w3", "HalfCheetah-v5, MLP 256-256 with a Gaussian, 2 × 8, T 64", "cheetah", 8, 64),
        Work("w4", "MiniGrid-Empty-8x8-v0, GRU of 64, 2 × 16, T 32", "minigrid", 16, 32),
        Work("w5_cartpole", "CartPole-v1 in an EnvPool, as w1", "cartpole", 16, 64, pool=True),
        Work("w5_wide", "CartPole-v1 in an EnvPool, 2 × 128, T 64", "cartpole", 128, 64, pool=True),
        Work("w5_pong", "Pong-v5 in an EnvPool, as w2", "pong", 4, 32, pool=True),
        Work("solve", "CartPole-v1 until a mean return of 475, start-up included", "cartpole", 16, 32, "ppo"),
    )
}

#: The stop rule of "solve": this mean return of the last 100 finished episodes. Steps at most are each system's own,
#: since its schedules depend on them: 150,000 for zrl, 100,000 for Stable-Baselines3, a million for Sample Factory.
GOAL = 475.0


def factory(env: str) -> Callable[[], Env]:
    """Makes one environment; can be pickled."""
    return functools.partial(make_env, env)


def make_env(env: str) -> Env:
    """One environment, without Gymnasium's checker: ``cartpole``, ``pong``, ``cheetah``, ``minigrid``.

    Gymnasium before 1.0, which two peers insist on, has no HalfCheetah-v5 and calls the stack of frames otherwise.
    """
    modern = int(gym.__version__.split(".")[0]) >= 1
    if env == "cartpole":
        return gym.make("CartPole-v1", disable_env_checker=True)
    if env == "cheetah":
        return gym.make("HalfCheetah-v5" if modern else "HalfCheetah-v4", disable_env_checker=True)
    if env == "pong":
        return _pong(modern)
    if env == "minigrid":
        return _minigrid()
    raise ValueError(env)


def _pong(modern: bool) -> Env:
    import ale_py
    from gymnasium import wrappers

    gym.register_envs(ale_py)
    game = wrappers.AtariPreprocessing(gym.make("ALE/Pong-v5", frameskip=1, disable_env_checker=True))
    if modern:
        return wrappers.FrameStackObservation(game, 4)
    old: Any = wrappers
    return old.TransformObservation(old.FrameStack(game, 4), np.asarray)  # type: ignore[no-any-return]


def _minigrid() -> Env:
    """The grid alone, uint8 [7, 7, 3]: no system has to know what a mission is."""
    from minigrid import wrappers

    grid: Any = wrappers.ImgObsWrapper
    return grid(gym.make("MiniGrid-Empty-8x8-v0", disable_env_checker=True))  # type: ignore[no-any-return]


def make_pool(work: Work, n: int, threads: int, seed: Any = 1) -> Any:
    """An EnvPool of `n` environments, with Gymnasium's interface."""
    import envpool

    options: dict[str, Any] = {"stack_num": 4} if work.env == "pong" else {}
    name = {"cartpole": "CartPole-v1", "pong": "Pong-v5", "cheetah": "HalfCheetah-v5"}[work.env]
    return envpool.make(name, env_type="gymnasium", num_envs=n, num_threads=threads, seed=seed, **options)
