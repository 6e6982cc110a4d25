"""How long it takes until what was killed works again.

    python scripts/bench_recovery.py [--kills 50] [--storm 60] [--restarts 3]

CartPole-v1, two workers with 8 environments each, T = 32. The last line is one flat JSON object:

- ``replace_s_median``, ``replace_s_worst``: from SIGKILL of a worker until the first fragment of the one that takes its
  place is yielded. The wait of 0.5 s before a first restart is in it; kills are far enough apart to be first ones.
- ``rejoin_s``: from the restart of a learner at the same address, after its SIGKILL, until it yields four fifths of the
  steps per second of before, for half a second, from the workers of a `zrl worker` that was left alone; median, and
  ``rejoin_s_worst``. The start of the learner's interpreter is in it.
- ``storm_over_calm``: environment steps per second while a worker is killed every 0.3 to 2 s, against those before.
  ``storm_kills``; ``storm_lost``: fragments that were lost or dropped by it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

import zrl.rollout.local
from zrl.nodes.host import Patience
from zrl.rollout import cluster, multi
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import MLPActor

WORKERS, T, B, P = 2, 32, 8, 2
LIMIT = 60.0  # seconds for anything
ROOT = Path(__file__).parents[1]


def make_env() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", disable_env_checker=True)


def actor() -> MLPActor:
    return MLPActor(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2))


@contextlib.contextmanager
def local() -> Iterator[PipelineRollout]:
    """Workers of our own, which may die as often as they like; every death is a first one after a second."""
    vars(zrl.rollout.local)["Patience"] = functools.partial(Patience, restarts=10**6, window=1.0)
    with multi.rollout(make_env, actor(), T, WORKERS, B, 4 * WORKERS, P, entropy=1) as it:
        assert isinstance(it, PipelineRollout)
        run(it, 1.0)
        yield it


def run(it: PipelineRollout, seconds: float) -> float:
    """Take batches for so long; steps per second."""
    begin, steps = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        steps += int(next(it).mask.numel())
    return steps / spent


def children(it: PipelineRollout) -> dict[int, int]:
    """Process ids of the workers, by index."""
    host = it._collator._host
    assert host is not None
    return {kid.index: kid.child.pid for kid in list(host.kids.values()) if kid.child.pid}


def replacements(kills: int) -> dict[str, float]:
    took = []
    with local() as it:
        for n in range(kills):
            run(it, 1.2)  # the one before is not counted any more
            index = n % WORKERS
            os.kill(children(it)[index], signal.SIGKILL)
            begin = time.perf_counter()
            while not any(meta.worker == index and meta.seq == 1 for meta in next(it).meta):
                if time.perf_counter() - begin > LIMIT:
                    raise TimeoutError(f"worker {index} is not replaced")
            took.append(time.perf_counter() - begin)
    return {"replace_s_median": statistics.median(took), "replace_s_worst": max(took)}


def storm(seconds: float) -> dict[str, float]:
    rng = random.Random(1)
    with local() as it:
        calm = run(it, min(seconds, 10.0))
        steps, kills, begin, next_kill = 0, 0, time.perf_counter(), 0.0
        while (spent := time.perf_counter() - begin) < seconds:
            if spent >= next_kill:
                next_kill = spent + rng.uniform(0.3, 2.0)
                if pids := list(children(it).values()):
                    os.kill(rng.choice(pids), signal.SIGKILL)
                    kills += 1
            steps += int(next(it).mask.numel())
        fragments = it.stats()["fragments"]
    lost = fragments["lost"] + fragments["dropped"]
    return {"storm_over_calm": steps / spent / calm, "storm_kills": kills, "storm_lost": lost}


# ── the learner as a process ─────────────────────────────────────────────────────────────────────────────────────────


def learn(url: str) -> None:
    """Say every tenth of a second how many steps there were in it."""
    with cluster.rollout("CartPole-v1", actor(), T, B, 4, P, bind=url) as it:
        begin, steps = time.monotonic(), 0
        while True:
            steps += int(next(it).mask.numel())
            if (now := time.monotonic()) - begin >= 0.1:
                print(steps / (now - begin), flush=True)
                begin, steps = now, 0


def started(*words: str, log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *words], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
        )


def rates(log: Path) -> list[float]:
    *lines, _ = ["", *log.read_text().split("\n")]
    return [float(line) for line in lines if line.replace(".", "", 1).isdigit()]


def wait_for(log: Path, n: int, least: float = 0.0) -> None:
    """Until `n` tenths of a second in a row had at least so many steps a second."""
    deadline = time.monotonic() + LIMIT
    while True:
        found = rates(log)[-n:]
        if len(found) == n and min(found) >= least:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(log.read_text()[-2000:])
        time.sleep(0.02)


def rejoining(restarts: int) -> dict[str, float]:
    took = []
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))  # 0700
        url = f"ipc://{folder}/l"

        def start(*words: str, log: Path) -> subprocess.Popen[bytes]:
            process = started(*words, log=log)
            opened.callback(process.wait)
            opened.callback(process.kill)
            return process

        start("-m", "zrl", "worker", "--connect", url, "--count", str(WORKERS), log=folder / "worker")
        learner = start(__file__, "--learner", url, log=folder / "0")
        wait_for(folder / "0", 10)
        for n in range(1, restarts + 1):
            before = statistics.median(rates(folder / str(n - 1))[-10:])
            learner.kill()
            learner.wait()
            begin = time.perf_counter()
            learner = start(__file__, "--learner", url, log=folder / str(n))
            wait_for(folder / str(n), 5, 0.8 * before)
            took.append(time.perf_counter() - begin)
            wait_for(folder / str(n), 10)
    return {"rejoin_s": statistics.median(took), "rejoin_s_worst": max(took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--storm", type=float, default=60.0, metavar="S", help="seconds of the storm")
    parser.add_argument("--restarts", type=int, default=3, help="of the learner")
    parser.add_argument("--learner", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.learner:
        learn(options.learner)
        return
    figures = {**replacements(options.kills), **storm(options.storm), **rejoining(options.restarts)}
    print(json.dumps({name: round(x, 3) for name, x in figures.items()}))


if __name__ == "__main__":
    main()
