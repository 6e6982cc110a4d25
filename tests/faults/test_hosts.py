"""Hosts as processes: one that stands still with all its workers, and what their late words are worth."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.faults.world import PATIENCE, ROOT, B, Ledger, T, audit, drive, needs_linux, until
from tests.system.programs import children_of
from tests.toys import RandomActor
from zrl.protocol import messages as m
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

pytestmark = [needs_linux, pytest.mark.timeout(180)]


class HostProcess:
    """A `zrl worker`; `prefix` are words before those of its command, and it finds modules beside its log."""

    def __init__(self, url: str, log: Path, *words: str, prefix: tuple[str, ...] = ()) -> None:
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
                [*prefix, sys.executable, "-m", "zrl", *command],
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(log.parent)])},
            )

    def everybody(self) -> list[int]:
        found, level = [self.process.pid], [self.process.pid]
        while level := [pid for parent in level for pid in children_of(parent)]:
            found += level
        return found


@contextlib.contextmanager
def hosts(
    it: PipelineRollout, folder: Path, *names: str, words: tuple[str, ...] = (), prefix: tuple[str, ...] = ()
) -> Iterator[list[HostProcess]]:
    found = [HostProcess(it.urls[0], folder / name, *words, prefix=prefix) for name in names]
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


def trains_with(it: PipelineRollout, host: HostProcess) -> None:
    """Both workers of the only host deliver, and there is nothing to complain of."""
    ledger = Ledger()
    drive(it, ledger, lambda: it.stats()["workers"] == 2, 2 * PATIENCE)
    drive(it, ledger, lambda: len(ledger.from_stamps) == 2 and ledger.n_fragments >= 100)
    stats = audit(it)
    assert (stats["losses"], stats["dropped"], stats["refused"]) == ({}, {}, {})
    assert host.log.read_text().count("welcome") == 1


OTHER_TIME = ("unshare", "--time", "--monotonic", "1000000", "--fork", "--kill-child")


def may_have_another_time() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*OTHER_TIME, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.parametrize("words", [pytest.param((), id="shm"), pytest.param(("--no-shm",), id="no-shm")])
def test_a_host_whose_clock_tells_another_time(tmp_path: Path, words: tuple[str, ...]) -> None:
    """By more than eleven days: no time crosses the wire."""
    if not may_have_another_time():
        pytest.skip("needs the right to make time namespaces")
    with learning(tmp_path) as it, hosts(it, tmp_path, "one", words=words, prefix=OTHER_TIME) as (one,):
        trains_with(it, one)
        offsets = [Path(f"/proc/{pid}/timens_offsets").read_text().split()[:2] for pid in one.everybody()[1:]]
        assert offsets == 4 * [["monotonic", "1000000"]]  # host, zygote, two workers


OTHER_VERSIONS = """
import numpy, torch
from zrl.nodes import worker

torch.__version__ = "1.0.0+other"
numpy.__version__ = "1.0.0"
"""


@pytest.mark.long
def test_a_host_with_other_versions_of_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the Hellos say of them is for people: what counts is the version of the protocol, and that the fragments
    have the same specification."""
    (tmp_path / "other_versions.py").write_text(OTHER_VERSIONS)
    heard: list[m.Hello] = []
    with learning(tmp_path) as it:
        peers = it._collator.peers
        receive = peers.receive

        def listen(peer: bytes, message: m.Message, *more: Any) -> Any:
            if isinstance(message, m.Hello):
                heard.append(message)
            return receive(peer, message, *more)

        monkeypatch.setattr(peers, "receive", listen)
        with hosts(it, tmp_path, "one", words=("--import", "other_versions")) as (one,):
            trains_with(it, one)
    assert [hello.versions[1] for hello in heard if hello.role == "worker"] == 2 * ["torch 1.0.0+other"]


class Silent:
    """A peer that takes what comes and never answers: one that does not speak the protocol of ZeroMQ, or a ROUTER."""

    def __init__(self, kind: str) -> None:
        self.kind, self.n_came = kind, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._accept if kind == "tcp" else self._hear)
        self.port = 0
        self._bound = threading.Event()

    def __enter__(self) -> Silent:
        self._thread.start()
        assert self._bound.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _accept(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as taken:
            self.port = server.getsockname()[1]
            self._bound.set()
            server.settimeout(0.05)
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    taken.enter_context(server.accept()[0])
                    self.n_came += 1

    def _hear(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.linger = 0
            self.port = router.bind_to_random_port("tcp://127.0.0.1")
            self._bound.set()
            while not self._over.is_set():
                if router.poll(50):
                    router.recv_multipart()
                    self.n_came += 1


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tcp", "router"])
def test_a_peer_that_accepts_and_never_answers(tmp_path: Path, kind: str) -> None:
    """A connection is no learner: the host tries again, and gives up when it was told to."""
    seconds = 12 if kind == "tcp" else 7
    with Silent(kind) as silent:
        url = f"tcp://127.0.0.1:{silent.port}"
        host = HostProcess(url, tmp_path / "one", "--give-up-after", str(seconds))
        try:
            assert host.process.wait(3 * PATIENCE) == 3, host.log.read_text()
        finally:
            host.process.kill()
            host.process.wait()
        assert silent.n_came >= 2
    text = host.log.read_text()
    assert f"no learner at {url} for {seconds} s" in text
    assert text.count("nobody has answered") == 1
