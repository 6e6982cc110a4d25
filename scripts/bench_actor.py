"""What one step of an actor costs where it acts: the actors of `zrl.zoo`, and what their `step` saves.

    python scripts/bench_actor.py [--rounds 41] [--columns 16]

In inference mode, on one thread; `forward`, `step` and, where an actor has it, the step `by_arrays` take turns, and
ratios are medians of the rounds' ratios. The last line is one flat JSON object: for each actor ``forward_us_ACTOR``,
``step_us_ACTOR`` and ``arrays_us_ACTOR``, microseconds of CPU time for one row of B columns, and the ratios
``forward_over_step_ACTOR`` and ``step_over_arrays_ACTOR``. Alone, with everything in the caches: in the
loop, after 16 environments have had these, a step takes half as much again, or twice as much.
"""

from __future__ import annotations

import argparse
import itertools
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
    "mlp_shared": lambda: MLPActor(VECTOR, FEW, shared=True, numpy=True),
    "mlp": lambda: MLPActor(VECTOR, FEW, numpy=True),
    "gaussian": lambda: MLPActor(VECTOR, gym.spaces.Box(-1, 1, (6,), np.float32), numpy=True),
    "gru": lambda: GRUActor(VECTOR, FEW, numpy=True),
    "cnn": lambda: CNNActor(IMAGE, FEW),
}


def turn(call: Callable[[], object], n: int) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    for _ in range(n):
        call()
    return (time.process_time() - started) / n


def measure(actor: BaseActorModule, n_columns: int, rounds: int) -> dict[str, float]:
    """Microseconds of `forward`, `step` and `by_arrays`, and the ratios of one to the next."""
    image = isinstance(actor, CNNActor)
    obs = torch.randint(256, (1, n_columns, 4, 84, 84)).byte() if image else torch.randn(1, n_columns, 4)
    hx: Any = torch.zeros(1, n_columns, 64) if isinstance(actor, GRUActor) else ()
    row = obs, torch.zeros(1, n_columns), torch.zeros(1, n_columns), torch.zeros(1, n_columns, dtype=torch.bool)
    arrays, x, fin = actor.by_arrays(), obs[0].numpy(), row[3][0].numpy()
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: actor(*row, hx=hx),
        "step": lambda: actor.step(*row, hx),
    }
    if arrays is not None:
        assert arrays.begin(1, n_columns)
        ways["arrays"] = lambda: arrays(x, fin, hx, 0)
    with torch.inference_mode():
        n = max(1, int(BUDGET / min(turn(ways["forward"], 1) for _ in range(5))))
        times = [{way: turn(call, n) for way, call in ways.items()} for _ in range(rounds)]
    figures = {f"{way}_us": statistics.median(t[way] for t in times) * 1e6 for way in ways}
    for slow, fast in itertools.pairwise(ways):
        figures[f"{slow}_over_{fast}"] = statistics.median(t[slow] / t[fast] for t in times)
    return figures


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
        found = measure(make(), columns, options.rounds)
        print(f"{name:10} B {columns:3}: " + ", ".join(f"{key} {x:.1f}" for key, x in found.items()))
        figures |= {f"{key}_{name}": x for key, x in found.items()}
    print(json.dumps({name: round(x, 3) for name, x in figures.items()}))


if __name__ == "__main__":
    main()
