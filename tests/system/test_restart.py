"""A learner that is killed in mid-batch and started again with `--resume`, at the same address."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_peers import Stranger, hello
from tests.system.programs import (
    Program,
    Programs,
    address,
    children_of,
    folder,
    goes_on,
    programs,
    status_of,
    trained,
    until,
)
from zrl.net.codec import encode
from zrl.protocol import messages as m
from zrl.protocol.peers import AGAIN_SECONDS
from zrl.train import checkpoint

__all__ = ["folder", "programs"]  # fixtures


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Its metrics; the last line may be half written."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(text) for text in lines]


def kill_in_mid_batch(programs: Programs, learner: Program, worker: Program) -> None:
    """With max_lag=0 no batch is complete without both workers: one of them stands still, so the learner waits."""
    (zygote,) = children_of(worker.process.pid)
    still = children_of(zygote)[0]
    os.kill(still, signal.SIGSTOP)

    def waits() -> bool:
        before = trained(programs.folder)
        time.sleep(0.3)
        return trained(programs.folder) == before

    until(waits, lambda: learner.text)
    learner.process.kill()
    learner.process.wait()
    os.kill(still, signal.SIGCONT)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("times", [1, 3])
def test_killed_in_mid_batch_and_resumed_at_the_same_address(programs: Programs, times: int) -> None:
    """Its workers come back unaided, its counters go on from the checkpoint, and mail of the old run is refused."""
    url = address("tcp", programs.folder)
    words = ["--steps", "100M", "--checkpoint-every", "320", "--max-lag", "0"]
    learner, worker = programs.learner(url, *words), programs.worker(url)
    goes_on(programs, learner)
    (run,) = (programs.folder / "runs").iterdir()
    until(lambda: (run / "checkpoints" / "latest").exists(), lambda: learner.text)
    for n in range(times):
        with Stranger(url) as stranger:
            stranger.send(encode(hello()))
            welcome = stranger.answer()
            assert isinstance(welcome, m.Welcome)
        kill_in_mid_batch(programs, learner, worker)
        path, saved = checkpoint.newest(run / "checkpoints")
        worker.wait_for("the connection to the learner broke", times=n + 1)
        learner = programs.learner(url, *words, "--resume", str(run))
        worker.wait_for("welcome", times=n + 2)  # within the deadline, which is 40 s
        goes_on(programs, learner)
        assert f"goes on from {path}, at step {saved['step']:,}" in learner.text
        assert "left out" not in learner.text
        rows = rows_of(run)
        assert [row["update"] for row in rows] == list(range(1, len(rows) + 1))
        steps = [row["step"] for row in rows]
        assert steps == [steps[0] * row["update"] for row in rows], "every batch counts, and none twice"
        assert rows[saved["update"] - 1]["step"] == saved["step"]
        versions = [row["version"] for row in rows]
        assert versions == sorted(set(versions))
        assert versions[saved["update"]] > saved["version"]
        refuses_mail_of(programs, url, welcome)
    learner.process.send_signal(signal.SIGINT)
    assert learner.wait() == 130, learner.text
    assert worker.wait() == 0, worker.text
    last, saved = rows_of(run)[-1], checkpoint.newest(run / "checkpoints")[1]
    assert (saved["step"], saved["update"]) == (last["step"], last["update"])


def refuses_mail_of(programs: Programs, url: str, old: m.Welcome) -> None:
    """What the run before would have received is counted, answered where it asks, and changes nothing."""
    who = hello(name="old", count=1)
    before = refused(programs, url)
    with Stranger(url) as stranger:
        stranger.send(encode(m.Beat(old.run_id, who.incarnation, ())))  # nobody has said Hello
        again = stranger.answer()
        assert isinstance(again, m.HelloAgain)
        assert again.run_id != old.run_id
        time.sleep(AGAIN_SECONDS)  # sooner it is not answered again
        stranger.send(encode(dataclasses.replace(who, run_id=old.run_id)))
        assert isinstance(stranger.answer(), m.HelloAgain)
        stranger.send(encode(who))
        assert isinstance(stranger.answer(), m.Welcome)
        stranger.send(encode(m.Beat(old.run_id, who.incarnation, ())))
        stranger.send(encode(m.Ready(old.run_id, who.incarnation, 0, 1, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8)))
        stranger.send(encode(m.Bye(old.run_id, who.incarnation)))  # would end it
        stranger.settle()
        least = {"stale": before.get("stale", 0) + 4, "unknown": before.get("unknown", 0) + 1}

        def counted() -> bool:
            found = refused(programs, url)
            return all(found.get(reason, 0) >= n for reason, n in least.items())

        until(counted, lambda: f"{refused(programs, url)}, not {least}")
        stranger.send(encode(m.Bye(again.run_id, who.incarnation)))
        assert isinstance(stranger.answer(), m.ByeAck)


def refused(programs: Programs, url: str) -> dict[str, int]:
    found: dict[str, int] = status_of(url, programs.folder).get("refused", {})
    return found
