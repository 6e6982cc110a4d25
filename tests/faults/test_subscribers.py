"""Weights for those who are slow, asleep or late: the newest of them, whole, and never an older one again."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.versions import VersionActor
from tests.faults.world import PATIENCE, ROOT, needs_linux, until
from zrl import Batch
from zrl.net.keys import authorize, new_pair
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

pytestmark = [needs_linux, pytest.mark.timeout(120)]
HOW = pytest.mark.parametrize("how", ["shm", "tcp"])


class Learner:
    """A learner that publishes when it is told to, and looks at what comes."""

    def __init__(self, it: PipelineRollout, actor: VersionActor) -> None:
        self.it, self.actor = it, actor
        self.newest: dict[int, int] = {}  # version by worker

    def publish(self) -> int:
        self.actor.become(self.it.version + 1)
        return self.it.publish()

    def take(self) -> Batch:
        """A batch, every fragment of which was made with one version of the weights, that which it says; and no older
        one than the worker had before."""
        batch = next(self.it)
        for i, meta in enumerate(batch.meta):
            seen = {float(x) for name in ("least", "most") for x in batch.actor[name][:, i].flatten()}
            assert seen == {float(meta.version)}, (seen, meta)
            assert meta.version >= self.newest.get(meta.worker, 0), meta
            self.newest[meta.worker] = meta.version
        return batch

    def take_until(self, version: int) -> float:
        """Until a fragment is of this version; how many seconds it took."""
        begin = time.monotonic()
        while all(meta.version < version for meta in self.take().meta):
            assert time.monotonic() < begin + PATIENCE, self.newest
        return time.monotonic() - begin


@contextlib.contextmanager
def learning(folder: Path, how: str) -> Iterator[Learner]:
    """Local workers over ipc, or remote ones over tcp with keys."""
    folder.chmod(0o700)
    actor = VersionActor()
    if how == "tcp":
        server = new_pair(folder / "a", "server")
        authorize(folder / "a", "one", new_pair(folder / "b", "one"))
        authorize(folder / "b", "server", server)
    bind, keys = ("tcp://127.0.0.1:*", folder / "a") if how == "tcp" else (f"ipc://{folder}/l", None)
    more = {"actor_name": "tests.faults.versions:make", "auto_publish": False}
    with cluster.rollout("CartPole-v1", actor, 4, 1, 2, 1, bind=bind, keys=keys, **more) as it:  # type: ignore[arg-type]
        yield Learner(it, actor)


@contextlib.contextmanager
def host(learner: Learner, folder: Path, how: str, name: str = "one") -> Iterator[int]:
    """The process id of a `zrl worker`."""
    more = ["--no-shm", "--keys", str(folder / "b")] if how == "tcp" else []
    words = ["worker", "--connect", learner.it.urls[0], "--import", "tests.faults.versions", "--id", name, *more]
    with (folder / name).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "zrl", *words], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@HOW
def test_a_host_that_stands_still_costs_nothing_and_then_has_the_newest(tmp_path: Path, how: str) -> None:
    with learning(tmp_path, how) as learner, host(learner, tmp_path, how) as pid:
        learner.take_until(1)
        learner.take_until(learner.publish())
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(20):
                learner.publish()
            learner.take()
            before = resident()
            for n in range(300):
                learner.publish()
                if n % 10 == 0:
                    learner.take()
            grown = resident() - before
        finally:
            os.kill(pid, signal.SIGCONT)
        took = learner.take_until(learner.it.version)
        assert grown < 10 << 20
        assert took < 10.0  # one status and one Fetch later at the latest
        assert not learner.it.stats()["losses"]


@HOW
def test_who_joins_while_the_learner_is_busy_begins_with_the_newest(tmp_path: Path, how: str) -> None:
    """Its thread does something else; the collator answers."""
    with learning(tmp_path, how) as learner:
        for _ in range(5):
            learner.publish()
        with host(learner, tmp_path, how):
            until(lambda: learner.it.stats()["fragments"]["committed"] >= 2, 2 * PATIENCE)
            assert [meta.version for meta in learner.take().meta] == [6]


@pytest.mark.long  # the first is missed after 5 or 15 s
@HOW
def test_who_comes_back_begins_with_the_newest(tmp_path: Path, how: str) -> None:
    with learning(tmp_path, how) as learner:
        with host(learner, tmp_path, how):
            learner.take_until(1)
        learner.newest.clear()
        newest = learner.publish()
        until(lambda: not learner.it.stats()["hosts"])
        while learner.it.stats()["fragments"]["in_flight"]:
            next(learner.it)
        with host(learner, tmp_path, how):
            assert [meta.version for meta in learner.take().meta] == [newest]
