"""Fragments over tcp, on loopback: against bare pyzmq, and against shared memory.

    python scripts/bench_remote.py [--seconds 1.0] [--rounds 7]

What is compared takes turns; while one runs, the other stands still, for want of credits. Ratios are medians of the
rounds' ratios. The last line is one flat JSON object:

- ``tcp_over_pyzmq_1mib``, ``tcp_over_pyzmq_4mib``: fragments per second from one sender to the training loop, through
  the collator and into batches, over messages per second of a bare pair of the same sizes: a DEALER that sends
  [number, bytes] with ``copy=False`` for each credit, and a ROUTER that receives them with ``copy=False`` and lets them
  go. Two credits each. The sender is a process of its own and does nothing else: it steps no environment.
  ``tcp_over_pyzmq`` is the smaller of the two; ``tcp_mib_per_s_4mib`` and ``pyzmq_mib_per_s_4mib`` are the rates.
- ``remote_over_local_cartpole``, ``remote_over_local_pong``: environment steps per second with ``zrl worker --no-shm``
  over those with ``zrl worker``, two workers each: CartPole-v1 (T 64, B 16) and Pong as 84×84×4 pictures (T 32, B 4;
  only where the extra ``atari`` is installed).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import zmq

from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.net.link import Link, LinkLost
from zrl.net.sockets import lasting_frames, make_context, make_router
from zrl.protocol import messages as m
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import MLPActor, default_actor

LIMIT = 30.0  # seconds for whatever should take few
T, B, CREDITS = 16, 4, 2
ROOT = Path(__file__).parents[1]
PARTS = ["pyzmq", "cartpole", "pong"]


# ── against pyzmq ────────────────────────────────────────────────────────────────────────────────────────────────────


def spec_of(mib: int) -> FragmentSpec:
    """Fragments of about so many MiB."""
    obs = ArraySpec("uint8", ((mib << 20) // ((T + 1) * B),))
    return FragmentSpec.build(T, B, obs=obs, act=ArraySpec("int64"), actor={"value": ArraySpec("float32")})


def send_bare(url: str, nbytes: int) -> None:
    """The bare sender, until there is no credit for long."""
    context = make_context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(url)
    data = [np.ones(nbytes, np.uint8).data for _ in range(CREDITS)]
    dealer.send(b"hello")
    while dealer.poll(int(LIMIT * 1000)):
        k = dealer.recv()
        dealer.send_multipart([k, data[k[0]]], copy=False)
    context.destroy()


def send_fragments(url: str, mib: int) -> None:
    """A remote worker without environments, until the learner ends it."""
    spec = spec_of(mib)
    ids: Any = {"protocol": 1, "versions": (), "process": m.NO_ID, "boot_id": "", "index": 0, "generation": 0}
    slots = [lasting_frames(np.ones(spec.nbytes, np.uint8).data) for _ in range(CREDITS)]
    with contextlib.closing(Link(url)) as host, contextlib.closing(Link(url)) as link, contextlib.suppress(LinkLost):
        his = m.Hello(m.NO_ID, os.urandom(16), role="host", name="bench", host=m.NO_ID, count=1, **ids)
        host.send(his)
        host.receive(LIMIT)
        me = m.Hello(m.NO_ID, os.urandom(16), role="worker", name="bench", host=his.incarnation, count=0, **ids)
        link.send(me)
        welcome = link.receive(LIMIT)
        assert isinstance(welcome, m.Welcome)
        run = (welcome.run_id, me.incarnation)
        link.send(
            m.Attach(
                *run, spec.to_plain(), spec.digest, CREDITS, spec.nbytes, pid=0, fd=-1, nbytes=0, boot_id="", path=""
            )
        )
        assert isinstance(link.receive(LIMIT), m.Attached)
        seq, beat = 0, 0.0
        while True:
            if time.monotonic() > beat:
                beat = time.monotonic() + 1.0
                host.send(m.Beat(welcome.run_id, his.incarnation, ()))
            release = link.receive(1.0)
            if isinstance(release, m.Release):
                seq += 1
                link.send(
                    m.Ready(*run, release.slot, seq, release.least_version, *(0.0,) * 6, T * B), *slots[release.slot]
                )
            elif release is not None:
                return


class Bare:
    """The receiving end of the bare pair."""

    def __init__(self, url: str, nbytes: int) -> None:
        self.context = make_context()
        self.router = make_router(self.context)
        self.router.setsockopt(zmq.MAXMSGSIZE, -1)
        self.router.bind(url)
        url = self.router.get_string(zmq.LAST_ENDPOINT)
        self.process = started("bare", url, str(nbytes))
        if not self.router.poll(int(LIMIT * 1000)):
            raise TimeoutError("the bare sender does not come")
        self.peer = self.router.recv_multipart()[0]

    def run(self, seconds: float) -> float:
        """Messages per second; all credits are back at the end."""
        for k in range(CREDITS):
            self.router.send_multipart([self.peer, bytes([k])])
        begin, n, out = time.perf_counter(), 0, CREDITS
        while out:
            if not self.router.poll(int(LIMIT * 1000)):
                raise TimeoutError("the bare sender stands still")
            peer, slot, _ = self.router.recv_multipart(copy=False)
            n, out = n + 1, out - 1
            if time.perf_counter() - begin < seconds:
                self.router.send_multipart([peer, slot], copy=False)
                out += 1
        return n / (time.perf_counter() - begin)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.context.destroy()


def started(what: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--sender", what, *words])


def against_pyzmq(mib: int, seconds: float, rounds: int) -> tuple[float, float, float]:
    """zrl's fragments over bare messages, and MiB per second of both."""
    nbytes = spec_of(mib).nbytes
    with contextlib.ExitStack() as opened:
        bare = Bare("tcp://127.0.0.1:*", nbytes)
        opened.callback(bare.close)
        it = opened.enter_context(listening("none", MLPActor(*SPACES), T, B, CREDITS, 1))
        opened.enter_context(ended(started("fragments", it.urls[0], str(mib))))
        next(it)
        ours, theirs = [], []
        for _ in range(rounds):
            settled(it)
            theirs.append(bare.run(seconds))
            for _ in range(CREDITS + 2):  # what lay ready
                next(it)
            ours.append(rate(it, seconds, lambda batch: 1))
    size = nbytes / (1 << 20)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return ratio, size * statistics.median(ours), size * statistics.median(theirs)


# ── against shared memory ────────────────────────────────────────────────────────────────────────────────────────────

SPACES = (gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2))


def listening(env: str, actor: torch.nn.Module, t: int, b: int, k: int, p: int) -> PipelineRollout:
    return cluster.rollout(env, actor, t, b, k, p, bind="tcp://127.0.0.1:*", entropy=1, auto_publish=False)


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rate(it: PipelineRollout, seconds: float, steps: Callable[[Any], int]) -> float:
    begin, n = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        n += steps(next(it))
    return n / spent


def settled(it: PipelineRollout) -> None:
    """Until its workers have run out of slots."""
    deadline = time.monotonic() + LIMIT
    while it.stats()["slots"]["worker"]:
        if time.monotonic() > deadline:
            raise TimeoutError("the workers do not run out of slots")
        time.sleep(0.01)


def remote_over_local(
    env: str, actor: torch.nn.Module, t: int, b: int, seconds: float, rounds: int
) -> dict[str, float]:
    n_workers = 2
    rates: dict[str, list[float]] = {"local": [], "remote": []}
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        its: dict[str, PipelineRollout] = {}
        for name, words in (("local", []), ("remote", ["--no-shm"])):
            it = its[name] = opened.enter_context(listening(env, actor, t, b, 3, n_workers))
            command = [
                sys.executable,
                "-m",
                "zrl",
                "worker",
                "--connect",
                it.urls[0],
                "--count",
                str(n_workers),
                *words,
            ]
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            log = opened.enter_context((folder / name).open("wb"))
            process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
            opened.enter_context(ended(process))
            for _ in range(6):
                next(it)
        for _ in range(rounds):
            for name, it in its.items():
                for _ in range(4):  # what lay ready
                    next(it)
                rates[name].append(rate(it, seconds, lambda batch: int(batch.mask.numel())))
                settled(it)
    return {
        "ratio": statistics.median(a / b for a, b in zip(rates["remote"], rates["local"], strict=True)),
        **{f"{name}_steps_per_s": statistics.median(found) for name, found in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each arm in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--sender", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.sender:
        what, url, size = options.sender
        (send_bare if what == "bare" else send_fragments)(url, int(size))
        return
    figures: dict[str, float] = {}
    for mib in (1, 4) if "pyzmq" in options.parts else ():
        ratio, ours, theirs = against_pyzmq(mib, options.seconds, options.rounds)
        figures |= {
            f"tcp_over_pyzmq_{mib}mib": ratio,
            f"tcp_mib_per_s_{mib}mib": ours,
            f"pyzmq_mib_per_s_{mib}mib": theirs,
        }
    if figures:
        figures["tcp_over_pyzmq"] = min(figures["tcp_over_pyzmq_1mib"], figures["tcp_over_pyzmq_4mib"])
    if "cartpole" in options.parts:
        found = remote_over_local("CartPole-v1", MLPActor(*SPACES), 64, 16, options.seconds, options.rounds)
        figures |= {"remote_over_local_cartpole": found.pop("ratio"), **{f"cartpole_{k}": x for k, x in found.items()}}
    if "pong" in options.parts and importlib.util.find_spec("ale_py") and importlib.util.find_spec("cv2"):
        pong = gym.make("zrl/Atari-v0")
        actor = default_actor(pong.observation_space, pong.action_space)
        found = remote_over_local("zrl.zoo:zrl/Atari-v0", actor, 32, 4, options.seconds, options.rounds)
        figures |= {"remote_over_local_pong": found.pop("ratio"), **{f"pong_{k}": x for k, x in found.items()}}
    print(json.dumps({name: round(x, 4) for name, x in figures.items()}))


if __name__ == "__main__":
    main()
