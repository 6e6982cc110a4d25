"""An environment with large observations that costs nothing to step."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from tests.toys import StepResult
from zrl import BaseActorModule

SHAPE = (84, 84, 4)


class LargeEnv(gym.Env[Any, Any]):
    """Every pixel of an observation says how many steps were taken, modulo 256."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 255, SHAPE, np.uint8)
        self.action_space = gym.spaces.Discrete(2)
        self._count = 0

    def _observe(self) -> Any:
        return np.full(SHAPE, self._count % 256, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._count = 0
        return self._observe(), {}

    def step(self, action: Any) -> StepResult:
        self._count += 1
        return self._observe(), 1.0, self._count % 100 == 0, False, {}


class LargeActor(BaseActorModule):
    """Looks at one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self, obs: Any, act: Any, rew: torch.Tensor, fin: torch.Tensor, *, hx: Any = None
    ) -> tuple[Any, Any, Any]:
        value = obs[..., 0, 0, 0].float() + self.bias
        return value.long() % 2, (), {"value": value}


def large_actor(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> LargeActor:
    return LargeActor()


gym.register("tests/Large-v0", "tests.system.large:LargeEnv")
