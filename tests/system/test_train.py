"""``zrl train`` as a person uses it: in a terminal, interrupted, resumed, looked at."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.programs import DEADLINE, ZRL, children_of

CTRL_C = b"\x03"
SMALL = ["--envs", "4", "--n-steps", "16", "--seed", "1", "--epochs", "1", "--eval-episodes", "0"]


class Terminal:
    """A command in a pseudo-terminal of 100 columns, and what is on its screen."""

    def __init__(self, words: list[str], folder: Path) -> None:
        master, slave = pty.openpty()
        self._master = master
        self.text = ""
        self.process = subprocess.Popen(
            words,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            start_new_session=True,
            env={**os.environ, "COLUMNS": "100", "LINES": "40", "TERM": "xterm"},
            preexec_fn=_take_the_terminal,
        )
        os.close(slave)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read(self, seconds: float) -> bool:
        """Take what is printed within `seconds`; False at the end."""
        if not select.select([self._master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the terminal's last user has gone
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def wait_for(self, pattern: str, deadline: float = DEADLINE) -> None:
        end = time.monotonic() + deadline
        while not re.search(pattern, self.text):
            going = self.read(0.1)
            assert going or re.search(pattern, self.text), self.text
            assert time.monotonic() < end, f"no {pattern!r} in: {self.text[-3000:]}"

    def wait(self) -> int:
        end = time.monotonic() + DEADLINE
        while self.read(0.1):
            assert time.monotonic() < end, self.text[-3000:]
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_the_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches all of the group, as it does for a person


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[list[Terminal]]:
    made: list[Terminal] = []
    yield made
    for terminal in made:
        terminal.close()


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ZRL, *words], cwd=folder, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.timeout(240)
def test_train_interrupt_resume_solve_eval_plot(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminal = Terminal([*ZRL, "train", "CartPole-v1", "--seed", "1", "--steps", "150k"], tmp_path)
    terminals.append(terminal)
    terminal.wait_for("run folder (.*)")
    terminal.wait_for("steps/s")
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + DEADLINE
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert terminal.read(0.1)
        assert time.monotonic() < end
    terminal.type(CTRL_C)
    assert terminal.wait() == 130, terminal.text[-3000:]
    assert "stopped by SIGINT" in terminal.text
    assert f"zrl train --resume {folder.relative_to(tmp_path)}" in terminal.text
    assert "Traceback" not in terminal.text
    stopped_at = json.loads(metrics.read_text().splitlines()[-1])["step"]

    goal = ["--stop-at-return", "475", "--require-goal"]
    done = run(["train", "--resume", str(folder), *goal], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"goes on from {folder}/checkpoints/step_{stopped_at:012d}.pt, at step {stopped_at:,}" in done.stdout
    assert "goal reached" in done.stdout
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(1, len(rows) + 1))
    status = json.loads((folder / "status.json").read_text())
    assert status["outcome"] == "goal"
    assert status["fragments"]["committed"] == sum(status["fragments"][k] for k in ("consumed", "dropped", "in_flight"))

    played = run(["eval", f"{folder}@best", "--episodes", "5"], tmp_path)
    assert played.returncode == 0, played.stderr
    assert re.search(r"mean return \d+", played.stdout)
    plotted = run(["plot", str(folder)], tmp_path)
    assert plotted.returncode == 0, plotted.stderr
    assert list((folder / "plots").glob("*.png"))


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_kills(tmp_path: Path, signum: signal.Signals) -> None:
    """An update that takes for ever cannot be interrupted by the first one."""
    code = (
        "import zrl.train.loop as loop\n"
        "def for_ever(batch):\n"
        "    print('learning', flush=True)\n"
        "    while True: pass\n"
        "loop.make_update = lambda *args: for_ever\n"
        "from zrl.cli import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "train", "CartPole-v1", *SMALL]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "learning\n":
            assert process.poll() is None
        below = children_of(process.pid)
        process.send_signal(signum)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signum)
        assert process.wait(DEADLINE) == 128 + signum
    end = time.monotonic() + DEADLINE
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < end
        time.sleep(0.02)
