"""What a CUDA learner pays for its data, and for its weights. Without a CUDA device it says so and exits with 1.

    python scripts/bench_cuda.py [--device cuda] [--seconds 2] [--rounds 5]

No workers: fragments lie in a ring of shared memory, as a local worker's do, which is registered with CUDA. The last
line is one flat JSON object, medians of the rounds:

- ``h2d_over_pinned``: bytes per second that come out of the feed as whole batches, 8 fragments of 4 MiB each, against
  the same number of plain copies from pinned memory to the device, in turns. ``h2d_gb_per_s`` and ``pinned_gb_per_s``.
  ``pageable_over_pinned``: the feed with a ring that is not registered.
- ``stall_share``: of the time of the learner's stream, what passes between its last kernel for one batch and the moment
  at which it has the next one. The learner multiplies matrices for three times as long as a batch takes to be copied,
  and for no less than 5 ms, and asks for a batch as soon as it has enqueued that.
- ``publish_ms_6_4mb``: by how much one `publish` of 6.4 MB delays the learner's stream: from its last kernel before to
  its first one after it. ``publish_host_ms_6_4mb``: in the user's thread, with nothing to wait for.

``--device cpu`` runs the same without a device, to try the script: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_weights import SIZES, Heavy

from zrl.data.batch import FragmentMeta
from zrl.data.fragment import Slot
from zrl.data.ring import Ring
from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.nodes.feed import Feed, Filled
from zrl.nodes.publisher import Publisher

PATIENCE = 60.0
P = 8
LEAST_WORK = 5e-3  # seconds of the learner's stream for a batch
DUTY = 3.0  # of that: times what a batch takes to be copied
PIXELS = 84 * 84 * 4


def spec_of(nbytes: int) -> FragmentSpec:
    """Fragments of about so many bytes, most of them frames of 8 columns."""
    n_steps = max(1, nbytes // (8 * PIXELS) - 1)
    value = {"value": ArraySpec("float32"), "logits": ArraySpec("float32", (6,))}
    return FragmentSpec.build(n_steps, 8, obs=ArraySpec("uint8", (4, 84, 84)), act=ArraySpec("int64"), actor=value)


class Clock:
    """Moments of the learner's stream; of the process, where there is no device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda: Any = torch.cuda  # partly untyped

    def now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def seconds(self, begun: Any, ended: Any) -> float:
        """Between two moments that are over: `wait` first."""
        return float(ended - begun if self._device.type != "cuda" else begun.elapsed_time(ended) / 1e3)

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Source:
    """A feed, and the slots of one ring that it is given again and again, two batches of them."""

    def __init__(self, spec: FragmentSpec, ring: Ring, device: torch.device, *, register: bool) -> None:
        self._slots = [Slot(spec, ring.slot(k)) for k in range(ring.n_slots)]
        self._memory = ring.memory.data
        self._metas = [FragmentMeta(1, 0, 1) for _ in range(P)]
        self._n = 0
        self.feed = Feed(P, device, on_copied=lambda _: None)
        self.feed.begin(spec)
        self._registered = register and self.feed.register(self._memory)
        if register and device.type == "cuda" and not self._registered:
            raise SystemExit("bench_cuda.py: CUDA does not register the ring: nothing to measure")

    def submit(self) -> None:
        first = self._n % 2 * P
        self.feed.submit(self._n, self._slots[first : first + P], self._metas)
        self._n += 1

    def take(self) -> Filled:
        filled = self.feed.take(PATIENCE)
        if filled is None:
            raise TimeoutError("the feed has no batch")
        return filled

    def close(self) -> None:
        self.feed.close(PATIENCE)
        if self._registered:
            self.feed.unregister(self._memory)
        self._slots.clear()


@contextlib.contextmanager
def source(spec: FragmentSpec, device: torch.device, *, register: bool = True) -> Iterator[Source]:
    with Ring.create(spec.nbytes, 2 * P, run_id=bytes(16), incarnation=bytes(16), digest=spec.digest) as ring:
        ring.memory.data[4096:] = 1  # pages of their own, and no flag but 0 and 1
        made = Source(spec, ring, device, register=register)
        try:
            yield made
        finally:
            made.close()
            del made


def fed(source: Source, clock: Clock, seconds: float, nbytes: int) -> float:
    """Bytes per second through the feed, which always has the next batch to begin with."""
    source.submit()
    source.submit()
    source.take()
    clock.wait()
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        source.submit()
        source.take()
        n += 1
    clock.wait()
    rate = n * P * nbytes / (time.perf_counter() - started)
    source.take()
    return rate


def pinned(clock: Clock, device: torch.device, seconds: float, nbytes: int) -> float:
    """Bytes per second of plain copies, the host as far ahead as with the feed."""
    sources = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2 * P)]
    targets = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(P)]
    clock.wait()
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for k, to in enumerate(targets):
            to.copy_(sources[n % 2 * P + k], non_blocking=True)
        n += 1
        clock.wait()
    return n * P * nbytes / (time.perf_counter() - started)


def rates(spec: FragmentSpec, device: torch.device, seconds: float, rounds: int) -> dict[str, float]:
    clock, nbytes = Clock(device), spec.nbytes
    found: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        with source(spec, device) as registered:
            mine = fed(registered, clock, seconds, nbytes)
        plain = pinned(clock, device, seconds, nbytes)
        with source(spec, device, register=False) as pageable:
            found.append((mine, plain, fed(pageable, clock, seconds, nbytes)))
    return {
        "h2d_over_pinned": statistics.median(mine / plain for mine, plain, _ in found),
        "pageable_over_pinned": statistics.median(pageable / plain for _, plain, pageable in found),
        "h2d_gb_per_s": statistics.median(mine for mine, _, _ in found) / 1e9,
        "pinned_gb_per_s": statistics.median(plain for _, plain, _ in found) / 1e9,
    }


class Work:
    """Something for the learner's stream to do, for about so long."""

    def __init__(self, clock: Clock, device: torch.device, seconds: float) -> None:
        self._clock = clock
        side = 1024 if device.type == "cuda" else 128
        self._a, self._out = (torch.zeros(side, side, device=device) for _ in range(2))
        self.n = 1
        self()
        self.n = 20
        once = self.seconds() / self.n
        self.n = max(1, round(seconds / once))

    def __call__(self) -> None:
        for _ in range(self.n):
            torch.mm(self._a, self._a, out=self._out)

    def seconds(self) -> float:
        self._clock.wait()
        begun = self._clock.now()
        self()
        ended = self._clock.now()
        self._clock.wait()
        return self._clock.seconds(begun, ended)


def stall_share(spec: FragmentSpec, device: torch.device, seconds: float, batch_seconds: float) -> float:
    """The learner's loop: its stream stands still from the end of the work for one batch to the next `take`."""
    clock = Clock(device)
    work = Work(clock, device, max(LEAST_WORK, DUTY * batch_seconds))
    stalls: list[tuple[Any, Any]] = []
    with source(spec, device) as of:
        of.submit()
        of.take()
        of.submit()
        clock.wait()
        started, first = time.perf_counter(), clock.now()
        while time.perf_counter() - started < seconds:
            begun = clock.now()
            filled = of.take()
            stalls.append((begun, clock.now()))
            of.submit()
            filled.record.state.rew.sum()
            work()
            if len(stalls) > 2 and device.type == "cuda":  # as a loop that looks at its loss, two batches late
                stalls[-2][1].synchronize()
        last = clock.now()
        clock.wait()
        of.take()
    return sum(clock.seconds(*moments) for moments in stalls) / clock.seconds(first, last)


def publish(device: torch.device, rounds: int) -> dict[str, float]:
    clock = Clock(device)
    publisher = Publisher(Heavy(SIZES["6_4mb"]).to(device), run_id=os.urandom(16))
    work = Work(clock, device, LEAST_WORK)
    stream, host = [], []
    try:
        for _ in range(10 * rounds):
            work()
            begun = clock.now()
            publisher.publish(lambda _: None)
            ended = clock.now()
            clock.wait()
            stream.append(clock.seconds(begun, ended))
            started = time.perf_counter()
            publisher.publish(lambda _: None)
            host.append(time.perf_counter() - started)
    finally:
        publisher.close()
    return {
        "publish_ms_6_4mb": statistics.median(stream) * 1e3,
        "publish_host_ms_6_4mb": statistics.median(host) * 1e3,
    }


def measure(device: torch.device, seconds: float, rounds: int, nbytes: int) -> dict[str, float]:
    spec = spec_of(nbytes)
    figures = rates(spec, device, seconds, rounds)
    batch_seconds = P * spec.nbytes / (figures["h2d_gb_per_s"] * 1e9)
    figures["stall_share"] = statistics.median(stall_share(spec, device, seconds, batch_seconds) for _ in range(rounds))
    return figures | publish(device, rounds)


def check(device: torch.device) -> None:
    """Leave with a reason where it cannot be measured."""
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "torch sees no device" if torch.backends.cuda.is_built() else f"torch {torch.__version__} is without CUDA"  # type: ignore[no-untyped-call]
        raise SystemExit(f"bench_cuda.py: needs a CUDA device: {why}; --device cpu only tries the script")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SystemExit(f"bench_cuda.py: there is no {device}, only {torch.cuda.device_count()} CUDA devices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kib", type=int, default=4096, help="of a fragment, about")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    check(device)
    if device.type == "cuda":
        device = torch.empty(0, device=device).device  # with its index
        print(torch.cuda.get_device_name(device), flush=True)
    figures = measure(device, args.seconds, args.rounds, args.kib << 10)
    print(json.dumps({name: round(float(np.float64(value)), 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
