"""Stacks of Atari frames, ours against Gymnasium's two wrappers, on ALE/Pong-v5: one process, one thread.

    python scripts/bench_atari.py [--steps 250] [--rounds 21] [--env ALE/Pong-v5]

Needs ale-py and OpenCV: pip install 'zrl[atari]'. All play the same game: same seed, same actions. Within a round they
take turns of so many steps of four frames, the emulator included, so that a drifting machine moves all of them; times
are CPU times, figures are medians over the rounds. The last line is one flat JSON object:

- ``atari_wrapper_speedup``: `zoo.AtariFrames` against ``FrameStackObservation(AtariPreprocessing(env), 4)``, in steps
  per second; both around ``gymnasium.make(…, frameskip=1, disable_env_checker=True)``.
- ``atari_share_emulator``: of the time of `zoo.AtariFrames`, what its four calls of the emulator take alone.
- ``atari_us``, ``gymnasium_us``, ``emulator_us``: for one step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import ale_py
import cv2
import gymnasium as gym
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from zrl.zoo import AtariFrames

Loop = Callable[[int], float]  # steps to take → seconds that they took


def make_env(env_id: str) -> gym.Env[Any, Any]:
    return gym.make(env_id, frameskip=1, disable_env_checker=True)


def timed(once: Callable[[], None]) -> Loop:
    def loop(steps: int) -> float:
        started = time.process_time()
        for _ in range(steps):
            once()
        return time.process_time() - started

    return loop


def stepping(env: gym.Env[Any, Any]) -> Loop:
    """Steps with random actions, resets where episodes end."""
    env.reset(seed=0)
    actions = some_actions(env)

    def once() -> None:
        _, _, terminated, truncated, _ = env.step(next(actions))
        if terminated or truncated:
            env.reset()

    return timed(once)


def emulating(env: gym.Env[Any, Any]) -> Loop:
    """The same actions, with nothing looked at but the end."""
    env.reset(seed=0)
    atari, actions = env.unwrapped, some_actions(env)
    assert isinstance(atari, ale_py.AtariEnv)
    ale, moves = atari.ale, list(atari._action_set)

    def once() -> None:
        move = moves[next(actions)]
        for _ in range(4):
            ale.act(move)
        if ale.game_over():
            ale.reset_game()

    return timed(once)


def some_actions(env: gym.Env[Any, Any]) -> Iterator[int]:
    rng = np.random.default_rng(0)
    assert isinstance(env.action_space, gym.spaces.Discrete)
    while True:
        yield from rng.integers(env.action_space.n, size=1000).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="of each loop in each round")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--env", default="ALE/Pong-v5")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    gym.register_envs(ale_py)
    loops: dict[str, Loop] = {
        "atari": stepping(AtariFrames(make_env(args.env))),
        "gymnasium": stepping(FrameStackObservation(AtariPreprocessing(make_env(args.env)), 4)),
        "emulator": emulating(make_env(args.env)),
    }
    for loop in loops.values():
        loop(min(50, args.steps))
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, loop in loops.items():
            seconds[name].append(loop(args.steps))
    us = {name: statistics.median(values) / args.steps * 1e6 for name, values in seconds.items()}
    for name, value in us.items():
        print(f"{name:10s} {value:7.0f} µs a step, {1e6 / value:7,.0f} steps/s")

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)), 3)

    print(
        json.dumps(
            {
                "atari_wrapper_speedup": ratio("gymnasium", "atari"),
                "atari_share_emulator": ratio("emulator", "atari"),
                **{f"{name}_us": round(value, 1) for name, value in us.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
