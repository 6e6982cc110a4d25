"""``zrl status`` and ``zrl top`` against a learner that is there, is not, and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests.toys import RandomActor
from zrl.cli import main
from zrl.net.addresses import run_directory
from zrl.rollout import cluster
from zrl.rollout.pipeline import PipelineRollout

LIMIT = 30.0  # seconds
PATH = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def url() -> Iterator[str]:
    folder = run_directory()
    yield f"ipc://{folder}/learner.sock"
    shutil.rmtree(folder)


def learner(url: str) -> PipelineRollout:
    """One without workers, which is quick to start."""
    torch.manual_seed(0)
    it = cluster.rollout("CartPole-v1", RandomActor(2), 8, 2, 2, 2, bind=url)
    it.annotate({"env": "CartPole-v1", "algo": "a2c", "step": 1000, "steps": 4000})
    return it


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_status_is_a_page_or_json(url: str) -> None:
    with learner(url) as it:
        shown = run("status", url)
        assert shown.exit_code == 0, shown.output
        first, *_ = lines = shown.output.splitlines()
        assert first.startswith("CartPole-v1 a2c run ")
        assert any("1,000 of 4,000 steps (25 %)" in text for text in lines)
        assert " ".join(text.strip() for text in lines[-2:]).endswith(
            f"no worker yet: start some: zrl worker --connect {url}"
        )
        told = run("status", url, "--json")
        assert told.exit_code == 0
        document = json.loads(told.output)
        assert set(document) == set(it.status())
        assert document["url"] == url


def test_no_learner(url: str) -> None:
    shown = run("status", url, "--timeout", "0.1")
    assert shown.exit_code == 3
    assert f"no learner published a status at {url}.pub within 0.1 s. Is it running?" in shown.output


@pytest.mark.parametrize("verb", ["status", "top"])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("learner", "URL: learner: expected ipc:///PATH or tcp://HOST:PORT"),
        ("tcp://127.0.0.1:65535", "expected a port from 1 to 65534"),
    ],
)
def test_urls_that_are_none(verb: str, wrong: str, text: str) -> None:
    shown = run(verb, wrong)
    assert shown.exit_code == 2
    assert text in shown.output


def test_a_run_folder(tmp_path: Path) -> None:
    shown = run("status", str(tmp_path))
    assert (shown.exit_code, "has no status.json" in shown.output) == (2, True)
    file = tmp_path / "status.json"
    for bad, text in (("{", "cannot be read"), ("[]", "expected an object, found list")):
        file.write_text(bad)
        shown = run("status", str(tmp_path))
        assert (shown.exit_code, text in shown.output) == (2, True), shown.output
    file.write_text(json.dumps({"training": {"env": "Maze-v0"}, "verdict": "balanced"}))
    then = time.time() - 125
    os.utime(file, (then, then))
    shown = run("status", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    first, *rest = shown.output.splitlines()
    assert first.startswith("as of 2:0")
    assert [text.strip() for text in rest if text.strip()][-2:] == ["Maze-v0", "balanced"]
    told = json.loads(run("status", str(tmp_path), "--json").output)
    assert told["verdict"] == "balanced"
    assert 125 <= told["age"] < 125 + LIMIT


def until(done: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def test_top_without_a_terminal(url: str, tmp_path: Path) -> None:
    """Lines while the learner is there, one when it is gone, lines again when another one comes; Ctrl-C ends it."""
    log = tmp_path / "log"

    def runs() -> set[str]:
        """Runs that it has shown, in one or more lines each; others are of learners that seem gone for a while."""
        return {text.split()[3] for text in log.read_text().splitlines() if text.startswith("CartPole-v1 a2c run ")}

    with log.open("wb") as out:
        top = subprocess.Popen(
            [sys.executable, "-m", "zrl", "top", url],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": PATH},
        )
    try:
        for n in (1, 2):
            with learner(url):
                until(lambda n=n: len(runs()) == n, log.read_text)  # type: ignore[misc]
            until(lambda: "waiting for one" in log.read_text().splitlines()[-1], log.read_text)
        assert len(runs()) == 2
        top.send_signal(signal.SIGINT)
        assert top.wait(LIMIT) == 0
    finally:
        top.kill()
        top.wait()
    assert "Traceback" not in log.read_text()


def test_top_on_a_terminal(url: str) -> None:
    ours, theirs = pty.openpty()
    top = subprocess.Popen(
        [sys.executable, "-m", "zrl", "top", url],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": PATH, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"},
    )
    os.close(theirs)
    seen = b""

    def sees(text: str) -> bool:
        nonlocal seen
        with contextlib.suppress(OSError):  # its end
            while select.select([ours], [], [], 0)[0]:
                seen += os.read(ours, 1 << 16)
        return text.encode() in seen

    try:
        until(lambda: sees(f"waiting for a learner at {url}.pub"), lambda: repr(seen))
        with learner(url):
            until(lambda: sees("1,000 of 4,000 steps"), lambda: repr(seen))
        until(lambda: sees("waiting for one"), lambda: repr(seen))
        top.send_signal(signal.SIGINT)
        until(lambda: sees("") and top.poll() is not None, lambda: repr(seen))
        assert top.returncode == 0
        assert b"Traceback" not in seen
    finally:
        top.kill()
        top.wait()
        os.close(ours)


def test_looking_needs_no_torch() -> None:
    code = "from zrl.cli import main; main(['status', 'x'], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PATH},
        check=False,
    )
    assert "zrl.net.observer" in done.stderr
    assert " torch\n" not in done.stderr
