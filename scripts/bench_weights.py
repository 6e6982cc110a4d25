"""What a publish costs the user's thread, and how long until a worker acts with the new weights.

    python scripts/bench_weights.py [--repeats 30]

One worker that waits for a slot (``max_lag=0``), one environment, fragments of one step; the actor carries a buffer of
0.1, 6.4 or 64 MB that it does not compute with. The environment says when it was stepped, on the clock that all
processes share. The last line is one flat JSON object, medians, for each size:

- ``publish_ms_…``: `publish()` in the user's thread.
- ``adopted_ms_…``: from the start of `publish()` until the first call of the environment under the new weights. It
  contains the grant, the worker's copy from the board and into its actor, and the actor's first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from zrl import BaseActorModule
from zrl.rollout import single

SIZES = {"0_1mb": 100_000, "6_4mb": 6_400_000, "64mb": 64_000_000}  # bytes


class Clock(gym.Env[Any, Any]):
    """Its observation is the time at which it was stepped, in seconds of the monotonic clock."""

    observation_space = gym.spaces.Box(0.0, np.inf, (1,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.array([time.monotonic()]), {}

    def step(self, action: Any) -> Any:
        return np.array([time.monotonic()]), 0.0, False, False, {}


class Heavy(BaseActorModule):
    """A network of one weight with `nbytes` of luggage, in layers of at most 1 MB."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        for k, start in enumerate(range(0, nbytes, 1 << 20)):
            self.register_buffer(f"layer{k}", torch.zeros(min(1 << 20, nbytes - start) // 4))

    def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> tuple[Any, Any, Any]:
        return torch.zeros_like(act), (), {"value": self.weight.expand(fin.shape)}


def measure(nbytes: int, repeats: int) -> tuple[float, float]:
    published, adopted = [], []
    actor = Heavy(nbytes)
    actor.requires_grad_(False)
    with single.rollout(Clock, actor, 1, 1, max_lag=0, auto_publish=False) as it:
        next(it)
        for _ in range(repeats):
            actor.weight.data += 1.0
            started = time.monotonic()
            it.publish()
            published.append(time.monotonic() - started)
            batch = next(it)
            assert float(batch.actor["value"][0, 0]) == float(actor.weight)
            adopted.append(float(batch.state.obs[1, 0, 0]) - started)
    return statistics.median(published) * 1e3, statistics.median(adopted) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for name, nbytes in SIZES.items():
        figures[f"publish_ms_{name}"], figures[f"adopted_ms_{name}"] = measure(nbytes, args.repeats)
        print(
            f"{name:6} publish {figures[f'publish_ms_{name}']:7.2f} ms, adopted {figures[f'adopted_ms_{name}']:7.2f} ms"
        )
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
