"""One collator with 1 to 1,000 workers: what a fragment costs it, and how long a worker waits for its slot.

    python scripts/bench_scale.py [--workers 1 10 100 1000] [--seconds 5] [--rounds 3] [--max-lag N] [--tcp]

The learner is a real one (`zrl.rollout.cluster`), whose user's thread takes batches and does nothing else. The workers
speak the protocol and have no environments: Hello, ring, Attach, then a Ready for each Release. All of them are in one
process, with one socket and one small ring each (fragments of one step), in hosts of 50 that beat once a second.
A batch has 8 fragments; workers have 2 slots, or more where there would be fewer than 64 in all.

- Saturated: every Release is answered with a Ready at once. What counts is CPU time of the collator's thread.
- Paced: every worker makes 5 fragments a second, each at its own time, as long as it has a slot for it.

At the end the books must agree: committed = consumed + dropped + in flight, as many as the workers have sent, nothing
refused, nothing lost. The last line is one flat JSON object, medians of the rounds, for each number of workers:

- ``us_per_fragment_…``: CPU time of the collator's thread for one fragment, replies included, saturated, in µs;
  ``learner_us_per_fragment_…``: that of the whole process, libzmq's thread included.
- ``us_per_fragment_…_over_…``: the largest number of workers against that of the others which is nearest to 10.
- ``fragments_per_s_…``: saturated; ``client_core_share_…``: how busy the workers' process was, in cores: above 1 it
  is they that are measured (its two threads can have 2).
- ``attach_s_…``: until all workers are attached, from the start of their process; ``close_s_…``: `close()`.

For the largest number of workers also, paced, unless there is a ``--max-lag``, which would hold most of them up:

- ``paced_fragments_per_s``, and ``paced_wanted_per_s``; ``paced_core_share``: of one core, the collator's thread;
  ``paced_learner_core_share``, ``paced_client_core_share``: the whole processes.
- ``latency_p50_ms_…``, ``latency_p99_ms_…``: from a Ready until its slot is granted again, both seen by the worker;
  in between a batch of 8 is formed, copied, and another one wanted.
- ``rss_mb_…``: resident memory of the learner.
- ``busy_slowdown_R``: how many times as long a training loop takes for its own work, the calls of ``next`` not
  counted, while the workers send R fragments a second, against when they send none. The work is small: forward and
  backward of a perceptron, some 0.4 ms (``busy_us``), most of it with the GIL held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import zmq

# No torch here: what the learner needs is imported by `measure`.
from zrl.data.memory import boot_id
from zrl.data.ring import Ring
from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.net.addresses import run_directory
from zrl.net.codec import decode, encode
from zrl.net.sockets import Rest, connect, make_context, make_dealer, send
from zrl.nodes.limits import raise_descriptor_limit
from zrl.protocol import messages as m

P, SLOTS, LEAST_SLOTS = 8, 2, 64
PER_HOST, BEAT = 50, 1.0
RATE = 5.0  # fragments of a worker in a second, paced
SILENT = 1e-3  # the same, where there shall be none
BUSY = (1_000, 5_000)  # fragments a second, of all workers, beside a training loop
PATIENCE = 60.0  # seconds for the workers to come
SPEC = FragmentSpec.build(
    1, 1, obs=ArraySpec("float32", (4,)), act=ArraySpec("int64"), actor={"value": ArraySpec("float32")}
)


def slots_for(n_workers: int) -> int:
    return max(SLOTS, -(-LEAST_SLOTS // n_workers))


# ── the workers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Peer:
    """A host or a worker: one connection. `take` handles a message."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.socket = make_dealer(fleet.context)
        self.incarnation = os.urandom(m.ID_NBYTES)
        self.run_id = m.NO_ID
        connect(self.socket, fleet.url)
        fleet.watch(self)

    def send(self, message: m.Message) -> None:
        if not send(self.socket, encode(message)):
            raise ConnectionError("the learner is gone")

    def hello(self, role: str, name: str, host: bytes, index: int, count: int) -> None:
        header = (m.PROTOCOL_VERSION, role, name, (), m.NO_ID, self.fleet.boot_id, host, index, 0, count)
        self.fleet.first(self, encode(m.Hello(self.run_id, self.incarnation, *header)))

    def read(self) -> None:
        """All that is there: whoever used the socket calls this, or the news of what came is lost."""
        rest = Rest(self.socket)
        while True:
            try:
                data = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            rest.skip()
            self.take(decode(data))

    def take(self, message: m.Message) -> None:
        raise NotImplementedError


class SimHost(Peer):
    def __init__(self, fleet: Fleet, k: int, count: int) -> None:
        super().__init__(fleet)
        self.count = count
        self.workers: list[SimWorker] = []
        self.over = False
        self.hello("host", f"host-{k}", m.NO_ID, 0, count)

    def take(self, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            self.run_id, self.base = message.run_id, message.index_base
            self.send(m.Fetch(self.run_id, self.incarnation))
        elif isinstance(message, m.Weights):
            self.workers = [SimWorker(self, self.base + k) for k in range(self.count)]
        elif isinstance(message, m.ByeAck):
            self.fleet.n_left -= 1
        elif isinstance(message, m.Drain):
            self.over = True  # when its workers have left
        elif not self.over:
            raise RuntimeError(f"to a host: {message}")

    def beat(self) -> None:
        if self.workers and not self.over:
            self.send(m.Beat(self.run_id, self.incarnation, tuple(w.row() for w in self.workers)))
            self.read()

    def left(self) -> None:
        """Another worker has left."""
        self.count -= 1
        if not self.count:
            self.send(m.Bye(self.run_id, self.incarnation))


class SimWorker(Peer):
    def __init__(self, host: SimHost, index: int) -> None:
        super().__init__(host.fleet)
        self.host = host
        self.run_id = host.run_id
        self.grants: deque[m.Release] = deque()
        self.seq = self.received = 0
        self.hello("worker", f"worker-{index}", host.incarnation, index, 0)

    def take(self, message: m.Message) -> None:
        if isinstance(message, m.Release):
            self.received += 1
            self.grants.append(message)
            self.fleet.released(self, message.slot)
        elif isinstance(message, m.Welcome):
            self.attach(message.n_slots)
        elif isinstance(message, m.Attached):
            self.fleet.workers.append(self)
        elif isinstance(message, m.Drain):
            self.grants.clear()
            self.send(m.Bye(self.run_id, self.incarnation))
        elif isinstance(message, m.ByeAck):
            self.host.left()
        else:
            raise RuntimeError(f"to a worker: {message}")

    def attach(self, n_slots: int) -> None:
        self.sent = [0.0] * n_slots
        self.ring = Ring.create(
            SPEC.nbytes, n_slots, run_id=self.run_id, incarnation=self.incarnation, digest=SPEC.digest
        )
        at = self.ring.address
        where = (at.pid, at.fd, at.nbytes, at.boot_id, at.path)
        self.send(m.Attach(self.run_id, self.incarnation, SPEC.to_plain(), SPEC.digest, n_slots, SPEC.nbytes, *where))

    def deliver(self) -> None:
        """Make the fragment of the oldest grant."""
        grant = self.grants.popleft()
        self.seq += 1
        self.fleet.n_sent += 1
        self.sent[grant.slot] = time.monotonic()
        times = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.send(m.Ready(self.run_id, self.incarnation, grant.slot, self.seq, grant.least_version, *times, 1))

    def row(self) -> m.ChildBeat:
        phase = m.PHASES.index("collect" if self.grants else "wait")
        return m.ChildBeat(self.incarnation, self.seq, phase, self.seq, self.received)


class Fleet:
    """All hosts and workers, and the loop that serves them. Told what to do by lines on standard input: a rate of
    fragments a second and worker (0: as fast as it goes), or nothing. Answers each with a line of JSON."""

    def __init__(self, url: str, n_workers: int) -> None:
        self.url, self.n_workers = url, n_workers
        self.boot_id = boot_id()
        self.context = make_context()
        self.context.set(zmq.MAX_SOCKETS, 2 * n_workers + 64)
        self.workers: list[SimWorker] = []  # attached
        self.n_sent = 0
        self._poll = select.epoll()
        self._poll.register(0, select.EPOLLIN)
        self._peers: dict[int, Peer] = {}
        self._hellos: list[tuple[Peer, bytes]] = []  # that wait for their connections
        self._rate = 0.0
        self._due: deque[tuple[float, SimWorker]] = deque()  # paced: when who begins
        self._latencies: list[float] = []
        self._n_late = 0  # fragments that were due when there was no slot
        counts = [min(PER_HOST, n_workers - k) for k in range(0, n_workers, PER_HOST)]
        self.n_left = len(counts)
        self._hosts = [SimHost(self, k, count) for k, count in enumerate(counts)]

    def watch(self, peer: Peer) -> None:
        fd = int(peer.socket.get(zmq.FD))
        self._peers[fd] = peer
        self._poll.register(fd, select.EPOLLIN)

    def first(self, peer: Peer, hello: bytes) -> None:
        self._hellos.append((peer, hello))

    def live(self) -> None:
        """Until the learner has let everybody go, or the end of standard input."""
        beat_at = time.monotonic() + BEAT
        while self.n_left:
            now = time.monotonic()
            until = min(beat_at, self._due[0][0] if self._due else beat_at)
            for fd, _ in self._poll.poll(0.02 if self._hellos else max(0.0, until - now)):
                if fd:
                    self._peers[fd].read()
                elif not self._obey():
                    return
            self._hellos = [(peer, hello) for peer, hello in self._hellos if not self._said(peer, hello)]
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._begin(*self._due.popleft())
            if now >= beat_at:
                beat_at = max(beat_at + BEAT, now)
                for host in self._hosts:
                    host.beat()

    def _said(self, peer: Peer, hello: bytes) -> bool:
        said = send(peer.socket, hello)
        peer.read()
        return said

    def released(self, worker: SimWorker, slot: int) -> None:
        """A worker may write this slot."""
        if self._rate:
            if worker.sent[slot]:
                self._latencies.append(time.monotonic() - worker.sent[slot])
        else:
            worker.deliver()

    def _begin(self, due: float, worker: SimWorker) -> None:
        """A fragment is due now."""
        if worker.grants:
            worker.deliver()
            worker.read()
        else:
            self._n_late += 1
        self._due.append((due + 1 / self._rate, worker))

    def _obey(self) -> bool:
        line = sys.stdin.readline()
        if not line:
            return False
        if line.strip():
            self._rate = float(line)
            self._pace()
        self._report()
        return True

    def _pace(self) -> None:
        self._due.clear()
        now = time.monotonic()
        for k, worker in enumerate(self.workers):
            worker.sent = [0.0] * len(worker.sent)
            if self._rate:
                self._due.append((now + k / (self._rate * len(self.workers)), worker))
            while worker.grants and not self._rate:
                worker.deliver()

    def _report(self) -> None:
        ms = np.array(self._latencies or [0.0]) * 1e3
        report = {
            "attached": len(self.workers),
            "sent": self.n_sent,
            "late": self._n_late,
            "cpu": time.process_time(),
            "p50": float(np.quantile(ms, 0.5)),
            "p99": float(np.quantile(ms, 0.99)),
        }
        self._latencies.clear()
        self._n_late = 0
        print(json.dumps(report), flush=True)


def simulate(url: str, n_workers: int) -> None:
    raise_descriptor_limit()
    fleet = Fleet(url, n_workers)
    with contextlib.suppress(ConnectionError):  # the learner ended without a word
        fleet.live()
    fleet.context.destroy()


# ── the learner ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Client:
    """The process of the workers."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self._stdin, self._stdout = stdin, stdout

    def ask(self, rate: float | None = None) -> dict[str, Any]:
        """Change the pace, if it is not None; what was done since the last time."""
        self._stdin.write("\n" if rate is None else f"{rate}\n")
        self._stdin.flush()
        if not select.select([self._stdout], [], [], PATIENCE)[0]:
            raise TimeoutError("the workers do not answer")
        line = self._stdout.readline()
        if not line:
            raise RuntimeError("the workers have ended")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def client(url: str, n_workers: int) -> Iterator[Client]:
    words = [sys.executable, __file__, "--fleet", url, str(n_workers)]
    # a group of its own: Ctrl-C is for this process alone, which ends it
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
    assert process.stdin
    assert process.stdout
    try:
        yield Client(process.stdin, process.stdout)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    if process.returncode:
        raise RuntimeError(f"the workers' process ended with status {process.returncode}")


class Learner:
    """A rollout, and the clocks of its threads."""

    def __init__(self, it: Any, workers: Client, n_workers: int) -> None:
        self.it, self.workers, self.n_workers = it, workers, n_workers
        self.consumed = 0
        self._clock = time.pthread_getcpuclockid(it._collator._thread.ident)

    def take(self, seconds: float) -> dict[str, float]:
        """Take batches for so long."""
        before = self.workers.ask()
        started, cpu, collator = time.monotonic(), time.process_time(), time.clock_gettime(self._clock)
        n = 0
        while time.monotonic() - started < seconds:
            n += len(next(self.it).meta)
        spent = time.monotonic() - started
        collator, cpu = time.clock_gettime(self._clock) - collator, time.process_time() - cpu
        after = self.workers.ask()
        self.consumed += n
        return {
            "per_s": n / spent,
            "us": collator / n * 1e6,
            "learner_us": cpu / n * 1e6,
            "share": collator / spent,
            "learner_share": cpu / spent,
            "client_share": (after["cpu"] - before["cpu"]) / spent,
            "late": after["late"],
            "p50": after["p50"],
            "p99": after["p99"],
        }

    def busy(self, per_s: float, seconds: float) -> float:
        """µs that a unit of work takes while so many fragments come in a second, and are taken between two units."""
        import torch

        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
        x = torch.randn(256, 64)
        self.workers.ask(max(per_s, SILENT) / self.n_workers)
        worked, n, taken, started = 0.0, 0, 0, time.perf_counter()
        while (at := time.perf_counter()) - started < seconds:
            for p in net.parameters():
                p.grad = None
            torch.autograd.backward(net(x).square().mean())
            worked += time.perf_counter() - at
            n += 1
            while taken + P <= per_s * (time.perf_counter() - started):
                taken += len(next(self.it).meta)
        self.consumed += taken
        return worked / n * 1e6

    def check(self) -> None:
        """The books agree, with the workers and with what was taken here."""
        deadline = time.monotonic() + 10.0
        while True:
            stats = self.it.stats()
            sent = self.workers.ask()["sent"]
            found = stats["fragments"]
            if found["committed"] == sent:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{sent} fragments were sent, and {found['committed']} committed: {stats}")
            time.sleep(0.05)
        accounted = found["consumed"] + found["dropped"] + found["in_flight"]
        refused = {reason: n for reason, n in stats["refused"].items() if n}
        if sent != accounted or found["consumed"] != self.consumed or refused or stats["losses"]:
            raise RuntimeError(f"the books do not agree: {sent} sent, {self.consumed} taken, {stats}")


def measure(n_workers: int, args: argparse.Namespace, *, paced: bool) -> dict[str, float]:
    """One round with so many workers."""
    import torch

    from zrl.rollout import cluster

    actor = torch.nn.Linear(4, 2)
    p = P if args.max_lag != 0 else n_workers * -(-P // n_workers)
    folder = run_directory()
    bind = "tcp://127.0.0.1:*" if args.tcp else f"ipc://{folder}/learner.sock"
    figures: dict[str, float] = {}
    with contextlib.ExitStack() as opened:
        opened.callback(shutil.rmtree, folder, ignore_errors=True)
        it = cluster.rollout(
            *("none", actor, 1, 1, slots_for(n_workers), p),
            bind=bind,
            n_actors=n_workers,
            max_lag=args.max_lag,
            auto_publish=args.max_lag is not None,
        )
        opened.callback(it.close)
        # every `next` ends by then, whatever has become of the workers
        watchdog = threading.Timer(2 * PATIENCE + 9 * args.seconds, it.close)
        watchdog.start()
        opened.callback(watchdog.join)
        opened.callback(watchdog.cancel)
        started = time.monotonic()
        workers = opened.enter_context(client(it.urls[0], n_workers))
        while workers.ask()["attached"] < n_workers:
            if time.monotonic() - started > PATIENCE:
                raise TimeoutError(f"not all of {n_workers} workers have come within {PATIENCE:.0f} s")
            time.sleep(0.05)
        figures[f"attach_s_{n_workers}"] = time.monotonic() - started
        learner = Learner(it, workers, n_workers)
        learner.take(min(1.0, args.seconds))
        full = learner.take(args.seconds)
        figures |= {
            f"us_per_fragment_{n_workers}": full["us"],
            f"learner_us_per_fragment_{n_workers}": full["learner_us"],
            f"fragments_per_s_{n_workers}": full["per_s"],
            f"client_core_share_{n_workers}": full["client_share"],
        }
        if paced:
            workers.ask(RATE)
            learner.take(min(1.0, args.seconds))
            slow = learner.take(args.seconds)
            figures |= {
                "paced_wanted_per_s": RATE * n_workers,
                "paced_fragments_per_s": slow["per_s"],
                "paced_late": slow["late"],
                "paced_core_share": slow["share"],
                "paced_learner_core_share": slow["learner_share"],
                "paced_client_core_share": slow["client_share"],
                f"latency_p50_ms_{n_workers}": slow["p50"],
                f"latency_p99_ms_{n_workers}": slow["p99"],
            }
            before = learner.busy(0, args.seconds)
            while_sent = {per_s: learner.busy(per_s, args.seconds) for per_s in BUSY}
            figures["busy_us"] = (before + learner.busy(0, args.seconds)) / 2
            figures |= {f"busy_slowdown_{per_s}": us / figures["busy_us"] for per_s, us in while_sent.items()}
        learner.check()
        figures[f"rss_mb_{n_workers}"] = rss_mb()
        started = time.monotonic()
        it.close()
        figures[f"close_s_{n_workers}"] = time.monotonic() - started
    return figures


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    if sys.argv[1:2] == ["--fleet"]:
        simulate(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each mode in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-lag", type=int, default=None, help="with 0 a batch has a fragment of each worker")
    parser.add_argument("--tcp", action="store_true", help="over tcp on loopback instead of ipc")
    args = parser.parse_args()
    import torch

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: nothing is left behind
    torch.set_num_threads(1)
    most = max(args.workers)
    few = min([n for n in args.workers if n != most] or [most], key=lambda n: abs(math.log(n / 10)))
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        figures: dict[str, float] = {}
        for n in args.workers:
            figures |= measure(n, args, paced=n == most and args.max_lag is None)
            print(
                f"{n:5} workers: {figures[f'us_per_fragment_{n}']:6.1f} µs of the collator for a fragment, "
                f"{figures[f'fragments_per_s_{n}']:,.0f} a second",
                flush=True,
            )
        ratio = figures[f"us_per_fragment_{most}"] / figures[f"us_per_fragment_{few}"]
        figures[f"us_per_fragment_{most}_over_{few}"] = ratio
        rounds.append(figures)
    print(json.dumps({name: round(statistics.median(r[name] for r in rounds), 4) for name in rounds[0]}))


if __name__ == "__main__":
    main()
