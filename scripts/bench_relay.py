"""Weights on their way to many hosts: what a publish costs the learner, and how long until every host has it.

    python scripts/bench_relay.py [--hosts 1 8 32] [--times 30] [--interval 1.0] [--paces 0.5 0.25 …] [--mb 6.4]

The learner is a real one (`zrl.rollout.cluster`) on tcp over loopback, with 6.4 MB of weights. Each host is a process
that does what `zrl worker` does but for its workers, with the same code: Hello, Welcome, Fetch, Weights, its board,
then every version that is published onto that board, with a look at the checksum, and a Beat a second. It has one
worker, which stays on its way for ever. The hosts are forks of one process without torch.

Every host writes down when it has a version, on the clock that all processes share, into memory that they share. All
hosts run on the cores of this machine, and so does what would be the network: the figures are bounds from above of
what a learner with 32 machines sees. A version that is overtaken by the next one on its way is skipped, which is meant
so (`CONFLATE`); a host has a version when it has that one or a newer one. The last line is one flat JSON object, for
each number of hosts:

- ``publish_ms_…_hosts``, ``publish_p99_ms_…_hosts``: `publish()` in the user's thread, median and 99th percentile.
- ``collator_ms_…_hosts``: CPU time of the collator's thread for a publish, without what it takes when nothing is
  published; ``learner_cpu_ms_…_hosts``: that of the whole process, libzmq's thread that feeds the connections included;
  ``host_cpu_ms_…_hosts``: that of one host.
- ``all_have_it_ms_…_hosts``, ``all_have_it_max_ms_…_hosts``: from the start of `publish()` until the last host has it,
  median and maximum; ``half_have_it_ms_…_hosts``: until half of the hosts have it, median.
- ``wrong_…_hosts``: hosts that did not end with the learner's weights, byte by byte.

For the largest number of hosts also, with ever shorter times between two publishes:

- ``no_skips_ms``: the shortest such time at which every host got every version, and ``skips_ms``: the longest at which
  not; 0 where there was none. ``got_share_…ms``: share of the versions that a host got.
- ``host_rss_mb``, ``host_pss_mb``: resident memory of a host, and its share of what several of them use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import uvloop

# No torch here: every host would have it. What the learner needs is imported by `measure`.
from zrl.data.board import Board
from zrl.data.memory import Memory, MemoryAddress, boot_id
from zrl.net.sockets import make_context
from zrl.nodes import supervisor
from zrl.nodes.children import Child, Event, Zygote
from zrl.nodes.host import Host
from zrl.nodes.pipe import Ended
from zrl.protocol import messages as m

MOST_VERSIONS = 4096
PID, FD, HAVE = 0, 1, 2  # columns of a host's row: its process, its board, then when it had each version, in ns
PATIENCE = 60.0  # seconds for the hosts to come, and to get what was published last
Rows = npt.NDArray[np.int64]


# ── a host ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Nobody:
    """A zygote whose children are on their way for ever. They end when they are told to."""

    def __init__(self) -> None:
        self._fd, self._other = os.pipe()
        self._events: list[Event] = []
        self._n = 0

    def fileno(self) -> int:
        return self._fd

    def fork(self, name: str, args: tuple[Any, ...] = ()) -> Child:
        self._n += 1
        return Child(self._n, name, Path(os.devnull))

    def kill(self, child: Child) -> None:
        self._events.append(Ended(child.serial, None, child.name, None, signal.SIGKILL, ""))

    terminate = kill

    def events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class Relay(supervisor._Run):
    """A host's run that says what it has."""

    row: Rows

    async def _start(self, give_up: float | None) -> None:
        await super()._start(give_up)
        assert self._board is not None
        self.row[FD] = self._board.address.fd
        self.row[PID] = os.getpid()

    def _adopt(self, version: int, flat: Any) -> None:
        super()._adopt(version, flat)
        if not self.row[HAVE + version]:
            self.row[HAVE + version] = time.monotonic_ns()


async def relay(name: str, url: str, row: Rows) -> int:
    """One host, until the learner ends; 0 if it ended as it should."""
    loop = asyncio.get_running_loop()
    options = supervisor.SupervisorOptions(url=url, name=name, count=1, target="", payload=None, silence=15.0)
    context = make_context()
    zygote = cast(Zygote, Nobody())
    runs: list[Relay] = []

    def tell(message: m.Message) -> None:
        runs[0].send(message)

    host = Host(
        zygote,
        loop,
        name=name,
        count=1,
        patience=options.patience,
        tell=tell,
        failed=lambda error: runs[0].over(supervisor._Over(str(error), supervisor.EXIT_FAILED)),
    )
    run = Relay(options, host, context, say=lambda text: None, home_at=math.inf)
    run.row = row
    runs.append(run)
    try:
        await run.live(time.monotonic() + PATIENCE)
    except supervisor._Over as over:
        if over.code:
            print(f"{name}: {over}", file=sys.stderr)
        return supervisor.EXIT_LEARNER_LOST if over.code is None else over.code
    finally:
        await run.end()
        host.close()
        context.term()
    return 0  # never: a run does not end otherwise


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fleet(n_hosts: int, url: str, address: MemoryAddress) -> int:
    """Fork the hosts and wait for them; kill them at the end of standard input. The number of those that did not end as
    they should."""
    with Memory.attach(address, max_nbytes=address.nbytes) as memory:
        rows = rows_in(memory, n_hosts)
        pids = [fork(functools.partial(one_host, f"host-{k}", url, rows[k])) for k in range(n_hosts)]
        left, failed = set(pids), 0
        try:
            while left and not select.select([sys.stdin], [], [], 0.05)[0]:
                for pid in list(left):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        left.remove(pid)
                        failed += status != 0
        finally:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            for pid in left:
                os.waitpid(pid, 0)
        return failed + len(left)


def one_host(name: str, url: str, row: Rows) -> int:
    return uvloop.run(relay(name, url, row))


def fork(work: Callable[[], int]) -> int:
    """A process that does this and ends, at the latest with this one; its pid."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() == parent:
            code = work()
    except BaseException as error:
        print(f"a host failed: {error!r}", file=sys.stderr)
    finally:
        os._exit(code)


def rows_in(memory: Memory, n_hosts: int) -> Rows:
    return memory.data.view(np.int64).reshape(n_hosts, HAVE + MOST_VERSIONS)


@contextlib.contextmanager
def hosts(n_hosts: int, url: str) -> Iterator[tuple[Rows, subprocess.Popen[bytes]]]:
    """Their rows; they are gone afterwards."""
    with Memory.create(n_hosts * (HAVE + MOST_VERSIONS) * 8) as memory:
        words = [sys.executable, __file__, "--fleet", json.dumps([n_hosts, url, dataclasses.asdict(memory.address)])]
        # a group of its own: Ctrl-C is for this process alone, which ends them
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
        try:
            yield rows_in(memory, n_hosts), process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(what: str, done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        if process.poll() is not None:
            raise RuntimeError(f"the hosts have ended while waiting for: {what}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE:.0f} s")
        time.sleep(0.01)


# ── the learner ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Cpu:
    """CPU time so far, in ms: of the collator's thread, of the process, and of a host, on average."""

    def __init__(self, it: Any, rows: Rows) -> None:
        clock = time.pthread_getcpuclockid(it._collator._thread.ident)
        hosts = statistics.mean(cpu_seconds(pid) for pid in rows[:, PID].tolist())
        self.ms = np.array([time.clock_gettime(clock), time.process_time(), hosts]) * 1e3

    def __sub__(self, other: Cpu) -> npt.NDArray[np.float64]:
        return self.ms - other.ms


class Published:
    """What became of some versions, published one after the other."""

    def __init__(self, it: Any, rows: Rows, process: subprocess.Popen[bytes], times: int, interval: float) -> None:
        first = it.version + 1
        if first + times >= MOST_VERSIONS:
            raise ValueError(f"more than {MOST_VERSIONS} versions")
        self.publish_ms: list[float] = []
        started: list[int] = []
        begin, before = time.monotonic(), Cpu(it, rows)
        for k in range(times):
            time.sleep(max(0.0, begin + k * interval - time.monotonic()))
            started.append(time.monotonic_ns())
            it.publish()
            self.publish_ms.append((time.monotonic_ns() - started[-1]) / 1e6)
        last = HAVE + it.version
        wait_for(f"version {it.version} at every host", lambda: bool(rows[:, last].all()), process)
        self.cpu, self.seconds = Cpu(it, rows) - before, time.monotonic() - begin
        when = rows[:, HAVE + first : last + 1].copy()  # [hosts, versions]
        self.got_share = float((when > 0).mean())
        when[when == 0] = np.iinfo(np.int64).max
        when = np.minimum.accumulate(when[:, ::-1], axis=1)[:, ::-1]  # this one or a newer one
        late_ms = (when - np.array(started)) / 1e6
        self.all_ms = late_ms.max(axis=0)
        self.half_ms = np.quantile(late_ms, 0.5, axis=0, method="inverted_cdf")


def measure(n_hosts: int, nbytes: int, times: int, interval: float, paces: Sequence[float]) -> dict[str, float]:
    from bench_weights import Heavy

    from zrl.rollout import cluster

    actor = Heavy(nbytes)
    figures: dict[str, float] = {}
    it = cluster.rollout("none", actor, 1, 1, 1, 1, bind="tcp://127.0.0.1:*", auto_publish=False)
    with contextlib.ExitStack() as opened:
        opened.callback(it.close)
        rows, process = opened.enter_context(hosts(n_hosts, it.urls[0]))
        wait_for("hosts", lambda: bool(rows[:, PID].all()), process)

        def reached() -> bool:
            it.publish()
            time.sleep(0.5)
            return bool(rows[:, HAVE + it.version].all())

        wait_for("subscriptions", reached, process)
        idle, begin = Cpu(it, rows), time.monotonic()
        time.sleep(4 * interval)
        idle_ms = (Cpu(it, rows) - idle) / (time.monotonic() - begin)  # in a second
        at_rest = Published(it, rows, process, times, interval)
        collator_ms, learner_ms, host_ms = ((at_rest.cpu - idle_ms * at_rest.seconds) / times).tolist()
        figures = {
            f"publish_ms_{n_hosts}_hosts": statistics.median(at_rest.publish_ms),
            f"publish_p99_ms_{n_hosts}_hosts": float(np.quantile(at_rest.publish_ms, 0.99)),
            f"collator_ms_{n_hosts}_hosts": collator_ms,
            f"learner_cpu_ms_{n_hosts}_hosts": learner_ms,
            f"host_cpu_ms_{n_hosts}_hosts": host_ms,
            f"half_have_it_ms_{n_hosts}_hosts": float(np.median(at_rest.half_ms)),
            f"all_have_it_ms_{n_hosts}_hosts": float(np.median(at_rest.all_ms)),
            f"all_have_it_max_ms_{n_hosts}_hosts": float(at_rest.all_ms.max()),
        }
        if paces:
            shares = {interval: at_rest.got_share}
            shares |= {pace: Published(it, rows, process, times, pace).got_share for pace in paces}
            figures |= {f"got_share_{1000 * pace:.0f}ms": share for pace, share in shares.items()}
            skips = max((pace for pace, share in shares.items() if share < 1.0), default=0.0)
            figures["no_skips_ms"] = 1e3 * min((pace for pace in shares if pace > skips), default=0.0)
            figures["skips_ms"] = 1e3 * skips
            pids = rows[:, PID].tolist()
            figures["host_rss_mb"] = statistics.mean(in_mb(pid, "status", "VmRSS") for pid in pids)
            figures["host_pss_mb"] = statistics.mean(in_mb(pid, "smaps_rollup", "Pss") for pid in pids)
        figures[f"wrong_{n_hosts}_hosts"] = wrong(it._publisher, rows)
        end(it, process)
    return figures


def wrong(publisher: Any, rows: Rows) -> float:
    """How many hosts have other weights than the learner."""
    own: Board = publisher.board
    flat = np.empty(own.nbytes, np.uint8)
    version = own.read(flat, 0)
    expected = version, zlib.crc32(flat.data)
    n = 0
    for pid, fd in rows[:, :HAVE].tolist():
        address = MemoryAddress(pid, fd, own.memory.nbytes, boot_id())
        with Board.attach(address, run_id=publisher.run_id, digest=publisher.digest, nbytes=own.nbytes) as board:
            n += (board.read(flat, 0), zlib.crc32(flat.data)) != expected
    return float(n)


def end(it: Any, process: subprocess.Popen[bytes]) -> None:
    """Close the learner; its hosts end by themselves."""
    it.close()
    code = process.wait(10.0)
    if code:
        raise RuntimeError(f"{code} hosts did not end as they should")


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def in_mb(pid: int, file: str, key: str) -> float:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def main() -> None:
    if sys.argv[1:2] == ["--fleet"]:
        n_hosts, url, address = json.loads(sys.argv[2])
        raise SystemExit(fleet(n_hosts, url, MemoryAddress(**address)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--times", type=int, default=30, help="publishes at each pace")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two of them")
    parser.add_argument("--paces", type=float, nargs="*", default=[0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05])
    parser.add_argument("--mb", type=float, default=6.4, help="of weights")
    args = parser.parse_args()
    import torch

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: nothing is left behind
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for n in args.hosts:
        paces = args.paces if n == max(args.hosts) else ()
        figures |= measure(n, int(args.mb * 1e6), args.times, args.interval, paces)
        print(
            f"{n:3} hosts: publish {figures[f'publish_ms_{n}_hosts']:.2f} ms, "
            f"collator {figures[f'collator_ms_{n}_hosts']:.1f} ms, "
            f"all have it after {figures[f'all_have_it_ms_{n}_hosts']:.1f} ms",
            flush=True,
        )
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
