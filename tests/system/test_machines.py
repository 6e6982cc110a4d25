"""Learner and workers on machines of their own: trained across them, cut off from each other, and slowly connected."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.system.namespaces import Machine, machines, needs_machines
from tests.system.programs import ZRL, Program, Programs, folder, goes_on, keys_in, programs, status_of, until

pytestmark = needs_machines
__all__ = ["folder", "programs"]  # fixtures

PORT = 5555
ENDLESS = ["--steps", "100M"]


def url_of(machine: Machine) -> str:
    return f"tcp://{machine.address}:{PORT}"


def keys_of(folder: Path) -> None:
    keys_in(folder, "c", "a-look")


@pytest.mark.timeout(240)
def test_cartpole_is_solved_across_three_machines(programs: Programs) -> None:
    keys_of(programs.folder)
    with machines(3) as (here, *there):
        url = url_of(here)
        goal = ["--algo", "ppo", "--steps", "200k", "--stop-at-return", "475", "--require-goal"]
        sizes = ["--n-steps", "128", "--envs", "16", "--workers", "2", "--eval-episodes", "0", "--seed", "1"]
        learner = programs.start(
            [*ZRL, "learner", "CartPole-v1", "--bind", url, "--keys", "a", *goal, *sizes, "--runs", "runs"], here
        )
        learner.wait_for(f"zrl worker --connect {url} --keys DIR")
        for machine, keys in zip(there, "bc", strict=True):
            programs.start([*ZRL, "worker", "--connect", url, "--keys", keys, "--no-shm", "--id", keys], machine)
        assert learner.process.wait(200) == 0, learner.text
        assert "goal reached" in learner.text
        for worker in programs.started[1:]:
            assert worker.wait() == 0, worker.text


def cut_off(programs: Programs, seconds: float) -> tuple[Program, Program, dict[str, Any]]:
    """A learner and a worker whose machine is cut off for so long, and goes on then. Ends both; the last status."""
    keys_of(programs.folder)
    with machines(2) as (here, there):
        url = url_of(here)
        learner = programs.learner(url, *ENDLESS, "--keys", "a", on=here)
        worker = programs.worker(url, "--keys", "b", "--no-shm", "--give-up-after", "300", on=there)
        goes_on(programs, learner)
        there.cut()
        time.sleep(seconds)
        there.mend()
        goes_on(programs, learner)
        status: dict[str, Any] = {}
        until(
            lambda: bool(status.update(status_of(url, programs.folder, "--keys", "a-look", on=here)) or status),
            lambda: learner.text,
        )
        learner.process.send_signal(2)
        assert learner.wait() == 130, learner.text
        assert worker.wait() == 0, worker.text
        return learner, worker, status


@pytest.mark.timeout(120)
@pytest.mark.long
@pytest.mark.parametrize("seconds", [2.0, 8.0])
def test_a_short_cut_loses_nothing(programs: Programs, seconds: float) -> None:
    """All deadlines between machines are longer."""
    _, worker, status = cut_off(programs, seconds)
    assert worker.text.count("welcome") == 1
    assert status["losses"] == {}
    assert status["fragments"]["lost"] == 0
    assert set(status["dropped"]) <= {"stale", "stale batch"}
    assert not status["refused"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [pytest.param(x, marks=pytest.mark.long) for x in (25.0, 60.0)])
def test_a_long_cut_is_healed(programs: Programs, seconds: float) -> None:
    """Both sides have given each other up: the host starts over, with the same indices, and all is counted."""
    _, worker, status = cut_off(programs, seconds)
    assert worker.text.count("welcome") == 2
    assert sum(status["losses"].values()) == 2
    assert set(status["losses"]) <= {"host silent", "host started over", "host unreachable", "unreachable"}
    f = status["fragments"]
    assert f["committed"] == f["consumed"] + f["dropped"] + f["in_flight"]


@pytest.mark.timeout(120)
@pytest.mark.long
def test_a_machine_dies_and_another_takes_over(programs: Programs) -> None:
    keys_of(programs.folder)
    with machines(3) as (here, one, other):
        url = url_of(here)
        learner = programs.learner(url, *ENDLESS, "--keys", "a", on=here)
        first = programs.worker(url, "--keys", "b", "--no-shm", "--id", "one", on=one)
        goes_on(programs, learner)
        one.cut()  # nobody hears of its end
        first.process.kill()
        first.process.wait()
        second = programs.worker(url, "--keys", "c", "--no-shm", "--id", "other", on=other)
        second.wait_for("workers 2 to 3")
        goes_on(programs, learner)
        learner.process.send_signal(2)
        assert learner.wait() == 130, learner.text
        assert second.wait() == 0, second.text


@pytest.mark.timeout(180)
@pytest.mark.long
def test_a_host_that_is_started_again_on_another_machine(programs: Programs) -> None:
    """The learner has not heard of the end of the first when the second comes with its name: never both are in."""
    keys_of(programs.folder)
    with machines(3) as (here, there, other):
        url = url_of(here)
        learner = programs.learner(url, *ENDLESS, "--keys", "a", on=here)
        first = programs.worker(url, "--keys", "b", "--no-shm", "--id", "one", on=there)
        goes_on(programs, learner)
        there.cut()
        first.process.kill()
        first.process.wait()
        second = programs.worker(url, "--keys", "b", "--no-shm", "--id", "one", on=other)
        second.wait_for("name_taken")
        second.wait_for("welcome: CartPole-v1, workers 0 to 1")
        goes_on(programs, learner)
        learner.process.send_signal(2)
        assert learner.wait() == 130, learner.text
        assert second.wait() == 0, second.text


RATE = 20e6 / 8  # bytes a second
SLOW_LEARNER = """
import json, sys, time, resource
from zrl.rollout import cluster
from tests.system.large import LargeActor

def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()

with cluster.rollout("tests.system.large:tests/Large-v0", LargeActor(), 32, 4, 2, 1, bind=sys.argv[1], insecure=True,
                     actor_name="tests.system.large:large_actor") as it:
    print("listening", flush=True)
    nbytes = None
    for n, batch in enumerate(it):
        now = time.monotonic()
        if n == 3:
            began, first, nbytes = now, rss(), it._collator._rings.spec.nbytes
        if n >= 3:
            row = {"n": n - 3, "seconds": now - began, "grown": rss() - first, "nbytes": nbytes}
            print(json.dumps(row), flush=True)
        if n >= 3 and now - began > float(sys.argv[2]):
            break
    stats = it.stats()
    print(json.dumps({"losses": stats["losses"], "refused": stats["refused"], "workers": stats["workers"]}), flush=True)
"""


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_slow_link_slows_and_nothing_else(programs: Programs) -> None:
    """Fragments of 3.8 MB from two workers over 20 Mbit/s: the link is used, memory stays where it is, heartbeats get
    through, nobody is taken for lost."""
    with machines(2) as (here, there):
        url = url_of(here)
        there.limit("20mbit")
        learner = programs.start([sys.executable, "-c", SLOW_LEARNER, url, "15"], here)
        learner.wait_for("listening")
        modules = ["--import", "tests.system.large"]
        worker = programs.start(
            [*ZRL, "worker", "--connect", url, "--count", "2", "--no-shm", "--insecure", *modules], there
        )
        assert learner.process.wait(120) == 0, learner.text + worker.text
        *rows, end = [json.loads(line) for line in learner.text.splitlines() if line.startswith("{")]
        assert worker.wait() == 0, worker.text
    assert end == {"losses": {}, "refused": {}, "workers": 2}
    last = rows[-1]
    assert last["nbytes"] > 3_500_000
    rate = last["n"] * last["nbytes"] / last["seconds"]
    assert 0.7 * RATE < rate < 1.1 * RATE, rows
    assert last["grown"] < 2 * last["nbytes"], rows
    assert worker.text.count("welcome") == 1
