"""What one step of an actor costs where it acts: the actors of `zrl.zoo`, and what their `step` saves.

    python scripts/bench_actor.py [--rounds 41] [--columns 16]

In inference mode, on one thread; `forward` and `step` take turns, and ratios are medians of the rounds' ratios. The
last line is one flat JSON object: for each actor ``forward_us_ACTOR`` and ``step_us_ACTOR``, microseconds of CPU time
for one row of B columns, and ``forward_over_step_ACTOR``. Alone, with everything in the caches: in the loop, after 16
environments have had these, the same takes half as much again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from zrl import BaseActorModule
from zrl.zoo import CNNActor, GRUActor, MLPActor

BUDGET = 0.005  # seconds of one turn, at least
VECTOR = gym.spaces.Box(-1, 1, (4,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
FEW = gym.spaces.Discrete(2)

ACTORS: dict[str, Callable[[], BaseActorModule]] = {
    "mlp_shared": lambda: MLPActor(VECTOR, FEW, shared=True),
    "mlp": lambda: MLPActor(VECTOR, FEW),
    "gaussian": lambda: MLPActor(VECTOR, gym.spaces.Box(-1, 1, (6,), np.float32)),
    "gru": lambda: GRUActor(VECTOR, FEW),
    "cnn": lambda: CNNActor(IMAGE, FEW),
}


def turn(call: Callable[[], object], n: int) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    for _ in range(n):
        call()
    return (time.process_time() - started) / n


def measure(actor: BaseActorModule, n_columns: int, rounds: int) -> tuple[float, float, float]:
    """Microseconds of `forward` and of `step`, and their ratio."""
    image = isinstance(actor, CNNActor)
    obs = torch.randint(256, (1, n_columns, 4, 84, 84)).byte() if image else torch.randn(1, n_columns, 4)
    hx: Any = torch.zeros(1, n_columns, 64) if isinstance(actor, GRUActor) else ()
    row = obs, torch.zeros(1, n_columns), torch.zeros(1, n_columns), torch.zeros(1, n_columns, dtype=torch.bool)
    with torch.inference_mode():

        def forward() -> object:
            return actor(*row, hx=hx)

        def step() -> object:
            return actor.step(*row, hx)

        n = max(1, int(BUDGET / min(turn(forward, 1) for _ in range(5))))
        times = [(turn(forward, n), turn(step, n)) for _ in range(rounds)]
    whole, one = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
    return whole, one, statistics.median(a / b for a, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--columns", type=int, default=16, help="B; the CNN gets a quarter of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    for name, make in ACTORS.items():
        columns = max(1, options.columns // 4) if name == "cnn" else options.columns
        whole, one, ratio = measure(make(), columns, options.rounds)
        print(f"{name:10} B {columns:3}: forward {whole:8.1f} µs, step {one:8.1f} µs, {ratio:5.2f} times as fast")
        figures |= {f"forward_us_{name}": whole, f"step_us_{name}": one, f"forward_over_step_{name}": ratio}
    print(json.dumps({name: round(x, 3) for name, x in figures.items()}))


if __name__ == "__main__":
    main()
