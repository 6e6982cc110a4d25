"""The pipeline against the loop that it is made of: two workers, CartPole-v1, B = 16, T = 64.

    python scripts/bench_pipeline.py [--seconds 1.0] [--rounds 9] [--soak [--batches 10000]]

In every round `collect` alone and the pipeline take turns; while one runs, the other stands still: the workers have run
out of slots then. Ratios are medians of the rounds' ratios. The consumer touches each batch, and does nothing else. The
last line is one flat JSON object:

- ``pipeline_over_collect``: environment steps per second of two workers against one loop in one process.
- ``learner_us_per_fragment``: what a fragment costs the learner's Python threads in user mode, in microseconds, which
  bounds the time for which they hold the GIL: they let go of it in system calls. At a high rate: fragments of one step,
  8 a batch, nothing published. ``learner_cpu_us_per_fragment``: system calls included.
- ``learner_us_per_fragment_w1``: the same during the rounds above, 2 fragments a batch and a publish each, where the
  workers evict the learner's code from the caches between two fragments.
- ``gather_over_memcpy``: bytes per second from 4 slots to a batch, fragments of 4 MiB, against one plain copy.

``--soak``: many batches of short fragments; ``rss_slope_kib_per_1000``: growth of the learner's resident memory, by
least squares over what follows the first tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_collect import Actor

from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import collect
from zrl.data.fragment import Slot
from zrl.data.spec import FragmentSpec
from zrl.nodes.buffers import HostBuffers
from zrl.rollout import multi
from zrl.rollout.pipeline import PipelineRollout
from zrl.rollout.same import private_copy

B, T, WORKERS = 16, 64, 2


def make_env() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", disable_env_checker=True)


def pipeline(n_steps: int = T, n_columns: int = B, n_per_batch: int = 2, **options: Any) -> PipelineRollout:
    n_buffers = max(8, 2 * n_per_batch)
    it = multi.rollout(make_env, Actor(), n_steps, WORKERS, n_columns, n_buffers, n_per_batch, entropy=1, **options)
    assert isinstance(it, PipelineRollout)
    return it


def touch(it: PipelineRollout) -> int:
    """Take one batch; its environment steps."""
    batch = next(it)
    float(batch.state.obs[0, 0, 0])
    return int(batch.mask.numel())


def wait_until_idle(it: PipelineRollout) -> None:
    """Until the workers have filled all that they were granted."""
    deadline = time.monotonic() + 30
    while it.stats()["slots"]["worker"]:
        if time.monotonic() > deadline:
            raise TimeoutError("the workers do not run out of slots")
        time.sleep(0.01)


class Cost:
    """CPU time of the threads that run Python since this was made; libzmq's own threads never take the GIL."""

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[float, int, int]:
        total = user = system = 0
        for thread in threading.enumerate():
            task = Path(f"/proc/self/task/{thread.native_id}")
            total += int((task / "schedstat").read_text().split()[0])
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            user, system = user + int(fields[11]), system + int(fields[12])
        return total / 1e3, user, system

    def microseconds(self) -> tuple[float, float]:
        """In all, and in user mode. The sum is exact; the share of user mode is sampled a hundred times a second."""
        total, user, system = (now - then for now, then in zip(self._read(), self._before, strict=True))
        return total, total * user / max(1, user + system)


def rates(seconds: float, rounds: int) -> dict[str, float]:
    options = CollectOptions(n_steps=T, n_columns=B, entropy=1)
    ctx = build(make_env, private_copy(Actor(), torch.device("cpu"), "train"), options)
    slot = Slot(ctx.spec)
    alone, together, ratios = [], [], []
    user, fragments = 0.0, 0
    with pipeline() as it:
        touch(it)
        for _ in range(rounds):
            wait_until_idle(it)
            started, n = time.perf_counter(), 0
            while (spent := time.perf_counter() - started) < seconds:
                collect(ctx, slot)
                n += T * B
            alone.append(n / spent)
            for _ in range(5):  # what lay ready
                touch(it)
            started, cost, n = time.perf_counter(), Cost(), 0
            while (spent := time.perf_counter() - started) < seconds:
                n += touch(it)
            together.append(n / spent)
            user += cost.microseconds()[1]
            fragments += n // (T * B)
            ratios.append(together[-1] / alone[-1])
    ctx.columns.close()
    return {
        "collect_steps_per_s": statistics.median(alone),
        "pipeline_steps_per_s": statistics.median(together),
        "pipeline_over_collect": statistics.median(ratios),
        "learner_us_per_fragment_w1": user / fragments,
    }


def learner_cost(seconds: float) -> dict[str, float]:
    """Microseconds a fragment, at a high rate."""
    with pipeline(1, 1, 8, auto_publish=False) as it:
        for _ in range(50):
            touch(it)
        started, cost, n = time.perf_counter(), Cost(), 0
        while time.perf_counter() - started < seconds:
            n += touch(it)
        total, user = cost.microseconds()
    return {"learner_us_per_fragment": user / n, "learner_cpu_us_per_fragment": total / n}


def gather(rounds: int) -> float:
    """Slot to batch against a plain copy of as many bytes."""
    spec = large_spec((64, 64))
    p = 4
    sources = [Slot(spec) for _ in range(p)]
    buffers = HostBuffers(spec, p)
    plain = [np.zeros(p * spec.nbytes, np.uint8) for _ in range(2)]
    ratios = []
    for k in range(rounds + 1):
        started = time.perf_counter()
        buffers.fill(k % buffers.n_buffers, sources)
        mine = time.perf_counter() - started
        started = time.perf_counter()
        plain[0][:] = plain[1]
        ratios.append((time.perf_counter() - started) / mine)
    return statistics.median(ratios[1:])


def large_spec(shape: tuple[int, ...]) -> FragmentSpec:
    """Fragments of 16 rows of 16 observations of this shape: some 4 MiB."""

    class Env(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(-1.0, 1.0, shape, np.float32)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return np.zeros(shape, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(shape, np.float32), 0.0, False, False, {}

    class Flat(Actor):
        def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> tuple[Any, Any, Any]:
            return super().forward(obs.flatten(2)[..., :4], act, rew, fin, hx=hx)

    ctx = build(Env, Flat().requires_grad_(False), CollectOptions(n_steps=15, n_columns=16))
    ctx.columns.close()
    return ctx.spec


def soak(batches: int) -> dict[str, float]:
    samples = []
    page = os.sysconf("SC_PAGE_SIZE")
    with pipeline(2, 2, 2) as it:
        for n in range(batches):
            touch(it)
            if n % max(1, batches // 200) == 0 and n >= batches // 10:
                samples.append((n, int(Path("/proc/self/statm").read_text().split()[1]) * page / 1024))
    x, y = np.array(samples).T
    slope = float(np.polyfit(x / 1000, y, 1)[0])
    print(f"{batches} batches: resident memory {y[0]:,.0f} to {y[-1]:,.0f} KiB, {slope:.1f} KiB per 1,000 batches")
    return {"rss_slope_kib_per_1000": slope, "batches": float(batches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--batches", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.soak:
        figures = soak(args.batches)
    else:
        figures = rates(args.seconds, args.rounds)
        figures |= learner_cost(args.seconds * args.rounds)
        figures["gather_over_memcpy"] = gather(10 * args.rounds)
        for name, value in figures.items():
            print(f"{name:28} {value:,.2f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
