"""One long-lived run, and everything that goes wrong around it: what must hold holds, and nothing grows.

    python scripts/soak.py [--minutes 30] [--seed N] [--gap 3.0]

The learner is this process. Two hosts of two workers each feed it, one through shared memory, one over the wire, and
guests come and go. Every few seconds one of these happens, drawn with one seed, which is printed and can be given again
(what is drawn is the same then; when it meets whom is up to the machine):

- ``kills``: SIGKILL of a worker.
- ``host_kills``: SIGKILL of a host; another one takes its name.
- ``stops``, ``host_stops``: SIGSTOP of a worker, or of a host with all its processes, and SIGCONT up to 12 s later.
- ``pauses``, ``crawls``: the loop here stands still for up to 8 s, or takes its time for every batch.
- ``bursts``: a hundred versions are published at once, past hosts that are stopped or still joining.
- ``guests``: another host joins, and leaves by SIGTERM or SIGKILL.

A host that has lost more workers than it may ends, and is started again, as a cluster's manager would. The first host
is never killed, and loses workers seldom: it is to live as long as the run.

The last line is one flat JSON object. ``violated`` names what did not hold, and the exit code is 1 then:

- ``I1``: for every live worker, free + worker + ready + held = K, by the state of each slot.
- ``I2``: no fragment is torn, delivered twice, or missing without being counted as dropped.
- ``I3``: committed = consumed + dropped + in flight.
- ``weights``: a fragment was made with more than one version of the weights, with another than it says, or with an
  older one than its worker had before.
- ``stuck``: no batch for a minute, or a minute after the last fault the hosts of the beginning are not there again.
- ``fds``, ``threads``, ``shared_kib``: of the learner, with the same hosts at the end as at the beginning: descriptors,
  threads and shared memory are what they were. ``host_fds`` and ``host_threads``: of the first host.
- ``rss``, ``host_rss``: resident memory grew over the second half by more than 8 MiB: the median of the slopes between
  any two samples (Theil and Sen), times the length. A median does not see the peaks that a fault makes.
- ``processes``: somebody outlived the run, or left a folder behind.
- ``ended``: an error ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import heapq
import itertools
import json
import logging
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from zrl import BaseActorModule, Batch
from zrl.errors import ZrlError
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

ROOT = Path(__file__).parents[1]
T, B, K, P, MAX_LAG = 8, 2, 3, 2, 6
WORKERS = 2  # of a host
STEP_SECONDS = 0.0005
PATIENCE = 60.0  # seconds for anything
SAMPLE_SECONDS = 2.0
GROWTH_MIB = 8.0  # that a half may add to resident memory
SPARED_SECONDS = 150.0  # between two losses of the first host: 5 in 5 minutes would end it
FAULTS = {
    "kills": 5,
    "host_kills": 1,
    "stops": 3,
    "host_stops": 2,
    "pauses": 2,
    "crawls": 1,
    "bursts": 2,
    "guests": 2,
}  # and how often, one to another


# ── what is collected ────────────────────────────────────────────────────────────────────────────────────────────────


class StampEnv(gym.Env[Any, Any]):
    """Observes ``[stamp, counter]``: random bits of its own, and how many steps it has taken, which is the reward, too.
    Episodes end after 7 steps, which changes neither."""

    observation_space = gym.spaces.Box(0, 1 << 62, (2,), np.int64)
    action_space = gym.spaces.Discrete(2)

    def __init__(self) -> None:
        self.stamp = int.from_bytes(os.urandom(7), "big")
        self.counter = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(STEP_SECONDS)
        self.counter += 1
        return self.observe(), float(self.counter), self.counter % 7 == 0, False, {}

    def observe(self) -> Any:
        return np.array([self.stamp, self.counter], np.int64)


class VersionActor(BaseActorModule):
    """Every weight is the number of their version; every step tells the least and the greatest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stamp = torch.nn.Parameter(torch.ones(1 << 16))

    def become(self, version: int) -> None:
        with torch.no_grad():
            self.stamp.fill_(version)

    def forward(
        self, obs: Any, act: Any, rew: torch.Tensor, fin: torch.Tensor, *, hx: Any = None
    ) -> tuple[Any, Any, Any]:
        info = {"value": rew, "least": self.stamp.min().expand_as(rew), "most": self.stamp.max().expand_as(rew)}
        return torch.zeros_like(fin, dtype=torch.int64), (), info


def make_actor(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> VersionActor:
    return VersionActor()


if __name__ != "__main__":  # hosts import it
    gym.register("zrl/Soak-v0", lambda **kwargs: StampEnv(**kwargs), disable_env_checker=True)


class Violation(Exception):
    """What must hold does not. Its first argument is the name, as in ``violated``."""


class Delivered:
    """What came from one incarnation: all up to a number, but for those that are missing."""

    __slots__ = ("missing", "most", "version")

    def __init__(self) -> None:
        self.most = self.version = 0
        self.missing: set[int] = set()

    def add(self, seq: int) -> bool:
        """Whether it is new."""
        if seq <= self.most:
            known = seq not in self.missing
            self.missing.discard(seq)
            return not known
        self.missing.update(range(self.most + 1, seq))
        self.most = seq
        return True


class Ledger:
    """All that was delivered, by the stamp of the first column: every incarnation of a worker has another."""

    def __init__(self) -> None:
        self.by_stamp: dict[tuple[int, int], Delivered] = {}
        self.n_fragments = 0

    @property
    def missing(self) -> int:
        """Fragments before which others of the same incarnation came, and which did not come."""
        return sum(len(x.missing) for x in self.by_stamp.values())

    def check(self, batch: Batch) -> None:
        obs, rew = batch.state.obs, batch.state.rew
        for i, meta in enumerate(batch.meta):
            columns = slice(i * B, (i + 1) * B)
            stamps, counters = obs[:, columns, 0], obs[:, columns, 1]
            expected = torch.arange((meta.seq - 1) * T, meta.seq * T + 1).unsqueeze(1).expand_as(counters)
            if (stamps != stamps[0]).any() or len(set(stamps[0].tolist())) != B:
                raise Violation("I2", f"torn: {meta} mixes environments: {stamps.tolist()}")
            if not torch.equal(counters, expected) or not torch.equal(rew[1:, columns], expected[1:].float()):
                raise Violation("I2", f"torn: {meta} has steps {counters.tolist()}")
            known = self.by_stamp.setdefault((meta.worker, int(stamps[0, 0])), Delivered())
            if not known.add(meta.seq):
                raise Violation("I2", f"{meta} came twice")
            seen = {float(x) for name in ("least", "most") for x in batch.actor[name][:, columns].flatten()}
            if seen != {float(meta.version)} or meta.version < known.version:
                raise Violation("weights", f"{meta} has {sorted(seen)}, after {known.version}")
            known.version = meta.version
            self.n_fragments += 1


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def send(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def held(pid: int | str) -> dict[str, float]:
    """What a process holds: descriptors, threads, shared and resident memory."""
    proc = Path(f"/proc/{pid}")
    page = os.sysconf("SC_PAGE_SIZE") / 1024
    shared = 0
    for text in (proc / "maps").read_text().splitlines():
        if "memfd:zrl" in text:
            begin, _, end = text.split()[0].partition("-")
            shared += int(end, 16) - int(begin, 16)
    return {
        "fds": len(os.listdir(proc / "fd")),
        "threads": len(os.listdir(proc / "task")),
        "shared_kib": shared / 1024,
        "rss_mib": int((proc / "statm").read_text().split()[1]) * page / 1024,
    }


class Host:
    """A `zrl worker`."""

    def __init__(self, url: str, folder: Path, name: str, *words: str) -> None:
        self.name = name
        command = ["worker", "--connect", url, "--count", str(WORKERS), "--id", name, "--import", "soak", *words]
        path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zrl", *command],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder), "XDG_RUNTIME_DIR": ""},
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def workers(self) -> list[int]:
        return [pid for zygote in children_of(self.process.pid) for pid in children_of(zygote)]

    def everybody(self) -> list[int]:
        return [self.process.pid, *children_of(self.process.pid), *self.workers()]


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Soak:
    """The loop, its hosts, and what is about to happen to them."""

    def __init__(self, it: PipelineRollout, actor: VersionActor, folder: Path, seed: int) -> None:
        self.it, self.actor, self.folder = it, actor, folder
        self.rng = random.Random(seed)
        self.ledger = Ledger()
        self.counts: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
        self.violated: dict[str, str] = {}
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.host_samples: list[tuple[float, dict[str, float]]] = []
        self.spared_until = 0.0
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._last_batch = time.monotonic()
        self._next_sample = 0.0
        self._crawl_until = 0.0
        self.steady = {name: Host(it.urls[0], folder, name, *words) for name, words in STEADY.items()}
        self.guests: list[Host] = []

    def note(self, name: str, text: str) -> None:
        if name not in self.violated:
            print(f"violated: {name}: {text}", flush=True)
        self.violated.setdefault(name, text)

    # Training.

    def turn(self) -> None:
        """At most one batch, and whatever is due."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        for name, host in self.steady.items():
            if host.ended:
                self.counts["host_restarts"] += 1
                self.steady[name] = Host(self.it.urls[0], self.folder, name, *STEADY[name])
        batch = self.it.next_within(0.1)
        now = time.monotonic()
        if batch is not None:
            self._last_batch = now
            self.counts["batches"] += 1
            self.ledger.check(batch)
            self.publish()
            if now < self._crawl_until:
                time.sleep(0.1)
        elif now - self._last_batch > PATIENCE:
            raise Violation("stuck", str(self.it.stats().get("waiting_for")))
        if now >= self._next_sample:
            self._next_sample = now + SAMPLE_SECONDS
            self.sample(now)

    def publish(self) -> None:
        self.actor.become(self.it.version + 1)
        self.it.publish()

    def sample(self, now: float) -> None:
        self.samples.append((now, held("self")))
        first = self.steady["one"].process.pid
        if self.host_samples and self.host_samples[-1][1]["pid"] != first:
            self.host_samples.clear()
        with contextlib.suppress(OSError):
            self.host_samples.append((now, {"pid": first, **held(first)}))
        self.look_through_the_books()

    def look_through_the_books(self) -> None:
        """I1, I2, I3, at one instant of the thread that keeps them."""
        found: list[str] = []
        slots = self.it._collator.slots

        def look() -> None:
            for ring in slots.live():
                counts = Counter(state.name for state in ring.states)
                if sum(counts[name] for name in ("FREE", "WORKER", "READY", "HELD")) != K:
                    found.append(f"worker {ring.worker}: {counts}")
            try:
                slots.audit()
            except AssertionError as error:
                found.append(str(error))

        self.it._collator._post(look)
        stats = self.it.stats()  # comes after it
        for text in found:
            self.note("I1", text)
        f = stats["fragments"]
        if f["committed"] != f["consumed"] + f["dropped"] + f["in_flight"]:
            self.note("I3", str(f))
        if f["consumed"] != self.ledger.n_fragments or self.ledger.missing > f["dropped"]:
            self.note("I2", f"{self.ledger.n_fragments} delivered, {self.ledger.missing} missing; {f}")

    def settle(self) -> dict[str, float]:
        """Go on until the steady hosts are there with all their workers and nobody else, all of whom have been heard of
        while what we hold has not changed for a second; what that is."""
        deadline = time.monotonic() + PATIENCE
        since = time.monotonic()
        before: dict[str, float] = {}
        sent: dict[tuple[int, int], int] = {}
        while True:
            self.turn()
            stats = self.it.stats()
            now = held("self")
            rss = now.pop("rss_mib")
            n = len(STEADY) * WORKERS
            rows = {(row["index"], row["generation"]): row["sent"] for row in stats["peers"] if row["n_slots"]}
            whole = len(rows) == n and stats["hosts"] == len(STEADY) and len(self.it._collator.slots.rings) == n
            if not whole or now != before or rows.keys() != sent.keys():
                since, before, sent = time.monotonic(), now, rows
            elif time.monotonic() - since > 1.0 and all(rows[worker] > sent[worker] for worker in rows):
                return {**now, "rss_mib": rss}
            if time.monotonic() > deadline:
                raise Violation(
                    "stuck", f"{stats['workers']} workers of {stats['hosts']} hosts; {now}, before {before}"
                )

    # Faults.

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), do))

    def fault(self) -> None:
        (kind,) = self.rng.choices(list(FAULTS), list(FAULTS.values()))
        # drawn in any case, so that what is drawn next does not depend on who is there
        draws = [self.rng.random() for _ in range(4)]
        if getattr(self, f"_{kind}")(*draws) is not False:
            self.counts[kind] += 1

    def _victim(self, at: float) -> Host | None:
        """A host that may lose a worker."""
        hosts = [*self.steady.values(), *self.guests]
        host = hosts[int(at * len(hosts))]
        if host is self.steady["one"]:
            if time.monotonic() < self.spared_until:
                return self.steady["two"]
            self.spared_until = time.monotonic() + SPARED_SECONDS
        return host

    def _worker(self, at: float, which: float) -> int | None:
        host = self._victim(at)
        pids = host.workers() if host is not None else []
        return pids[int(which * len(pids))] if pids else None

    def _kills(self, at: float, which: float, *_: float) -> bool:
        pid = self._worker(at, which)
        if pid is not None:
            send(pid, signal.SIGKILL)
        return pid is not None

    def _host_kills(self, *_: float) -> None:
        self.steady["two"].process.kill()

    def _stops(self, at: float, which: float, seconds: float, _: float) -> bool:
        pid = self._worker(at, which)
        if pid is not None:
            send(pid, signal.SIGSTOP)
            self.later(12.0 * seconds, functools.partial(send, pid, signal.SIGCONT))
        return pid is not None

    def _host_stops(self, at: float, seconds: float, *_: float) -> None:
        hosts = list(self.steady.values())
        pids = hosts[int(at * len(hosts))].everybody()
        for pid in pids:
            send(pid, signal.SIGSTOP)
        for pid in pids:
            self.later(12.0 * seconds, functools.partial(send, pid, signal.SIGCONT))

    def _pauses(self, seconds: float, *_: float) -> None:
        time.sleep(8.0 * seconds**2)
        self._last_batch = time.monotonic()

    def _crawls(self, seconds: float, *_: float) -> None:
        self._crawl_until = time.monotonic() + 8.0 * seconds

    def _bursts(self, *_: float) -> None:
        for _i in range(100):
            self.publish()

    def _guests(self, seconds: float, how: float, words: float, _: float) -> bool:
        self.guests = [guest for guest in self.guests if not guest.ended]
        if len(self.guests) >= 2:
            return False
        name = f"guest-{self.counts['guests']}"
        guest = Host(self.it.urls[0], self.folder, name, *(["--no-shm"] if words < 0.5 else []))
        self.guests.append(guest)
        self.later(4.0 + 16.0 * seconds, guest.process.kill if how < 0.5 else guest.process.terminate)
        return True

    def calm(self) -> None:
        """Whoever stands still goes on, and guests leave."""
        while self._later:
            heapq.heappop(self._later)[2]()
        deadline = time.monotonic() + PATIENCE
        while not all(guest.ended for guest in self.guests):
            self.turn()
            if time.monotonic() > deadline:
                raise Violation("stuck", "a guest does not leave")
        self.guests.clear()

    # The end.

    def close(self) -> None:
        """End the run, and see that all end with it."""
        hosts = [*self.steady.values(), *self.guests]
        pids = [pid for host in hosts for pid in host.everybody()]
        for pid in pids:
            send(pid, signal.SIGCONT)
        self.it.close()
        try:
            if {"stuck", "ended"} & self.violated.keys():
                return  # hosts that the run has lost wait for another
            deadline = time.monotonic() + PATIENCE
            while left := [*filter(alive, pids), *self.folders()]:
                for host in hosts:
                    host.process.poll()
                if time.monotonic() > deadline:
                    raise Violation("processes", str(left))
                time.sleep(0.05)
        finally:
            for host in hosts:
                host.process.kill()
                host.process.wait()

    def folders(self) -> list[str]:
        """Of hosts. That of one that was killed goes as soon as the process that started its workers sees it; logs that
        an error names stay on purpose."""
        return [path.name for path in self.folder.glob("zrl-*") if not path.name.startswith("zrl-logs-")]


STEADY: dict[str, list[str]] = {"one": [], "two": ["--no-shm"]}


def slope(samples: list[tuple[float, float]]) -> float:
    """Per second: the median of the slopes between any two samples (Theil 1950, Sen 1968)."""
    x, y = np.array(samples).T
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def growth(samples: list[tuple[float, dict[str, float]]]) -> float:
    """MiB of resident memory, over the second half."""
    half = [(at, found["rss_mib"]) for at, found in samples[len(samples) // 2 :]]
    return slope(half) * (half[-1][0] - half[0][0]) if len(half) >= 2 else 0.0


@contextlib.contextmanager
def run(seed: int, folder: Path) -> Iterator[Soak]:
    actor = VersionActor()
    with cluster.rollout(
        "soak:zrl/Soak-v0",
        actor,
        *(T, B, K, P),
        bind=f"ipc://{folder}/l",
        actor_name="soak:make_actor",
        max_lag=MAX_LAG,
        auto_publish=False,
        starve_timeout=PATIENCE,
    ) as it:
        soak = Soak(it, actor, folder, seed)
        try:
            yield soak
        except (Violation, ZrlError) as error:
            name, text = error.args if isinstance(error, Violation) else ("ended", repr(error))
            soak.note(name, text)
        finally:
            try:
                soak.close()
            except Violation as error:
                soak.note(*error.args)


def measured(soak: Soak, minutes: float, gap: float) -> dict[str, float]:
    """The run itself, and what comes of it."""
    first = soak.settle()
    host = soak.host_samples[-1][1]
    begin = time.monotonic()
    soak.samples.clear()
    soak.host_samples.clear()
    next_fault, next_line = begin, begin + 10.0
    while (now := time.monotonic()) < begin + 60.0 * minutes:
        soak.turn()
        if now >= next_fault:
            soak.fault()
            next_fault = time.monotonic() + 2.0 * gap * soak.rng.random()
        if now >= next_line:
            next_line = now + 10.0
            said = {name: n for name, n in soak.counts.items() if n}
            print(f"{now - begin:6.0f} s  {held('self')['rss_mib']:.1f} MiB  {said}", flush=True)
    soak.calm()
    last = soak.settle()
    last_host = held(soak.steady["one"].process.pid)
    soak.look_through_the_books()
    figures = {"seconds": time.monotonic() - begin}
    for name in ("fds", "threads", "shared_kib"):
        figures |= {f"{name}_first": first[name], f"{name}_last": last[name]}
        if first[name] != last[name]:
            soak.note(name, f"{first[name]:g} at first, {last[name]:g} at last")
    if soak.steady["one"].process.pid == host["pid"]:
        for name in ("fds", "threads"):
            figures |= {f"host_{name}_first": host[name], f"host_{name}_last": last_host[name]}
            if host[name] != last_host[name]:
                soak.note(f"host_{name}", f"{host[name]:g} at first, {last_host[name]:g} at last")
    for name, samples in (("rss", soak.samples), ("host_rss", soak.host_samples)):
        figures[f"{name}_growth_mib"] = growth(samples)
        if figures[f"{name}_growth_mib"] > GROWTH_MIB:
            soak.note(name, f"{figures[f'{name}_growth_mib']:.1f} MiB in the second half")
    figures["rss_last_mib"] = last["rss_mib"]
    stats = soak.it.stats()
    figures |= {"fragments": soak.ledger.n_fragments, "missing": soak.ledger.missing}
    figures |= {"incarnations": len(soak.ledger.by_stamp)}
    figures |= {name: stats["fragments"][name] for name in ("committed", "consumed", "dropped", "lost", "in_flight")}
    figures |= {"losses": sum(stats["losses"].values()), "refused": sum(stats["refused"].values())}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of all that happens; drawn, if it is not given")
    parser.add_argument("--gap", type=float, default=3.0, metavar="S", help="seconds between two faults, on average")
    options = parser.parse_args()
    seed = secrets.randbits(31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))  # 0700
    logging.basicConfig(filename=folder / "learner.log", level=logging.WARNING)
    figures: dict[str, float] = {}
    with run(seed, folder) as soak:
        figures = measured(soak, options.minutes, options.gap)
    rounded = {name: round(x, 3) for name, x in {**soak.counts, **figures}.items()}
    if soak.violated:
        print(f"logs are in {folder}")
    else:
        shutil.rmtree(folder)
    print(json.dumps({"seed": seed, **rounded, "violated": ", ".join(sorted(soak.violated))}))
    sys.exit(1 if soak.violated else 0)


if __name__ == "__main__":
    main()
