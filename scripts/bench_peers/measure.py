"""The process of one measurement, with the interpreter of the system's own environment.

    python -m bench_peers.measure SYSTEM WORK --seconds 5 --warm-up 2 --seed 1

The last line of output is a JSON object: ``value`` (steps per second; for "solve" the steps that it took, or null
where it was given up, ``warm_s``, the seconds from the first batch to the goal, and ``after_s``, those since then),
and the versions of what it ran on."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import time
from typing import Any

from bench_peers.systems import SYSTEMS
from bench_peers.window import Window
from bench_peers.work import WORKS

PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "envpool", "mujoco", "minigrid")


def versions(*more: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    system, work = SYSTEMS[args.system], WORKS[args.work]
    if system.package == "zrl" and work.name == "solve":  # as `zrl train` does, before torch is imported
        importlib.import_module("zrl").prestart()
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    module: Any = importlib.import_module(f"bench_peers.systems.{system.module}")
    result: dict[str, Any]
    if work.name == "solve":
        steps, first, goal = module.solve(args.seed, **system.options)
        result = {"value": steps, "warm_s": goal - first, "after_s": time.perf_counter() - goal}
    else:
        window = Window(args.seconds, args.warm_up)
        module.run(work, window, **system.options)
        result = {"value": window.rate, "seconds": window.seconds, "steps": window.steps}
    print(json.dumps({**result, "versions": versions(system.package)}), flush=True)
    os._exit(0)  # some peers' processes and threads would keep us here; ours are ended by whoever started us


if __name__ == "__main__":
    main()
