"""What one bad peer costs the healthy ones.

    python scripts/bench_hostile.py [--seconds 3] [--rounds 7] [--rate 1000] [--kinds noise fuzz ready parts]

CartPole-v1, two workers with 16 environments each, T = 64, one batch after the other. An attacker, a process of its own
that has no key and needs none, sends `--rate` messages a second: to the learner, or, as the control, the very same ones
to a ROUTER that reads them and throws them away, in a third process. So both cost the machine an attacker; the rest is
what the learner does about it. The two take turns in every round, for each kind of attack:

- ``noise``: 200 random bytes. ``fuzz``: messages of all kinds with some bytes changed. ``ready``: well-formed Readys in
  the name of a worker of this run, for slots that are not the sender's. ``parts``: messages of 100 parts.

The last line is one flat JSON object: ``attacked_over_control``, the least of ``attacked_over_control_KIND``: steps per
second under attack over those under the control, medians of the rounds' ratios. ``sent_per_s``: what the attacker got
rid of.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import zmq

from zrl.net import sockets as z
from zrl.net.codec import encode
from zrl.protocol import messages as m
from zrl.rollout import multi
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import MLPActor

WORKERS, T, B, P = 2, 64, 16, 2
KINDS = ("noise", "fuzz", "ready", "parts")
BURST = 0.01  # seconds: so often the attacker sends what is due
LIMIT = 60.0


def make_env() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", disable_env_checker=True)


def attack(url: str, kind: str, rate: float, run_id: bytes, victim: bytes) -> None:
    """For ever, at this rate; says each second how many it has sent."""
    rng = random.Random(1)
    context = z.make_context()
    dealer = z.make_dealer(context)
    z.connect(dealer, url)
    ready = encode(m.Ready(run_id, victim, 0, 1_000_000, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1))
    others = [
        ready,
        encode(m.Fetch(run_id, victim)),
        encode(m.Bye(run_id, victim)),
        encode(m.Release(run_id, victim, 0, 1)),
    ]

    def fuzzed() -> list[bytes]:
        data = bytearray(rng.choice(others))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return [bytes(data)]

    make: dict[str, Callable[[], list[bytes]]] = {
        "noise": lambda: [rng.randbytes(200)],
        "fuzz": fuzzed,
        "ready": lambda: [ready],
        "parts": lambda: [ready, *[b"part"] * 100],
    }
    dealer.poll(int(LIMIT * 1000), zmq.POLLOUT)
    begin, n, said = time.monotonic(), 0, 0.0
    while True:
        spent = time.monotonic() - begin
        while n < spent * rate:
            z.send(dealer, *make[kind]())
            n += 1
        while dealer.poll(0):  # what the learner answers
            dealer.recv_multipart()
        if spent - said >= 0.5:
            print(n / spent, flush=True)
            said = spent
        time.sleep(BURST)


def sink(url: str) -> None:
    """The control: reads all, and does nothing with it."""
    router = z.make_router(z.make_context())
    z.bind(router, url)
    print("ready", flush=True)
    while True:
        router.poll()
        z.drain(router, lambda peer, header, rest: None)


@contextlib.contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[str]]:
    """This script in another part, until the end of the block; its first line has come."""
    started = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        assert started.stdout.readline(), f"{words} ended at once"
        yield started
    finally:
        started.kill()
        started.wait()
        if started.stdout is not None:
            started.stdout.close()


def rate(it: PipelineRollout, seconds: float) -> float:
    begin, steps = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        steps += int(next(it).mask.numel())
    return steps / spent


def measure(seconds: float, rounds: int, per_second: float, kinds: Sequence[str]) -> dict[str, float]:
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    sent = []
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        elsewhere = f"ipc://{folder}/sink"
        actor = MLPActor(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2))
        it = opened.enter_context(multi.rollout(make_env, actor, T, WORKERS, B, 4 * WORKERS, P, entropy=1))
        assert isinstance(it, PipelineRollout)
        rate(it, min(seconds, 1.0))
        ids = (it._collator.publisher.run_id.hex(), next(iter(it._collator.peers.workers)).hex())
        opened.enter_context(process("--sink", elsewhere))
        for n in range(rounds):
            for kind in kinds:
                found = {}
                for url in (elsewhere, it.urls[0]) if n % 2 else (it.urls[0], elsewhere):
                    with process("--attack", url, kind, str(per_second), *ids) as attacker:
                        rate(it, 0.1)
                        found[url] = rate(it, seconds)
                        attacker.kill()
                        assert attacker.stdout is not None
                        sent.append(float((attacker.stdout.read().split() or ["0"])[-1]))
                ratios[kind].append(found[it.urls[0]] / found[elsewhere])
        stats = it.stats()
        assert not stats["losses"], stats["losses"]
        assert sum(stats["refused"].values()) > 0
    figures = {f"attacked_over_control_{kind}": statistics.median(found) for kind, found in ratios.items()}
    return {"attacked_over_control": min(figures.values()), **figures, "sent_per_s": statistics.median(sent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate", type=float, default=1000.0, help="messages a second")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of attacks")
    parser.add_argument("--attack", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--sink", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.attack:
        url, kind, per_second, run_id, victim = options.attack
        attack(url, kind, float(per_second), bytes.fromhex(run_id), bytes.fromhex(victim))
    elif options.sink:
        sink(options.sink)
    else:
        figures = measure(options.seconds, options.rounds, options.rate, options.kinds)
        print(json.dumps({name: round(x, 3) for name, x in figures.items()}))


if __name__ == "__main__":
    main()
