"""Programs by hand: ``zrl`` commands as processes, perhaps each on a machine of its own (`tests.system.namespaces`)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.system.namespaces import Machine
from zrl.net.keys import authorize, new_pair

ROOT = Path(__file__).parents[2]
DEADLINE = 40.0  # seconds for anything at all
ZRL = [sys.executable, "-m", "zrl"]

ACTORS = """
from zrl.zoo import MLPActor


def narrow(observation_space, action_space):
    return MLPActor(observation_space, action_space, hidden=(8,))


def broken(observation_space, action_space):
    import os

    if "ZRL_TEST_LEARNER" not in os.environ:
        raise RuntimeError("not on this machine")
    return narrow(observation_space, action_space)


def another(observation_space, action_space):
    import os

    width = 8 if "ZRL_TEST_LEARNER" in os.environ else 9
    return MLPActor(observation_space, action_space, hidden=(width,))


class Recorded(MLPActor):
    # writes down, wherever a learner trains it, the checksum of its parameters
    def __init__(self, observation_space, action_space):
        super().__init__(observation_space, action_space, hidden=(8,))

    def forward(self, obs, act, rew, fin, *, hx=None):
        import os
        import zlib

        import torch

        if "RANK" in os.environ and torch.is_grad_enabled():
            crc = zlib.crc32(b"".join(p.detach().numpy().tobytes() for p in self.parameters()))
            with open(f"weights-{os.environ['RANK']}", "a") as f:
                print(crc, file=f)
        return super().forward(obs, act, rew, fin, hx=hx)
"""


class Program:
    """A running command and what it prints."""

    def __init__(self, words: Sequence[str], folder: Path, log: Path, **environment: str) -> None:
        self.log = log
        path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                words,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, **environment},
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.text}") from None

    def wait_for(self, text: str, times: int = 1) -> None:
        until(
            lambda: self.text.count(text) >= times or self.process.poll() is not None,
            lambda: f"no {text!r} in: {self.text}",
        )
        assert self.text.count(text) >= times, self.text

    def children(self) -> set[int]:
        """Its descendants."""
        found, level = set[int](), [self.process.pid]
        while level:
            level = [pid for parent in level for pid in children_of(parent)]
            found.update(level)
        return found


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def until(done: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    (tmp_path / "my_actors.py").write_text(ACTORS)
    return tmp_path


class Programs:
    """Starts programs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Program] = []

    def start(self, words: Sequence[str], on: Machine | None = None, **environment: str) -> Program:
        """A command, here or on another machine."""
        log = self.folder / f"{len(self.started)}.log"
        program = Program([*(on.prefix if on else []), *words], self.folder, log, **environment)
        self.started.append(program)
        return program

    def learner(self, url: str, *words: str, on: Machine | None = None) -> Program:
        small = ["--algo", "a2c", "--steps", "1k", "--n-steps", "8", "--envs", "4", "--seed", "1"]
        rest = ["--eval-episodes", "0", "--runs", str(self.folder / "runs")]
        return self.start(
            [*ZRL, "learner", "CartPole-v1", "--bind", url, *small, *rest, *words], on, ZRL_TEST_LEARNER="1"
        )

    def worker(self, url: str, *words: str, on: Machine | None = None) -> Program:
        return self.start([*ZRL, "worker", "--connect", url, "--count", "2", *words], on)


@pytest.fixture
def programs(folder: Path) -> Iterator[Programs]:
    before = set(run_folders())  # of a test that was cut off: not ours to wait for
    programs = Programs(folder)
    yield programs
    for program in programs.started:
        with contextlib.suppress(ProcessLookupError):
            program.process.kill()
        program.process.wait()
    until(lambda: before.issuperset(run_folders()), lambda: f"zygotes that may still import leave: {run_folders()}")


def run_folders() -> list[Path]:
    """Those that are there; a zygote whose host was killed removes its own as soon as it has imported everything."""
    return [path for path in Path(tempfile.gettempdir()).glob("zrl-*") if not path.name.startswith("zrl-logs-")]


def free_port() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port


def address(kind: str, folder: Path) -> str:
    return f"ipc://{folder}/l.sock" if kind == "ipc" else f"tcp://127.0.0.1:{free_port()}"


def status_of(url: str, folder: Path, *words: str, on: Machine | None = None) -> dict[str, Any]:
    """What ``zrl status`` says; empty where it hears nothing."""
    command = [*(on.prefix if on else []), *ZRL, "status", url, "--json", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def trained(folder: Path) -> int:
    """Updates that learners in this folder have made."""
    return sum(len(file.read_text().splitlines()) for file in folder.glob("runs/*/metrics.jsonl"))


def goes_on(programs: Programs, learner: Program, updates: int = 20) -> None:
    before = trained(programs.folder)
    until(lambda: trained(programs.folder) > before + updates, lambda: learner.text)


def keys_in(folder: Path, *more: str) -> None:
    """A learner's keys in ``a``, and in ``b``, and others where wanted, those of hosts that it knows."""
    server = new_pair(folder / "a", "server")
    for name in ("b", *more):
        host = "one" if name == "b" else name
        authorize(folder / "a", host, new_pair(folder / name, host))
        authorize(folder / name, "server", server)
