"""SIGINT, SIGTERM, and SIGINT twice, at any time after the start and to every process there is: the commands end soon,
with a status that says so, and nothing of theirs is left."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.faults.world import alive, needs_linux, until
from tests.system.programs import ZRL, Program, Programs, folder, free_port, programs
from zrl.train.run_folder import RunFolder

pytestmark = [needs_linux, pytest.mark.timeout(120)]
__all__ = ["folder", "programs"]  # fixtures

#: Seconds after the start: the interpreter begins, imports zrl, imports torch, starts processes, trains.
DELAYS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 0.9, 1.3, 1.8, 2.4, 3.0)
HOWS = {
    "int": (signal.SIGINT,),
    "term": (signal.SIGTERM,),
    "int-int": (signal.SIGINT, signal.SIGINT),
}


SCRIPT = """
from tests.faults.world import StampEnv
from tests.toys import RandomActor
from zrl.rollout import multi

if __name__ == "__main__":
    with multi.rollout(StampEnv, RandomActor(3), 4, 2, 2, 4, 2) as it:
        for batch in it:
            print("a batch", flush=True)
"""
SMALL = ["--envs", "4", "--n-steps", "8", "--seed", "1", "--eval-episodes", "0", "--steps", "100M", "--runs", "runs"]


class Command:
    """One of the commands in a session of its own, and all processes that come of it: they inherit a mark.

    Args:
        programs: starts it, in its folder.
        kind: which one: train, script, learner or worker.
        port: of the learner.
    """

    def __init__(self, programs: Programs, kind: str, port: int) -> None:
        self.kind, self.port = kind, port
        words = {
            "train": [*ZRL, "train", "CartPole-v1", *SMALL],
            "script": [sys.executable, "-c", SCRIPT],
            "learner": [*ZRL, "learner", "CartPole-v1", "--bind", f"tcp://127.0.0.1:{port}", *SMALL],
            "worker": [*ZRL, "worker", "--connect", f"tcp://127.0.0.1:{port}", "--count", "2"],
        }[kind]
        self.folder = programs.folder
        self.mark = f"ZRL_TEST_MARK={secrets.token_hex(8)}"
        variable, _, value = self.mark.partition("=")
        self.temporary = Path(tempfile.mkdtemp(prefix="c-"))  # a short path, or sockets would be elsewhere
        self.program: Program = programs.start(
            ["setsid", *words], None, **{variable: value, "TMPDIR": str(self.temporary), "XDG_RUNTIME_DIR": ""}
        )
        self.pid = self.program.process.pid
        until(lambda: os.getpgid(self.pid) == self.pid)

    def everybody(self) -> list[int]:
        """Pids of all that live, wherever they hang in the tree."""
        return sorted(pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if self._is_ours(pid))

    def _is_ours(self, pid: int) -> bool:
        try:
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and alive(pid)
        except OSError:
            return False

    def zygote(self) -> int:
        """Its pid, as soon as it is there."""
        return int(until(lambda: self._below(self.pid))[0])

    def workers(self) -> list[int]:
        return self._below(self.zygote())

    def _below(self, pid: int) -> list[int]:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(x) for x in (children.read_text().split() if children.exists() else []) if self._is_ours(int(x))]

    def ends(self, codes: Sequence[int]) -> None:
        """It does, with one of these statuses, and nothing is left: no process and so no memory, for that has no name;
        no socket, no lock, no address."""
        code = self.program.wait()
        assert code in codes or (code == 1 and self.python_was_interrupted()), (code, self.program.text)
        until(lambda: not self.everybody(), 5.0)
        assert [path for path in self.temporary.glob("zrl-*") if not path.name.startswith("zrl-logs-")] == []
        for run in (self.folder / "runs").glob("*") if self.kind in ("train", "learner") else ():
            with RunFolder(run).locked():
                pass
        for port in (self.port, self.port + 1) if self.kind == "learner" else ():
            with socket.socket() as free:
                free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                free.bind(("127.0.0.1", port))

    def python_was_interrupted(self) -> bool:
        """In its own start-up, or in an import in C, it ends with 1 and says this; that is not zrl's to choose."""
        return "KeyboardInterrupt" in self.program.text and "Aborted!" not in self.program.text


def strike(pid: int, how: str, send: Callable[[int, int], None] = os.kill) -> None:
    first, *rest = HOWS[how]
    send(pid, first)
    for signum in rest:
        time.sleep(0.05)
        try:
            send(pid, signum)
        except ProcessLookupError:  # the first one was enough
            return


def codes(how: str) -> tuple[int, int]:
    """Statuses after these signals: of a command that ended by itself, and of one that the system ended."""
    signum = HOWS[how][0]
    return 128 + signum, -signum


SHORT = [("train", "int", 0.35, False), ("worker", "term", 0.2, True)]
#: `zrl train` has every signal at every time; the others get them in turn. As a terminal sends it, or to one process.
LONG = [
    (kind, how, delay, bool((i + j) % 2))
    for kind in ("train", "script", "learner", "worker")
    for i, delay in enumerate(DELAYS)
    for j, how in enumerate(HOWS)
    if kind == "train" or (i + j) % 3 == 0
]


@pytest.mark.parametrize(
    ("kind", "how", "delay", "group"),
    [*SHORT, *(pytest.param(*x, marks=pytest.mark.long) for x in LONG if x not in SHORT)],
)
def test_at_any_time_after_the_start(programs: Programs, kind: str, how: str, delay: float, group: bool) -> None:
    command = Command(programs, kind, free_port())
    time.sleep(delay)
    strike(command.pid, how, os.killpg if group else os.kill)
    command.ends(codes(how))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["script", "train", "worker"])
def test_to_each_of_its_processes(programs: Programs, kind: str) -> None:
    """Ctrl-C is for the one that the user started. A worker that is told to end finishes, and is replaced. SIGTERM is
    nothing to the process that starts workers; without it there is no going on, which is a failure."""
    port = free_port()
    learner = Command(programs, "learner", port) if kind == "worker" else None
    command = Command(programs, kind, port)
    until(lambda: goes_on(command, kind, 1), 60.0)
    workers = until(lambda: len(found := command.workers()) == 2 and found)
    for pid in (workers[0], command.zygote()):
        for how in ("int", "int-int"):
            strike(pid, how)
    time.sleep(0.3)  # for what must not happen
    assert command.workers() == workers
    strike(workers[0], "term")
    until(lambda: len(found := command.workers()) == 2 and workers[0] not in found)
    strike(command.zygote(), "term")
    time.sleep(0.3)
    os.kill(command.zygote(), signal.SIGKILL)
    command.ends([1])
    assert "the zygote ended with" in command.program.text
    if learner is not None:
        strike(learner.pid, "term")
        learner.ends(codes("term"))


@pytest.mark.long
def test_one_of_two_runs_is_killed_as_a_whole(programs: Programs) -> None:
    """With nobody left to tidy up: its memory goes with it, the folder of its socket and its logs stays. Another run
    does not notice, and one more begins at once at the same address."""
    port = free_port()
    killed, other = Command(programs, "learner", port), Command(programs, "script", port)
    killed.program.wait_for("start workers with")
    host = Command(programs, "worker", port)
    until(lambda: goes_on(killed, "learner", 1) and goes_on(other, "script", 1), 60.0)
    everybody = killed.everybody() + host.everybody()
    assert len(everybody) >= 5
    before = set(os.listdir("/dev/shm"))
    for pid in everybody:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not killed.everybody() + host.everybody(), 5.0)
    again = Command(programs, "learner", port)
    again.program.wait_for("start workers with")
    had = other.program.text.count("a batch")
    until(lambda: goes_on(other, "script", had + 100))
    assert set(os.listdir("/dev/shm")) <= before
    left = [path for command in (killed, host) for path in command.temporary.glob("zrl-*")]
    assert left
    files = [path for folder in left for path in folder.rglob("*") if path.is_file()]
    assert all(path.suffix == ".log" for path in files), files
    for command in (again, other):
        strike(command.pid, "term")
        command.ends(codes("term"))


def goes_on(command: Command, kind: str, n: int) -> bool:
    """Whether it has made so many batches."""
    if kind == "script":
        return command.program.text.count("a batch") >= n
    return sum(len(file.read_text().splitlines()) for file in command.folder.glob("runs/*/metrics.jsonl")) >= n


BEGUN = [
    (whom, how, delay)
    for i, whom in enumerate(("zygote", "worker"))
    for j, how in enumerate(HOWS)
    for k, delay in enumerate((0.0, 0.1, 0.5, 1.5))
    if (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("whom", "how", "delay"), [pytest.param(*x, marks=pytest.mark.long) for x in BEGUN])
def test_to_a_process_that_has_just_begun(programs: Programs, whom: str, how: str, delay: float) -> None:
    """It may not be able to hear yet, and end. Whatever comes of that, the learner says so or goes on, and ends when it
    is told to."""
    command = Command(programs, "script", free_port())
    pid = command.zygote() if whom == "zygote" else until(command.workers)[0]
    time.sleep(delay)
    strike(pid, how)
    time.sleep(1.0)
    if (code := command.program.process.poll()) is not None:
        command.ends([1])
        assert code == 1
        assert "ProcessError: the zygote ended" in command.program.text or "WorkerError: " in command.program.text
        return
    strike(command.pid, "term")
    command.ends(codes("term"))
