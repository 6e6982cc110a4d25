"""`StampEnv` and an actor for it by name, for hosts."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from tests.faults.world import StampEnv
from tests.toys import RandomActor


def make(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> RandomActor:
    return RandomActor(3)


gym.register("tests/Stamp-v0", lambda **kwargs: StampEnv(**kwargs), disable_env_checker=True)
