"""``zrl learner`` and ``zrl worker`` by hand, as two programs on one machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zrl.net.keys import authorize, new_pair

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
"""


class Program:
    """A running command and what it prints."""

    def __init__(self, words: list[str], folder: Path, log: Path, **environment: str) -> None:
        self.log = log
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*ZRL, *words],
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

    def _start(self, words: list[str], **environment: str) -> Program:
        program = Program(words, self.folder, self.folder / f"{words[0]}-{len(self.started)}.log", **environment)
        self.started.append(program)
        return program

    def learner(self, url: str, *words: str) -> Program:
        small = ["--algo", "a2c", "--steps", "1k", "--n-steps", "8", "--envs", "4", "--seed", "1"]
        rest = ["--eval-episodes", "0", "--runs", str(self.folder / "runs")]
        return self._start(["learner", "CartPole-v1", "--bind", url, *small, *rest, *words], ZRL_TEST_LEARNER="1")

    def worker(self, url: str, *words: str) -> Program:
        return self._start(["worker", "--connect", url, "--count", "2", *words])


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


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_either_order_of_start(programs: Programs, kind: str) -> None:
    url = address(kind, programs.folder)
    if kind == "tcp":
        worker = programs.worker(url)
        until(lambda: bool(worker.children()), lambda: worker.text)  # its zygote
        learner = programs.learner(url)
    else:
        learner = programs.learner(url)
        learner.wait_for(f"zrl worker --connect {url}")
        worker = programs.worker(url)
    assert learner.wait() == 0, learner.text
    assert "all steps taken" in learner.text
    assert worker.wait() == 0, worker.text
    assert "the run is over" in worker.text


@pytest.mark.parametrize("who", ["zygote", "host"])
@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_worker_that_is_slow_to_finish_ends_with_its_run(programs: Programs, who: str, kind: str) -> None:
    """The learner asks it to finish, and goes before it has: that is no lost learner to wait for."""
    url = address(kind, programs.folder)
    learner, worker = programs.learner(url, "--steps", "100M"), programs.worker(url)
    worker.wait_for("welcome")
    zygote = children_of(worker.process.pid)[0]
    stopped = zygote if who == "zygote" else worker.process.pid  # so it cannot start or end anybody, or read a word
    os.kill(stopped, signal.SIGSTOP)
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    os.kill(stopped, signal.SIGCONT)
    assert worker.wait() == 0, worker.text


def test_a_restarted_learner_gets_its_workers_back(programs: Programs) -> None:
    url = address("ipc", programs.folder)
    first = programs.learner(url, "--steps", "100M", "--max-lag", "-1")
    worker = programs.worker(url)
    worker.wait_for("welcome")
    until(lambda: len(worker.children()) == 3, lambda: worker.text)  # a zygote and two workers
    metrics = programs.folder / "runs"
    until(lambda: any(f.stat().st_size for f in metrics.glob("*/metrics.jsonl")), lambda: first.text)
    before = worker.children()
    first.process.kill()
    worker.wait_for("the connection to the learner broke")
    second = programs.learner(url)
    assert second.wait() == 0, second.text
    assert worker.text.count("welcome") == 2
    assert worker.wait() == 0, worker.text
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)


def test_a_worker_gives_up_without_a_learner(programs: Programs) -> None:
    worker = programs.worker(f"tcp://127.0.0.1:{free_port()}", "--give-up-after", "0.5")
    assert worker.wait() == 3
    assert "no learner at" in worker.text


def test_a_worker_stops_on_a_signal_while_it_waits_for_a_learner(programs: Programs) -> None:
    worker = programs.worker(f"ipc://{programs.folder}/nobody.sock")
    until(lambda: bool(worker.children()), lambda: worker.text)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() in (143, -signal.SIGTERM), worker.text  # before its handler is there, the default one
    until(lambda: not worker.children(), lambda: "its zygote")


def test_a_host_under_another_name_takes_over(programs: Programs) -> None:
    """With max_lag=0 every worker has its places in a batch: those of the dead go to whoever comes."""
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--steps", "100M", "--max-lag", "0")
    first = programs.worker(url, "--id", "a")

    def updates() -> int:
        return sum(len(f.read_text().splitlines()) for f in programs.folder.glob("runs/*/metrics.jsonl"))

    until(lambda: updates() > 0, lambda: learner.text + first.text)
    first.process.kill()
    first.process.wait()
    second = programs.worker(url, "--id", "b")
    second.wait_for("workers 2 to 3")
    before = updates()  # perhaps of fragments of the first that were there already
    until(lambda: updates() > before + 4, lambda: learner.text + second.text)
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    assert second.wait() == 0, second.text


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_stops_on_a_signal_and_another_takes_over(programs: Programs, signum: signal.Signals) -> None:
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--steps", "100M")
    first = programs.worker(url, "--id", "a")
    first.wait_for("welcome")
    until(lambda: len(first.children()) == 3, lambda: first.text)
    first.process.send_signal(signum)
    assert first.wait() == 128 + signum, first.text
    second = programs.worker(url, "--id", "a")  # the name is free again, and its indices
    second.wait_for("welcome: CartPole-v1, workers 0 to 1")
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    assert second.wait() == 0, second.text


def test_a_name_belongs_to_one_host(programs: Programs) -> None:
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--steps", "100M")
    first = programs.worker(url, "--id", "a")
    first.wait_for("welcome")
    second = programs.worker(url, "--id", "a")
    second.wait_for("name_taken")
    first.process.send_signal(signal.SIGTERM)
    second.wait_for("welcome")
    learner.process.send_signal(signal.SIGTERM)
    assert learner.wait() == 143
    assert second.wait() == 0


def test_a_module_must_be_allowed(programs: Programs) -> None:
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--actor", "my_actors:narrow")
    refusing = programs.worker(url)
    assert refusing.wait() == 5
    assert "may not import; if you trust it: --import my_actors" in refusing.text
    assert programs.worker(url, "--import", "my_actors").wait() == 0
    assert learner.wait() == 0, learner.text


@pytest.mark.parametrize(
    ("actor", "text"), [("broken", "RuntimeError: not on this machine"), ("another", "the same version of the code")]
)
def test_an_actor_that_cannot_act_here(programs: Programs, actor: str, text: str) -> None:
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--actor", f"my_actors:{actor}")
    worker = programs.worker(url, "--import", "my_actors")
    assert worker.wait() == 5
    assert text in worker.text
    learner.wait_for(text)  # it hears of it, and waits for better ones
    learner.process.send_signal(signal.SIGTERM)
    assert learner.wait() == 143


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["worker", "--connect", "nonsense"], 2, "expected ipc:///PATH or tcp://HOST:PORT"),
        (["worker", "--connect", "tcp://127.0.0.1:1", "--import", "no_such_module"], 2, "no_such_module"),
        (["learner", "CartPole-v1", "--bind", "tcp://0.0.0.0:5555"], 5, "not a loopback address"),
        (["learner", "CartPole-v1", "--workers", "0"], 2, "--workers"),
        (["learner", "Nowhere-v0"], 5, "Gymnasium cannot make"),
        (["train", "CartPole-v1", "--envs", "3"], 2, "envs: expected a multiple of the 2 workers"),
    ],
)
def test_wrong_words(folder: Path, words: list[str], code: int, text: str) -> None:
    done = subprocess.run([*ZRL, *words], cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert text in done.stderr


def keys_in(folder: Path) -> None:
    """A learner's keys in ``a``, and in ``b`` those of a host that it knows."""
    server = new_pair(folder / "a", "server")
    authorize(folder / "a", "one", new_pair(folder / "b", "one"))
    authorize(folder / "b", "server", server)


def test_with_keys(programs: Programs) -> None:
    keys_in(programs.folder)
    url = f"tcp://127.0.0.1:{free_port()}"
    learner = programs.learner(url, "--keys", "a")
    learner.wait_for(f"zrl worker --connect {url} --keys DIR")
    stranger = programs.worker(url, "--give-up-after", "3")
    assert stranger.wait() == 3, stranger.text
    assert f"the learner at {url} refused the handshake: it wants keys (--keys DIR)" in stranger.text
    worker = programs.worker(url, "--keys", "b")
    assert learner.wait() == 0, learner.text
    assert "all steps taken" in learner.text
    assert worker.wait() == 0, worker.text
    secrets = [file.read_text().strip() for file in programs.folder.glob("[ab]/*.secret")]
    for file in programs.folder.rglob("*"):
        if file.is_file() and file.suffix != ".secret":
            assert not any(secret.encode() in file.read_bytes() for secret in secrets), file


def test_an_address_in_use(programs: Programs) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    first = programs.learner(url)
    first.wait_for("start workers with")
    second = programs.learner(url)
    assert second.wait() == 5
    assert "address in use" in second.text
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 143
