"""`zrl launch ray` on a Ray cluster of several nodes, all of them on this machine: nodes die and join.

Ray runs in other processes throughout: what it opens and starts would count as left behind here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.launch.processes import (
    DEADLINE,
    SMALL,
    checkpoints,
    environment,
    free_port,
    keys_in,
    nothing_left,
    until,
    updates,
)
from zrl.cli import main
from zrl.errors import ConfigError
from zrl.launch.ray import RayOptions, learner_url

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: zrl[ray]")

#: CartPole that takes its time until a file is there.
SLOW = """
import os
import time

import gymnasium as gym


class Slow(gym.Wrapper):
    def step(self, action):
        if not os.path.exists(os.environ["SLOW_UNTIL"]):
            time.sleep(0.02)
        return super().step(action)


gym.register("Slow-v0", lambda: Slow(gym.make("CartPole-v1")))
"""


class Cluster:
    """The process that keeps it."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.log = (folder / "cluster.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("ray_cluster.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=variables,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, (folder / "cluster.log").read_text()

    def tell(self, words: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(words, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline().split()[1:] == words.split()[1:2]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(timeout=DEADLINE)
        self.log.close()


class Launcher:
    """`zrl launch ray` and what it prints."""

    def __init__(self, log: Path, variables: dict[str, str], *words: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zrl", "launch", "ray", *words],
                cwd=log.parent,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def hosts(self) -> list[int]:
        """Processes of hosts so far, in the order of their start."""
        return [int(pid) for pid in re.findall(r"^ray-\w+-\d+: process (\d+) on", self.text, re.MULTILINE)]

    def wait_for_hosts(self, count: int) -> None:
        until(lambda: len(self.hosts()) >= count or self.process.poll() is not None, lambda: self.text)
        assert len(self.hosts()) == count, self.text

    def wait(self) -> int:
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.text}") from None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with nothing_left(tmp_path):
        yield tmp_path


@pytest.fixture
def variables(folder: Path) -> Iterator[dict[str, str]]:
    (folder / "slow_env.py").write_text(SLOW)
    with tempfile.TemporaryDirectory(prefix="zt-", dir="/tmp", ignore_cleanup_errors=True) as short:  # of sockets
        found = environment(folder)
        yield {
            **found,
            "PYTHONPATH": f"{folder}:{found['PYTHONPATH']}",
            "SLOW_UNTIL": str(folder / "fast"),
            "RAY_TMPDIR": short,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",  # a line of each host
            "RAY_health_check_period_ms": "1000",  # a dead node is noticed in 5 s, not 15
        }


@pytest.fixture
def cluster(folder: Path, variables: dict[str, str]) -> Iterator[Cluster]:
    cluster = Cluster(folder, variables)
    yield cluster
    cluster.close()


Launch = Callable[..., Launcher]


@pytest.fixture
def launch(folder: Path, variables: dict[str, str]) -> Iterator[Launch]:
    started: list[Launcher] = []

    def start(*words: str) -> Launcher:
        started.append(Launcher(folder / f"log-{len(started)}", variables, *words))
        return started[-1]

    with contextlib.ExitStack() as stack:
        yield start
        for launcher in started:
            stack.enter_context(ended(launcher.process))


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill it behind the block, if it is still there."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def family(pid: int) -> set[int]:
    """A process and its descendants."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found |= family(int(child))
    return found


def wait_for_the_end_of(pids: set[int]) -> None:
    until(lambda: not any(map(alive, pids)), lambda: f"still there: {sorted(filter(alive, pids))}")


def wait_for_updates(launcher: Launcher, runs: Path, count: int) -> None:
    until(lambda: updates(runs) > count or launcher.process.poll() is not None, lambda: launcher.text)
    assert launcher.process.poll() is None, launcher.text


@with_ray
@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_node_dies_and_another_takes_its_place(folder: Path, cluster: Cluster, launch: Launch) -> None:
    cluster.tell("add a 1 0")
    cluster.tell("add b 1 0")
    words = ["--algo", "impala", "--n-steps", "8", "--envs", "4", "--seed", "1", "--eval-episodes", "0"]
    launcher = launch(
        *("--address", cluster.address, "--hosts", "2", "--workers-per-host", "1", "--port", str(free_port())),
        *("--", "slow_env:Slow-v0", *words, "--steps", "20k"),
    )
    launcher.wait_for_hosts(2)
    runs = folder / "runs"
    until(lambda: launcher.text.count("welcome: slow_env") == 2 and updates(runs) > 2, lambda: launcher.text)
    families = [family(pid) for pid in launcher.hosts()]
    assert all(len(one) >= 3 for one in families)  # zrl worker, its zygote, its worker
    cluster.tell("kill b")
    until(lambda: sum(map(alive, launcher.hosts())) == 1, lambda: launcher.text)
    (lost,) = (one for one, pid in zip(families, launcher.hosts(), strict=True) if not alive(pid))
    wait_for_the_end_of(lost)
    wait_for_updates(launcher, runs, updates(runs) + 2)  # one host goes on
    cluster.tell("add c 1 0")
    launcher.wait_for_hosts(3)
    until(lambda: launcher.text.count("welcome: slow_env") == 3, lambda: launcher.text)
    (folder / "fast").touch()
    assert launcher.wait() == 0, launcher.text
    assert "all steps taken" in launcher.text
    assert not any(map(alive, launcher.hosts()))


@with_ray
@pytest.mark.long
@pytest.mark.timeout(300)
def test_hosts_on_every_node_for_a_learner_that_is_there(
    folder: Path, variables: dict[str, str], cluster: Cluster, launch: Launch
) -> None:
    keys = keys_in(folder / "keys")
    cluster.tell("add a 1 0")
    url = f"tcp://127.0.0.1:{free_port()}"
    learner = [sys.executable, "-m", "zrl", "learner", *SMALL, "--steps", "100M", "--max-lag", "-1", "--bind", url]
    with (folder / "learner.log").open("wb") as log:
        running = subprocess.Popen([*learner, "--keys", keys], cwd=folder, env=variables, stdout=log, stderr=log)
    with ended(running):
        launcher = launch(
            "--address", cluster.address, "--connect", url, "--workers-per-host", "1", "--keys", str(keys)
        )
        launcher.wait_for_hosts(1)
        cluster.tell("add b 1 0")
        launcher.wait_for_hosts(2)
        until(lambda: launcher.text.count("welcome: CartPole") == 2, lambda: launcher.text)
        cluster.tell("kill b")
        until(lambda: "its node is gone" in launcher.text, lambda: launcher.text)
        until(lambda: sum(map(alive, launcher.hosts())) == 1, lambda: launcher.text)
        (left,) = filter(alive, launcher.hosts())
        os.kill(left, signal.SIGKILL)
        launcher.wait_for_hosts(3)  # another of the same actor, after a while
        assert "ended with 137" in launcher.text
        until(lambda: launcher.text.count("welcome: CartPole") == 3, lambda: launcher.text)
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.wait() == 143, launcher.text
        assert "ended with 143" in launcher.text  # SIGTERM reaches it, and it need not be killed
        assert not any(map(alive, launcher.hosts()))
        assert running.poll() is None  # it waits for others
        running.terminate()
        assert running.wait(DEADLINE) == 143
    secrets = [file.read_bytes().strip() for file in keys.glob("*.secret")]
    files = [file for file in Path(variables["RAY_TMPDIR"]).rglob("*") if file.is_file() and not file.is_symlink()]
    assert files
    assert not [file for file in files if any(secret in file.read_bytes() for secret in secrets)]


@with_ray
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_learner_on_a_node_with_a_gpu_and_what_stops_it(folder: Path, cluster: Cluster, launch: Launch) -> None:
    cluster.tell("add a 2 1")
    words = ["--address", cluster.address, "--hosts", "1", "--workers-per-host", "1", "--gpus", "1"]
    hopeless = launch(*words[:-2], "--port", str(free_port()), "--import", "no_module", "--", *SMALL)
    assert hopeless.wait() == 2, hopeless.text
    assert "ended with 2\n" in hopeless.text
    there = launch(*words, "--port", str(free_port()), "--", *SMALL, "--device", "cpu", "--steps", "1k")
    assert there.wait() == 0, there.text
    assert "learner at tcp://127.0.0.1:" in there.text
    assert "all steps taken" in there.text
    runs = folder / "runs"  # not in the folder of an actor
    keys = keys_in(folder / "keys")  # so at the node's address
    for stop, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        before, saved = updates(runs), len(checkpoints(runs))
        launcher = launch(
            *(*words[:-2], "--keys", str(keys), "--port", str(free_port()), "--", *SMALL, "--steps", "100M"),
        )
        launcher.wait_for_hosts(1)
        wait_for_updates(launcher, runs, before + 5)
        everybody = family(launcher.process.pid) | family(launcher.hosts()[0])
        launcher.process.send_signal(stop)
        assert launcher.wait() == code, launcher.text
        wait_for_the_end_of(everybody)
        if stop == signal.SIGTERM:
            assert len(checkpoints(runs)) > saved


@pytest.mark.parametrize(
    ("nodes", "words", "url"),
    [
        (["10.0.0.1"], {}, "tcp://127.0.0.1:5555"),
        (["10.0.0.1", "10.0.0.1"], {}, "tcp://127.0.0.1:5555"),
        (["10.0.0.1", "10.0.0.2"], {"keys": Path("k")}, "tcp://10.0.0.1:5555"),
        (["10.0.0.1", "10.0.0.2"], {"insecure": True}, "tcp://10.0.0.1:5555"),
        (["fd00::1"], {"keys": Path("k")}, "tcp://[fd00::1]:5555"),
        (["10.0.0.1", "10.0.0.2"], {}, ""),
        (["10.0.0.2"], {}, ""),
    ],
)
def test_where_a_learner_listens(nodes: list[str], words: dict[str, Any], url: str) -> None:
    there = [{"NodeManagerAddress": address, "Alive": True} for address in nodes]
    gone = {"NodeManagerAddress": "10.0.0.9", "Alive": False}
    if url:
        assert learner_url(RayOptions(**words), [*there, gone], min(nodes), 5555) == url
        return
    with pytest.raises(ConfigError, match="this cluster has several machines, and nothing would be encrypted"):
        learner_url(RayOptions(**words), [*there, gone], "10.0.0.1", 5555)


@with_ray
@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", "nobody answers at 127.0.0.1:1"),
        ("nonsense", "no Ray cluster at 'nonsense'"),
    ],
)
def test_no_such_cluster(launch: Launch, address: str, text: str) -> None:
    launcher = launch("--address", address, "--", *SMALL, "--envs", "4")
    assert launcher.wait() == 2, launcher.text
    assert f"--address: {text}" in launcher.text


# ── without Ray ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "expected either ENV and words of zrl learner, or --connect URL"),
        (["--connect", "tcp://127.0.0.1:1", "--", "CartPole-v1"], "expected either ENV"),
        (["--env-kwargs", "{}", "--", "CartPole-v1"], "belong behind --"),
        (["--keys", "k", "--insecure", "--", "CartPole-v1"], "--insecure: makes no sense with --keys"),
        (["--hosts", "0", "--", "CartPole-v1"], "expected a number from 1, or auto"),
        (["--hosts", "many", "--", "CartPole-v1"], "expected a number from 1, or auto"),
        (["--hosts", "3", "--", "CartPole-v1", "--algo", "a2c"], "envs: expected a multiple of the 12 workers"),
        (["--connect", "tcp://127.0.0.1:1", "--env-kwargs", "5"], "--env-kwargs: expected a JSON object"),
    ],
)
def test_wrong_words(words: list[str], text: str) -> None:
    result = CliRunner().invoke(main, ["launch", "ray", *words])
    assert result.exit_code == 2, result.output
    assert text in result.output


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, ["launch", "ray", "--", "CartPole-v1", "--algo", "a2c"])
    assert result.exit_code == 5, result.output
    assert "zrl launch ray needs Ray: pip install 'zrl[ray]'" in result.output
