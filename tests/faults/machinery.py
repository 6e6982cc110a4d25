"""What the fault tests have in common: environments that leave stamps, and waiting with a deadline."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from zrl import Batch
from zrl.collect.actor import BaseActorModule
from zrl.rollout import multi
from zrl.rollout.pipeline import PipelineRollout

DEADLINE = 20.0  # seconds for anything to happen
T, B = 8, 2
STAMPS = 4  # words of an observation: high and low half of the process's stamp, column's stamp, steps so far


class StampEnv(gym.Env[Any, Any]):
    """Every observation says which environment of which process made it, and how many steps it had taken by then.

    Args:
        pace: seconds a step takes.
        fault: called before every step with the number of steps so far.
    """

    def __init__(self, pace: float = 0.0, fault: Callable[[int], None] | None = None) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (STAMPS,), np.float64)
        self.action_space = gym.spaces.Discrete(2)
        self.pace, self.fault = pace, fault
        self.stamp = [float(os.getpid()), float(time.monotonic_ns() >> 20), float(np.random.randint(1 << 30))]
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.fault is not None:
            self.fault(self.steps)
        if self.pace:
            time.sleep(self.pace)
        self.steps += 1
        return self.observation(), float(self.steps), False, False, {}

    def observation(self) -> Any:
        return np.array([*self.stamp, self.steps], np.float64)


class Pushover(BaseActorModule):
    """Always 0; its value is its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        return torch.zeros(fin.shape, dtype=torch.int64), (), {"value": self.weight.expand(fin.shape)}


class Ledger:
    """Checks every fragment that is delivered: whole, in order, and once."""

    def __init__(self) -> None:
        self.seen: set[tuple[float, ...]] = set()
        self.pids: set[int] = set()
        self.n = 0

    def check(self, batch: Batch) -> None:
        obs = batch.state.obs
        for column in range(obs.shape[1]):
            stamps, steps = obs[:, column, :-1], obs[:, column, -1]
            assert (stamps == stamps[0]).all(), "torn: rows of two environments"
            assert torch.equal(steps, steps[0] + torch.arange(T + 1)), "torn: steps missing"
            key = (*stamps[0].tolist(), float(steps[0]))
            assert key not in self.seen, "delivered twice"
            self.seen.add(key)
            self.pids.add(int(stamps[0, 0]))
        self.n += 1


def until(done: Callable[[], object], what: str = "") -> None:
    """Wait for it, with a deadline."""
    deadline = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < deadline, f"waited for {what or done}"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def stamped(factory: Callable[[], gym.Env[Any, Any]] = StampEnv, **options: Any) -> PipelineRollout:
    """A rollout of two workers and stamp environments."""
    values: dict[str, Any] = {"n_actors": 2, "n_per_actor": B, "n_buffers": 4, "n_per_batch": 2}
    it = multi.rollout(factory, Pushover(), T, **{**values, **options})
    assert isinstance(it, PipelineRollout)
    return it


def books_balance(it: PipelineRollout) -> bool:
    """What was committed is what was consumed, dropped, or is in flight."""
    f = it.stats()["fragments"]
    return bool(f["committed"] == f["consumed"] + f["dropped"] + f["in_flight"])


def hold_the_gil(seconds: int) -> None:
    """Sleep in C without letting go of the interpreter's lock."""
    ctypes.PyDLL(None).sleep(seconds)
