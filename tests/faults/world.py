"""What the tests of faults share: environments that make trouble when they are told to, a ledger that finds torn and
repeated fragments, and ways to look at the processes of a rollout.

An environment in a worker is told through files in a folder, by the pid of its process: the test writes ``hold-PID``
(or another `Trouble`), the environment answers with ``hold-PID.seen`` at its next step.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.toys import RandomActor, StepResult
from zrl import Batch
from zrl.nodes.host import Kid, Patience
from zrl.nodes.page import Phase
from zrl.protocol.peers import Peers
from zrl.rollout import multi
from zrl.rollout.pipeline import PipelineRollout

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0  # seconds for what takes few, on a busy machine
T, B = 4, 2
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# ── environments ─────────────────────────────────────────────────────────────────────────────────────────────────────


class StampEnv(gym.Env[Any, Any]):
    """Observes ``[stamp, counter]``: random bits of its own, and how many steps it has taken. The reward of a step is
    the counter too. Its episodes end after 7 steps, which changes neither.

    Args:
        folder: where it is told to make trouble.
        slow: seconds that every step takes.
    """

    def __init__(self, folder: str = "", slow: float = 0.0) -> None:
        big = 1 << 62
        self.observation_space = gym.spaces.Box(0, big, (2,), np.int64)
        self.action_space = gym.spaces.Discrete(3)
        self.folder, self.slow = folder, slow
        self.stamp = int.from_bytes(os.urandom(7), "big")
        self.counter = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: Any) -> StepResult:
        if self.slow:
            time.sleep(self.slow)
        if self.folder:
            for trouble in TROUBLES:
                path = f"{self.folder}/{trouble}-{os.getpid()}"
                if os.path.exists(path) and (trouble != "once" or self.is_meant(path)):
                    Path(f"{path}.seen").touch()
                    TROUBLES[trouble](path)
        self.counter += 1
        return self.observe(), float(self.counter), self.counter % 7 == 0, False, {}

    def is_meant(self, path: str) -> bool:
        """Who is to fail once may be named by its stamp."""
        return Path(path).read_text() in ("", str(self.stamp))

    def observe(self) -> Any:
        return np.array([self.stamp, self.counter], np.int64)


def _hold(path: str) -> None:
    """Until the file is gone."""
    while os.path.exists(path):
        time.sleep(0.001)


def _hang_with_the_gil(path: str) -> None:
    ctypes.PyDLL(None).sleep(1000)


def _raise(path: str) -> None:
    raise ValueError("told to fail")


def _raise_once(path: str) -> None:
    os.unlink(path)
    _raise(path)


def _exit(path: str) -> None:
    sys.exit(int(Path(path).read_text() or 0))


def _abort(path: str) -> None:
    os._exit(int(Path(path).read_text() or 0))


def _crash(path: str) -> None:
    ctypes.string_at(0)


TROUBLES: dict[str, Callable[[str], None]] = {
    "hold": _hold,
    "gil": _hang_with_the_gil,
    "raise": _raise,
    "once": _raise_once,
    "exit": _exit,
    "abort": _abort,
    "crash": _crash,
}


class Ledger:
    """What was delivered so far; every batch of `StampEnv` must be whole, new, and say truly where it comes from."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int, int]] = set()
        self.from_stamps: dict[int, set[int]] = {}  # worker → stamps of its environments' first columns
        self.n_fragments = 0

    def check(self, batch: Batch) -> Batch:
        obs, rew = batch.state.obs.cpu(), batch.state.rew.cpu()
        n_rows, n_columns = obs.shape[:2]
        b, t = n_columns // len(batch.meta), n_rows - 1
        for i, meta in enumerate(batch.meta):
            stamps, counters = obs[:, i * b : (i + 1) * b, 0], obs[:, i * b : (i + 1) * b, 1]
            assert (stamps == stamps[0]).all(), f"torn: fragment {meta} mixes environments"
            assert len(set(stamps[0].tolist())) == b, f"torn: fragment {meta} has a column twice"
            first = (meta.seq - 1) * t
            expected = torch.arange(first, first + n_rows).unsqueeze(1).expand_as(counters)
            assert torch.equal(counters, expected), f"torn: fragment {meta}: {counters.tolist()}"
            steps = rew[1:, i * b : (i + 1) * b]
            assert torch.equal(steps, expected[1:].float()), f"torn: fragment {meta}: {steps.tolist()}"
            key = (meta.worker, meta.seq, int(stamps[0, 0]))
            assert key not in self.seen, f"delivered twice: {meta}"
            self.seen.add(key)
            self.from_stamps.setdefault(meta.worker, set()).add(int(stamps[0, 0]))
            self.n_fragments += 1
        return batch


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def impatient(monkeypatch: pytest.MonkeyPatch, *, silence: float = 5.0, **changes: Any) -> None:
    """Rollouts from here on restart their workers soon, by these settings of `Patience`, and look at them often. What
    disagrees for `silence` seconds is revoked."""
    monkeypatch.setattr("zrl.nodes.host.TICK", 0.1)
    monkeypatch.setattr("zrl.nodes.collator.TICK", 0.1)
    monkeypatch.setattr("zrl.nodes.collator.p.Peers", functools.partial(Peers, local_silence=silence))
    settings = {"first_delay": 0.02, "restarts": 1000, "rebuilds": 0, "most_delay": 0.1, **changes}
    monkeypatch.setattr("zrl.rollout.local.Patience", functools.partial(Patience, **settings))


@contextlib.contextmanager
def rolling(
    factory: Callable[..., Any], *, n: int = 2, k: int = 2, p: int = 2, **more: Any
) -> Iterator[PipelineRollout]:
    """A rollout with `n` workers of `k` slots each and batches of `p`; closed at the end, within its 5 s."""
    actor = more.pop("actor", None) or RandomActor(3)
    it = multi.rollout(factory, actor, T, n, B, n * k, p, **more)
    assert isinstance(it, PipelineRollout)
    try:
        yield it
    finally:
        begin = time.monotonic()
        it.close()
        took = time.monotonic() - begin
    assert took < 6.5, f"close() took {took:.1f} s"


def stamps(folder: Path | str = "", slow: float = 0.0) -> Callable[[], StampEnv]:
    return functools.partial(StampEnv, str(folder), slow)


def kids(it: PipelineRollout) -> list[Kid]:
    """The workers that live, by index; all of them have a process."""
    host = it._collator._host
    assert host is not None
    found = until(lambda: [kid for kid in list(host.kids.values()) if kid.child.pid])
    return sorted(found, key=lambda kid: kid.index)


def kid_of(it: PipelineRollout, index: int, *, not_pid: int = 0) -> Kid:
    """The worker with this index, as soon as there is one; another process than `not_pid`."""
    found = until(lambda: [k for k in kids(it) if k.index == index and k.child.pid != not_pid])
    assert isinstance(found[0], Kid)
    return found[0]


def pid_of(kid: Kid) -> int:
    assert kid.child.pid is not None  # 0 would be ourselves
    return kid.child.pid


def kill(kid: Kid, signum: signal.Signals = signal.SIGKILL) -> int:
    pid = pid_of(kid)
    os.kill(pid, signum)
    return pid


def audit(it: PipelineRollout) -> dict[str, Any]:
    """The numbers of `stats`, after the books were looked through."""
    failed: list[BaseException] = []

    def look() -> None:
        try:
            it._collator.slots.audit()
        except AssertionError as error:
            failed.append(error)

    it._collator._post(look)
    stats = it.stats()  # comes after it
    assert not failed, failed
    f = stats["fragments"]
    assert f["committed"] == f["consumed"] + f["dropped"] + f["in_flight"]
    return stats


def drive(it: PipelineRollout, ledger: Ledger, until_: Callable[[], object], patience: float = PATIENCE) -> None:
    """Train until something is so; every batch is checked."""
    deadline = time.monotonic() + patience
    while not until_():
        ledger.check(next(it))
        assert time.monotonic() < deadline, f"waited in vain; {it.stats()}"


def settle(it: PipelineRollout) -> None:
    """Wait until nothing moves any more, because nobody takes batches: one is copied, and all slots are ready."""
    plan = it._collator.plan
    most = plan.n_per_batch + sum(map(plan.slots_of, range(plan.n_workers)))
    until(lambda: it.stats()["fragments"]["in_flight"] == most)


def tell(folder: Path, trouble: str, pid: int, text: str = "") -> Path:
    """Tell the environments of this process to make trouble; the file by which it is told."""
    path = folder / f"{trouble}-{pid}"
    part = folder / f"part-{trouble}-{pid}"
    part.write_text(text)
    part.rename(path)
    return path


def seen(path: Path) -> bool:
    """Whether an environment has begun with it."""
    return Path(f"{path}.seen").exists()


def phase(kid: Kid) -> Phase:
    return kid.page.read().phase


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def until(condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait for what nobody tells us about; its value."""
    deadline = time.monotonic() + patience
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return result


def state(pid: int) -> str:
    """As the kernel sees it: R, S, T, Z, …; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie whose parent is slow to look does not."""
    return state(pid) not in "ZX"


def cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> int:
    """Bytes of memory that a process has, shared ones included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


@contextlib.contextmanager
def script(text: str, *args: object, folder: Path, command: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `text`, as the user would: killed at the end if it still runs, and all that it started."""
    path = folder / "script.py"
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "XDG_RUNTIME_DIR": ""}
    process = subprocess.Popen(
        [*command, sys.executable, str(path), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )
    below: list[int] = []
    try:
        yield process
        below = descendants(process.pid)
    finally:
        if process.poll() is None:
            below = below or descendants(process.pid)
            process.kill()
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """The next line of its output."""
    assert process.stdout is not None
    text = process.stdout.readline().rstrip()
    assert text, process.stderr and process.stderr.read()
    return text


def counted(stats: dict[str, Any], what: str) -> Counter[str]:
    return Counter(stats[what])
