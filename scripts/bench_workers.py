"""Steps per second and what they cost with 1, 2, 4 and 8 workers, and a model of that cost, for other machines.

    python scripts/bench_workers.py [--workers 1 2 4 8] [--seconds 2] [--rounds 5] [--no-model]

    python scripts/bench_workers.py [--workers 1 2 4 8] [--seconds 2] [--rounds 5]

CartPole-v1, B = 16, T = 64, the actor of bench_collect.py, batches of 4 fragments, a publish each, and a consumer that
only touches each batch. Costs are CPU time of all threads of all processes, so that other processes of the machine
count little; rates are on the clock.

The model says what a fragment of T steps in B columns costs, with P fragments in a batch:

    worker    step · T · B + fragment + adopt · (new weights in a fragment: 1 or 0)
    learner   take + batch / P + publish · (publishes in a batch) / P

Its six constants come from four other runs with two workers: T = 64 and T = 4 with P = 8, and P = 1 with T = 4, without
publishes and with one a batch. They are compared with the runs above, in which they have no part. In a round all take
turns; while one runs, the workers of the others wait for slots.

The last line is one flat JSON object, medians of the rounds:

- ``steps_per_s_…``, and ``cpu_us_per_step_…``: for each number of workers, of all processes together;
  ``worker_us_per_step_…`` and ``learner_us_per_fragment_…``: of either side.
- ``model_over_measured_…``: what the model says of ``cpu_us_per_step_…``, against it.
- ``step_us``, ``fragment_us``, ``adopt_us``, ``take_us``, ``batch_us``, ``publish_us``: the constants.
- ``fragment_bytes``; ``load``: the one-minute load of the machine before it began.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_collect import Actor, make_env

from zrl.rollout import multi
from zrl.rollout.pipeline import PipelineRollout

B, T, P = 16, 64, 4
SHORT = 4  # steps
PATIENCE = 60.0


@dataclass(frozen=True)
class Case:
    n_workers: int
    n_steps: int
    n_per_batch: int
    publish: bool


MODEL = (Case(2, T, 8, False), Case(2, SHORT, 8, False), Case(2, SHORT, 1, False), Case(2, SHORT, 1, True))


@dataclass(frozen=True)
class Cost:
    """CPU time, and the time on the clock, of one fragment, in µs."""

    worker: float
    learner: float
    clock: float

    @property
    def all(self) -> float:
        return self.worker + self.learner


def rollout(case: Case) -> PipelineRollout:
    n_buffers = max(2 * case.n_workers, 2 * case.n_per_batch)
    it = multi.rollout(
        *(make_env, Actor(), case.n_steps, case.n_workers, B, n_buffers, case.n_per_batch),
        entropy=1,
        auto_publish=case.publish,
    )
    assert isinstance(it, PipelineRollout)
    return it


def touch(it: PipelineRollout) -> int:
    """Take one batch; its fragments."""
    batch = next(it)
    float(batch.state.obs[0, 0, 0])
    return len(batch.meta)


def descendants() -> list[int]:
    """The processes below this one: the zygote and its workers."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def cpu_us(pid: int) -> float:
    """Of all threads that a process has now."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e3


class Running:
    """A rollout whose workers stand still between two rounds: they have filled all their slots then."""

    def __init__(self, case: Case, opened: contextlib.ExitStack) -> None:
        before = set(descendants())
        self._case, self._it = case, opened.enter_context(rollout(case))
        for _ in range(case.n_workers + 4):
            touch(self._it)
        self._workers = [pid for pid in descendants() if pid not in before]
        spec = self._it._collator._rings.spec
        assert spec is not None
        self.nbytes = spec.nbytes
        self._rest()

    def measure(self, seconds: float) -> Cost:
        for _ in range(self._it.stats()["slots"]["ready"] // self._case.n_per_batch + 2):  # what lay ready
            touch(self._it)
        theirs, mine, started, n = sum(map(cpu_us, self._workers)), time.process_time(), time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            n += touch(self._it)
        clock, mine = time.perf_counter() - started, time.process_time() - mine
        theirs = sum(map(cpu_us, self._workers)) - theirs
        self._rest()
        return Cost(theirs / n, mine * 1e6 / n, clock * 1e6 / n)

    def _rest(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._it.stats()["slots"]["worker"]:
            if time.monotonic() > deadline:
                raise TimeoutError("the workers do not run out of slots")
            time.sleep(0.01)


def model(costs: list[Cost]) -> dict[str, float]:
    """The six constants, by least squares from the two costs of each case of `MODEL`."""
    worker = [[case.n_steps * B, 1, float(case.publish)] for case in MODEL]
    learner = [[1, 1 / case.n_per_batch, case.publish / case.n_per_batch] for case in MODEL]
    names = (("step_us", "fragment_us", "adopt_us"), ("take_us", "batch_us", "publish_us"))
    found: dict[str, float] = {}
    for rows, side, keys in zip((worker, learner), ("worker", "learner"), names, strict=True):
        # relative to the cost: a long fragment must not outweigh the short ones
        y = np.array([getattr(cost, side) for cost in costs])
        x = np.array(rows, np.float64) / y[:, None]
        found |= dict(zip(keys, np.linalg.lstsq(x, np.ones(len(y)), rcond=None)[0].tolist(), strict=True))
    return found


def predicted(m: dict[str, float], n_steps: int, n_per_batch: int) -> float:
    """µs of CPU time of one step, in all, with a publish for each batch."""
    worker = m["step_us"] * n_steps * B + m["fragment_us"] + m["adopt_us"]
    learner = m["take_us"] + (m["batch_us"] + m["publish_us"]) / n_per_batch
    return (worker + learner) / (n_steps * B)


def one_round(references: list[Running], counted: dict[int, Running], seconds: float) -> dict[str, float]:
    """All take their turns."""
    figures = model([running.measure(seconds) for running in references]) if references else {}
    for n, running in counted.items():
        cost = running.measure(seconds)
        figures |= {
            f"steps_per_s_{n}": T * B * 1e6 / cost.clock,
            f"cpu_us_per_step_{n}": cost.all / (T * B),
            f"worker_us_per_step_{n}": cost.worker / (T * B),
            f"learner_us_per_fragment_{n}": cost.learner,
        }
        if references:
            figures[f"model_over_measured_{n}"] = predicted(figures, T, P) / figures[f"cpu_us_per_step_{n}"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-model", action="store_true", help="only steps per second and their cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    found: list[dict[str, float]] = []
    with contextlib.ExitStack() as opened:
        references = [] if args.no_model else [Running(case, opened) for case in MODEL]
        counted = {n: Running(Case(n, T, P, True), opened) for n in args.workers}
        for _ in range(args.rounds):
            found.append(one_round(references, counted, args.seconds))
    figures = {name: statistics.median(r[name] for r in found) for name in found[0]}
    for n in args.workers:
        print(
            f"{n:3} workers: {figures[f'steps_per_s_{n}']:9,.0f} steps/s, {figures[f'cpu_us_per_step_{n}']:6.2f} µs of "
            f"CPU time for a step, the model says {figures.get(f'model_over_measured_{n}', math.nan):.2f} of that"
        )
    figures |= {"fragment_bytes": counted[args.workers[0]].nbytes, "load": load, "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({name: round(float(value), 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
