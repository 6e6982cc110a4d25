"""Hosts as processes: one that stands still with all its workers, and what their late words are worth."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.world import PATIENCE, ROOT, B, Ledger, T, audit, drive, needs_linux, until
from tests.system.programs import children_of
from tests.toys import RandomActor
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

pytestmark = [needs_linux, pytest.mark.timeout(180)]


class HostProcess:
    """A `zrl worker`."""

    def __init__(self, url: str, log: Path, *words: str) -> None:
        self.log = log
        command = [
            "worker",
            "--connect",
            url,
            "--count",
            "2",
            "--id",
            log.stem,
            "--import",
            "tests.faults.stamp",
            *words,
        ]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zrl", *command],
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def everybody(self) -> list[int]:
        found, level = [self.process.pid], [self.process.pid]
        while level := [pid for parent in level for pid in children_of(parent)]:
            found += level
        return found


@contextlib.contextmanager
def hosts(it: PipelineRollout, folder: Path, *names: str, words: tuple[str, ...] = ()) -> Iterator[list[HostProcess]]:
    found = [HostProcess(it.urls[0], folder / name, *words) for name in names]
    try:
        yield found
    finally:
        for host in found:
            for pid in host.everybody():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        it.close()
        for host in found:
            try:
                host.process.wait(PATIENCE)
            finally:
                host.process.kill()
                host.process.wait()


@contextlib.contextmanager
def learning(folder: Path) -> Iterator[PipelineRollout]:
    folder.chmod(0o700)
    with cluster.rollout(
        "tests.faults.stamp:tests/Stamp-v0",
        RandomActor(3),
        *(T, B, 2, 2),
        bind=f"ipc://{folder}/l",
        actor_name="tests.faults.stamp:make",
    ) as it:
        yield it


@pytest.mark.parametrize(
    "words", [pytest.param((), id="shm"), pytest.param(("--no-shm",), id="no-shm", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("seconds", [0.0, pytest.param(20.0, marks=pytest.mark.long)])
def test_a_host_that_stands_still_with_all_its_workers(tmp_path: Path, words: tuple[str, ...], seconds: float) -> None:
    """It is given up, and training goes on with the other. When it goes on, what its workers had is refused, and it
    comes back with others, which have other environments: nothing is torn, nothing comes twice."""
    ledger = Ledger()
    with learning(tmp_path) as it, hosts(it, tmp_path, "one", "other", words=words) as (one, other):
        drive(it, ledger, lambda: it.stats()["workers"] == 4, 2 * PATIENCE)
        drive(it, ledger, lambda: len(ledger.from_stamps) == 4)
        stamps = {worker: set(found) for worker, found in ledger.from_stamps.items()}
        still = one.everybody()
        assert len(still) == 4
        for pid in still:
            os.kill(pid, signal.SIGSTOP)
        drive(it, ledger, lambda: it.stats()["losses"].get("host silent") == 2, 2 * PATIENCE)
        before, end = ledger.n_fragments, time.monotonic() + seconds
        drive(it, ledger, lambda: ledger.n_fragments >= before + 100 and time.monotonic() > end, PATIENCE + seconds)
        for pid in still:
            os.kill(pid, signal.SIGCONT)
        drive(it, ledger, lambda: it.stats()["workers"] == 4, 2 * PATIENCE)
        until(lambda: one.log.read_text().count("welcome") == 2)
        drive(it, ledger, lambda: sum(found != stamps[w] for w, found in ledger.from_stamps.items()) == 2)
        stats = audit(it)
        assert other.log.read_text().count("welcome") == 1
    assert stats["losses"] == {"host silent": 2}
    assert set(stats["refused"]) <= {"unknown", "stale", "unexpected", "rejected: unknown_host", "rejected: name_taken"}
