"""Two learners that train as one, under ``torchrun`` or by hand, with hosts that know the address of the first."""

from __future__ import annotations

import re
import signal
import socket
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.system.programs import (
    Program,
    Programs,
    folder,
    free_port,
    goes_on,
    programs,
)
from zrl.train import checkpoint

__all__ = ["folder", "programs"]  # fixtures

#: The command line, with less patience for workers that do not come back.
IMPATIENT = (
    "from zrl.rollout import cluster; cluster.rollout.__kwdefaults__['starve_timeout'] = 1.5; "
    "from zrl.cli import main; main()"
)
MASTER: dict[str, Any] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
SMALL = [
    *("learner", "CartPole-v1", "--actor", "my_actors:Recorded", "--n-steps", "8", "--envs", "4", "--seed", "1"),
    *("--eval-episodes", "0", "--runs", "runs"),
]


def port_for_two() -> int:
    """A port that is free together with the next three."""
    while True:
        port = free_port()
        if port + 2 < 65535 and not taken(port + 2) and not taken(port + 3):
            return port


def taken(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def worker(programs: Programs, url: str, name: str) -> Program:
    return programs.worker(url, "--id", name, "--import", "my_actors")


def by_hand(programs: Programs, url: str, *words: str) -> list[Program]:
    """Both learners, without anybody who would end one when the other does."""
    there: dict[str, Any] = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", IMPATIENT, *SMALL, "--bind", url, *words]
    return [programs.start(command, RANK=str(rank), OMP_NUM_THREADS="1", **there) for rank in (0, 1)]


def weights(folder: Path, rank: int) -> list[str]:
    """Checksums of the parameters at the beginning of each forward pass in training."""
    file = folder / f"weights-{rank}"
    return file.read_text().splitlines() if file.exists() else []


def spread(hosts: list[Program]) -> list[tuple[int, bool]]:
    """Of each host the first index of its workers, and whether it was sent on."""
    found = []
    for host in hosts:
        host.wait_for("welcome")
        index = re.search(r"welcome: CartPole-v1, workers (\d+) to", host.text)
        assert index is not None
        found.append((int(index[1]), "sent on to tcp://" in host.text))
    return sorted(found)


def test_two_learners_train_as_one_and_stop_as_one(programs: Programs) -> None:
    """Workers are there first. Ctrl-C goes to torchrun, and in the midst of an update with several steps."""
    url = f"tcp://127.0.0.1:{port_for_two()}"
    hosts = [worker(programs, url, name) for name in ("a", "b")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    options = ["--algo", "ppo", "--epochs", "2", "--minibatch", "8", "--steps", "100M", "--bind", url]
    both = programs.start(
        [*torchrun, "--master-port", str(free_port()), "-m", "zrl", *SMALL, *options], OMP_NUM_THREADS="1"
    )
    assert spread(hosts) == [(0, False), (32768, True)]
    goes_on(programs, both, updates=5)
    both.process.send_signal(signal.SIGINT)
    both.wait()
    one, two = weights(programs.folder, 0), weights(programs.folder, 1)
    assert len(set(one)) > 5 * 8
    assert one == two
    assert both.text.count("start workers with, once or more for each of the 2 learners:") == 1
    assert both.text.count("go on with: zrl learner --resume") == 1
    assert [host.wait() for host in hosts] == [0, 0], hosts[0].text + hosts[1].text
    (run,) = (programs.folder / "runs").iterdir()
    state = checkpoint.newest(run / "checkpoints")[1]
    assert state["step"] == state["update"] * 2 * 32  # the steps of both, and whole updates only


@pytest.mark.long
def test_a_learner_that_is_killed_ends_the_other_and_both_can_be_resumed(programs: Programs) -> None:
    url = f"tcp://127.0.0.1:{port_for_two()}"
    hosts = [worker(programs, url, name) for name in ("a", "b")]
    learners = by_hand(programs, url, "--algo", "impala", "--steps", "100M")
    spread(hosts)
    goes_on(programs, learners[0], updates=5)
    learners[1].process.kill()
    assert learners[0].wait() == 1, learners[0].text
    assert "another learner is gone" in learners[0].text
    (run,) = (programs.folder / "runs").iterdir()
    state = checkpoint.newest(run / "checkpoints")[1]
    for rank in (0, 1):
        (programs.folder / f"weights-{rank}").unlink()
    steps = state["step"] + 5 * 64
    left = next(host for host in hosts if "sent on" not in host.text)
    assert left.wait() == 0, left.text  # learner 0 has told it that the run is over
    hosts.append(worker(programs, url, "c"))
    again = by_hand(programs, url, "--resume", str(run), "--steps", str(steps))
    assert [learner.wait() for learner in again] == [0, 0], "".join(p.text for p in programs.started)
    assert f"at step {state['step']:,}" in again[0].text
    one, two = weights(programs.folder, 0), weights(programs.folder, 1)
    assert one == two
    assert len(one) == 5
    saved = zlib.crc32(b"".join(state["weights"][name].numpy().tobytes() for name in state["weights"]))
    assert int(one[0]) == saved
    assert [host.wait() for host in hosts] == [0, 0, 0], "".join(p.text for p in programs.started)


@pytest.mark.long
def test_a_learner_that_starves_ends_both(programs: Programs) -> None:
    """Of REINFORCE, which has no use for the value and its parameters."""
    url = f"tcp://127.0.0.1:{port_for_two()}"
    learners = by_hand(programs, url, "--algo", "reinforce", "--steps", "100M", "--expect-workers", "4")
    learners[0].wait_for("0 of 4 workers are there")
    hosts = [worker(programs, url, name) for name in ("a", "b")]
    learners[0].wait_for("4 of 4 workers are there: training begins")
    goes_on(programs, learners[0], updates=2)
    sent = next(host for host in hosts if "sent on" in host.text)
    sent.process.kill()
    assert [learner.wait() for learner in learners] == [4, 4], learners[0].text + learners[1].text
    assert "Error: learner 1: 0 workers with 0 slots are alive" in learners[0].text
    assert "Error: 0 workers with 0 slots are alive" in learners[1].text
    one, two = weights(programs.folder, 0), weights(programs.folder, 1)
    assert one == two
    assert len(set(one)) > 2


def test_a_learner_that_is_refused_at_its_start_ends_both(programs: Programs) -> None:
    port = port_for_two()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port + 2))
        other.listen()
        learners = by_hand(programs, f"tcp://127.0.0.1:{port}")
        assert [learner.wait() for learner in learners] == [5, 5], learners[0].text + learners[1].text
    assert f"Error: learner 1: tcp://127.0.0.1:{port + 2}: address in use" in learners[0].text


def test_zrl_train_is_not_for_several(programs: Programs) -> None:
    program = programs.start([sys.executable, "-m", "zrl", "train"], WORLD_SIZE="2", RANK="0", **MASTER)
    assert program.wait() == 2
    assert "use torchrun -m zrl learner with zrl worker" in program.text
