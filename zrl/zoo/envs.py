"""Two small environments with known answers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class NarrowPath(gym.Env[Any, Any]):
    """A path of `length` cells over an abyss: at each cell one of `n_actions` leads on, any other ends in a fall.

    Reward 1 at the far end, else 0; both the end and a fall terminate. The right action at a cell is fixed by
    `layout_seed`, so the path can be learnt. The observation is the cell's number. Best return: 1, in `length` steps.
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012 (Gymnasium's way)

    def __init__(
        self, length: int = 8, n_actions: int = 2, layout_seed: int = 0, render_mode: str | None = None
    ) -> None:
        self.length = length
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Discrete(length + 1)
        self.action_space = gym.spaces.Discrete(n_actions)
        self.path = np.random.default_rng(layout_seed).integers(n_actions, size=length)
        self._cell = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._cell = 0
        return self._cell, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if int(action) != self.path[self._cell]:
            return self._cell, 0.0, True, False, {"fell": True}
        self._cell += 1
        arrived = self._cell == self.length
        return self._cell, float(arrived), arrived, False, {"fell": False}

    def render(self) -> Any:
        return "." * self._cell + "@" + "." * (self.length - self._cell) if self.render_mode == "ansi" else None


class ChainMDP(gym.Env[Any, Any]):
    """The chain of Dearden, Friedman and Russell (1998), "Bayesian Q-learning": near rewards against far ones.

    Cells 0 to ``length - 1``. Action 0 walks on, and earns `far` in the last cell; action 1 earns `near` and goes back
    to cell 0. With probability `slip` the other action happens. It never terminates: a time limit truncates it, so the
    value at the limit is not 0. The observation is the cell's number. With the default numbers walking on is best, and
    earns 3.6768 a step on average.
    """

    def __init__(self, length: int = 5, near: float = 2.0, far: float = 10.0, slip: float = 0.2) -> None:
        self.length, self.near, self.far, self.slip = length, near, far, slip
        self.observation_space = gym.spaces.Discrete(length)
        self.action_space = gym.spaces.Discrete(2)
        self._cell = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._cell = 0
        return self._cell, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        slipped = bool(self.np_random.random() < self.slip)
        if bool(action) != slipped:
            self._cell, reward = 0, self.near
        elif self._cell == self.length - 1:
            reward = self.far
        else:
            self._cell, reward = self._cell + 1, 0.0
        return self._cell, reward, False, False, {}
