"""An environment with an id, for the command line, that breaks after some steps: ``tests.fragile:Fragile-v0``."""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np


class Fragile(gym.Env[Any, Any]):
    """Breaks after `steps` steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, steps: int = 40) -> None:
        self._left = self._steps = steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError(f"broken after {self._steps} steps")
        return np.zeros(2, np.float32), 1.0, False, False, {}


class Spare(Fragile):
    """Can be stepped in one process only, that with the pid `spare`. Its episodes have 5 steps."""

    def __init__(self, spare: int) -> None:
        super().__init__(10**9)
        self._spare = spare
        self._n = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if os.getpid() != self._spare:
            raise RuntimeError("not here")
        self._n += 1
        obs, reward, _, _, info = super().step(action)
        return obs, reward, self._n % 5 == 0, False, info


if "Spare-v0" not in gym.registry:
    gym.register("Spare-v0", entry_point="tests.fragile:Spare")
if "Fragile-v0" not in gym.registry:
    gym.register("Fragile-v0", entry_point="tests.fragile:Fragile")
