"""Stable-Baselines3: `A2C` and `PPO` with their own rollout buffer, over a DummyVecEnv of all environments in one
process, or over a SubprocVecEnv, which has a process for each environment: it has no other way.

The network is that of `nets`, as a features extractor that policy and value share. Collection alone is
``collect_rollouts`` called again and again; with an update, ``train`` follows. A2C has SB3's own optimizer (RMSprop).
For "solve" PPO has the tuned settings of the RL Baselines3 Zoo for CartPole-v1, eight environments in one process.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from bench_peers import learn, nets
from bench_peers.window import Window
from bench_peers.work import GOAL, Work, factory, make_env


class Extractor(BaseFeaturesExtractor):  # type: ignore[misc]
    """The body of `nets`."""

    def __init__(self, observation_space: gym.Space[Any], env: str) -> None:
        super().__init__(observation_space, nets.N_FEATURES[env])
        self.body = nets.body(env)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.body(obs)  # type: ignore[no-any-return]


def run(work: Work, window: Window, *, processes: bool) -> None:
    envs = [factory(work.env)] * work.n_all
    # forked: its default starts an interpreter for each environment, which takes a minute and changes no rate
    env = SubprocVecEnv(envs, start_method="fork") if processes else DummyVecEnv(envs)
    policy = {
        "features_extractor_class": Extractor,
        "features_extractor_kwargs": {"env": work.env},
        "net_arch": [],
        "normalize_images": False,
    }
    options: dict[str, Any] = {"n_steps": work.n_steps, "policy_kwargs": policy, "device": "cpu", "gae_lambda": 0.95}
    if work.update == "ppo":
        model = PPO("MlpPolicy", env, batch_size=learn.MINIBATCH, n_epochs=learn.EPOCHS, **options)
    else:
        model = A2C("MlpPolicy", env, **options)
    _, callback = model._setup_learn(10**9)
    callback.on_training_start({}, {})
    while True:
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        if work.update:
            model.train()
        if window.delivered(work.n_steps * work.n_all):
            break
    env.close()


class Stop(BaseCallback):  # type: ignore[misc]
    """Stops at the goal, looking after every step: earlier than all others can."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: deque[float] = deque(maxlen=100)
        self.first = 0.0

    def _on_step(self) -> bool:
        self.first = self.first or time.perf_counter()
        ended = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        self.returns.extend(ended)
        return not (ended and len(self.returns) == 100 and sum(self.returns) >= 100 * GOAL)


def solve(seed: int, *, processes: bool) -> tuple[int | None, float, float]:
    steps, stop = 100_000, Stop()
    env = DummyVecEnv([lambda: Monitor(make_env("cartpole"))] * 8)
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gae_lambda=0.8,
        gamma=0.98,
        ent_coef=0.0,
        learning_rate=lambda left: 0.001 * left,
        clip_range=lambda left: 0.2 * left,
        seed=seed,
        device="cpu",
    )
    model.learn(steps, callback=stop)
    solved = len(stop.returns) == 100 and sum(stop.returns) >= 100 * GOAL
    return (int(model.num_timesteps) if solved else None), stop.first, time.perf_counter()
