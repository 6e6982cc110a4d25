"""``zrl learner`` and ``zrl worker`` by hand, as two programs on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.system.programs import (
    DEADLINE,
    ZRL,
    Programs,
    address,
    children_of,
    folder,
    free_port,
    goes_on,
    keys_in,
    programs,
    status_of,
    trained,
    until,
)

__all__ = ["folder", "programs"]  # fixtures


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        ("ipc", "zygote"),
        pytest.param("tcp", "host", marks=pytest.mark.long),
        pytest.param("ipc", "host", marks=pytest.mark.long),
        pytest.param("tcp", "zygote", marks=pytest.mark.long),
    ],
)
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


def test_a_learner_waits_for_those_that_it_expects(programs: Programs) -> None:
    url = address("tcp", programs.folder)
    learner = programs.learner(url, "--expect-workers", "4")
    learner.wait_for("0 of 4 workers are there")
    programs.worker(url, "--id", "one")
    learner.wait_for("2 of 4 workers are there")
    assert trained(programs.folder) == 0
    programs.worker(url, "--id", "two")
    assert learner.wait() == 0, learner.text
    assert "4 of 4 workers are there: training begins" in learner.text
    assert trained(programs.folder) > 0
    assert [worker.wait() for worker in programs.started[1:]] == [0, 0]


def test_a_learner_that_waits_can_be_stopped(programs: Programs) -> None:
    learner = programs.learner(address("ipc", programs.folder), "--expect-workers", "1")
    learner.wait_for("0 of 1 workers are there")
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text


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


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("words", [pytest.param((), id="shm"), pytest.param(("--no-shm",), id="no-shm")])
@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_learner_that_stands_still_for_half_a_minute(programs: Programs, kind: str, words: tuple[str, ...]) -> None:
    """Its host gives it up, and comes back by itself; the learner takes nobody for lost for want of words that it could
    not hear. What the host's end cost is counted, and then all is as it was."""
    url = address(kind, programs.folder)
    learner = programs.learner(url, "--steps", "100M")
    worker = programs.worker(url, *words)
    goes_on(programs, learner)
    before = rate(programs)
    os.kill(learner.process.pid, signal.SIGSTOP)
    time.sleep(30.0)
    os.kill(learner.process.pid, signal.SIGCONT)
    worker.wait_for("welcome", 2)
    goes_on(programs, learner)
    until(lambda: rate(programs) > before / 3, lambda: f"slower than {before:.0f} updates/s: {learner.text}")
    status = status_of(url, programs.folder)
    assert status["workers"] == 2
    assert set(status["losses"]) <= {"host bye", "unreachable", "host unreachable"}, status["losses"]
    assert sum(status["losses"].values()) == 2
    f = status["fragments"]
    assert f["committed"] == f["consumed"] + f["dropped"] + f["in_flight"]
    assert f["lost"] <= 2
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    assert worker.wait() == 0, worker.text


def rate(programs: Programs) -> float:
    """Updates a second, over two."""
    before, begin = trained(programs.folder), time.monotonic()
    time.sleep(2.0)
    return (trained(programs.folder) - before) / (time.monotonic() - begin)


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.parametrize("how", [pytest.param((), marks=pytest.mark.long), ("--no-shm",)])
def test_a_worker_that_is_told_to_leave_delivers_what_it_has(programs: Programs, how: tuple[str, ...]) -> None:
    """In mid-fragment and in mid-batch: the learner counts no loss, and has all that was delivered."""
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--steps", "100M", "--max-lag", "-1")
    first = programs.worker(url, *how)
    goes_on(programs, learner)
    told = first.children() if "--no-shm" in how else set()  # as who stops a service or a container does it
    for pid in (*told, first.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert first.wait() == 143, first.text
    assert "the workers finish what they have in hand" in first.text
    second = programs.worker(url)
    goes_on(programs, learner)
    status = status_of(url, programs.folder)
    assert (status["losses"], status["dropped"], status["fragments"]["lost"]) == ({}, {}, 0)
    assert not first.children()
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    assert second.wait() == 0, second.text


@pytest.mark.long
def test_the_second_signal_does_not_wait(programs: Programs) -> None:
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--steps", "100M")
    worker = programs.worker(url, "--drain-timeout", "1000")
    goes_on(programs, learner)
    for pid in sorted(worker.children())[1:]:  # the workers
        os.kill(pid, signal.SIGSTOP)
    worker.process.send_signal(signal.SIGTERM)
    worker.wait_for("for 1000 s at most")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 143, worker.text


@pytest.mark.long
def test_who_does_not_finish_in_time_is_killed(programs: Programs) -> None:
    url = address("ipc", programs.folder)
    learner = programs.learner(url, "--steps", "100M")
    worker = programs.worker(url, "--drain-timeout", "0.5")
    goes_on(programs, learner)
    for pid in sorted(worker.children())[1:]:
        os.kill(pid, signal.SIGSTOP)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 143, worker.text
    assert "not all workers have finished within 0.5 s, and are killed" in worker.text


@pytest.mark.long
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
    ("actor", "text"),
    [
        pytest.param("broken", "RuntimeError: not on this machine", marks=pytest.mark.long),
        ("another", "the same version of the code"),
    ],
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


@pytest.mark.long
def test_an_address_in_use(programs: Programs) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    first = programs.learner(url)
    first.wait_for("start workers with")
    second = programs.learner(url)
    assert second.wait() == 5
    assert "address in use" in second.text
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 143
