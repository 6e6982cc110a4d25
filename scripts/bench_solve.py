"""How reliably and how fast CartPole-v1 is solved: ten seeds of PPO and of A2C with the default settings.

    python scripts/bench_solve.py [--seeds 10] [--algos ppo,a2c] [--steps N]

Solved means: the mean return of the last 100 finished episodes is at least 475, within 150,000 steps for PPO and
400,000 for A2C. The last line is one flat JSON object with ``ppo_solved_of_10``, ``a2c_solved_of_10``, and the least,
median and greatest number of steps and seconds of each. Seconds do not count the start of the interpreter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile

from zrl.config import TrainConfig
from zrl.train.loop import train

LIMITS = {"ppo": 150_000, "a2c": 400_000}


def solve(algo: str, seed: int, steps: int, runs: str) -> tuple[bool, int, float]:
    """(solved, steps, seconds) of one run."""
    config = TrainConfig(algo=algo, steps=steps, seed=seed, stop_at_return=475.0, runs=runs)
    result = train(config)
    assert result.status is not None
    return result.outcome == "goal", result.status.step, result.status.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--algos", default="ppo,a2c")
    parser.add_argument("--steps", type=int, help="another limit than the usual ones")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    for algo in args.algos.split(","):
        results = []
        for seed in range(1, args.seeds + 1):
            with tempfile.TemporaryDirectory() as runs:
                results.append(solve(algo, seed, args.steps or LIMITS[algo], runs))
            solved, steps, seconds = results[-1]
            print(
                f"{algo} seed {seed:2d}: {'solved' if solved else 'not solved'} {steps:7,} steps {seconds:5.1f} s",
                flush=True,
            )
        figures[f"{algo}_solved_of_{args.seeds}"] = sum(solved for solved, _, _ in results)
        for name, values in (("steps", [s for _, s, _ in results]), ("seconds", [round(t, 1) for _, _, t in results])):
            figures[f"{algo}_{name}_least"] = min(values)
            figures[f"{algo}_{name}_median"] = statistics.median(values)
            figures[f"{algo}_{name}_greatest"] = max(values)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
