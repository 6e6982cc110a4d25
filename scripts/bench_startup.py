"""From the call to the first batch: eight workers, one fragment of each in the batch.

    python scripts/bench_startup.py [--workers 8] [--repeats 3]

The last line is one flat JSON object, medians in seconds: ``first_batch_s`` (workers forked from a process that has
imported everything) and ``first_batch_spawn_s`` (a fresh interpreter each). Closing is not included: ``close_s``.

``script_s`` and ``script_prestarted_s`` are from the start of a script's interpreter, imports included, the second one
with `zrl.prestart`; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_collect import Actor
from bench_pipeline import make_env

from zrl.rollout import multi

#: A script of one's own, up to its first batch.
SCRIPT = """
import sys, time
import zrl
if sys.argv[1] == "prestarted":
    zrl.prestart()
import gymnasium as gym
import torch
from zrl import zoo
from zrl.rollout import multi
def make_env():
    return gym.make("CartPole-v1")
with make_env() as env:
    actor = zoo.MLPActor(env.observation_space, env.action_space)
workers = int(sys.argv[2])
with multi.rollout(make_env, actor, 8, workers, 4, 2 * workers, workers, max_lag=0) as it:
    next(it)
    print(time.time())
"""


def script(how: str, workers: int) -> float:
    """Seconds from the start of a script to its first batch."""
    started = time.time()
    words = [sys.executable, "-c", SCRIPT, how, str(workers)]
    done = subprocess.run(
        words, check=True, text=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return float(done.stdout) - started


def start(method: Any, workers: int) -> tuple[float, float]:
    """Seconds to the first batch, and for closing."""
    started = time.perf_counter()
    it = multi.rollout(make_env, Actor(), 8, workers, 4, 2 * workers, workers, max_lag=0, start_method=method)
    batch = next(it)
    ready = time.perf_counter()
    assert len({meta.worker for meta in batch.meta}) == workers
    it.close()
    return ready - started, time.perf_counter() - ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for method, key in (("fork", "first_batch_s"), ("spawn", "first_batch_spawn_s")):
        times = [start(method, args.workers) for _ in range(args.repeats)]
        figures[key] = statistics.median(first for first, _ in times)
        if method == "fork":
            figures["close_s"] = statistics.median(last for _, last in times)
        print(f"{method:6} first batch after {figures[key]:.2f} s")
    scripts: dict[str, list[float]] = {"script_s": [], "script_prestarted_s": []}
    for _ in range(args.repeats):
        for key, seconds in scripts.items():
            seconds.append(script("prestarted" if "prestarted" in key else "plain", args.workers))
    for key, seconds in scripts.items():
        figures[key] = statistics.median(seconds)
        print(f"{key:19} first batch after {figures[key]:.2f} s")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
