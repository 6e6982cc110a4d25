"""A child that the kernel kills when its parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.launch.processes import environment, free_port, marked, nothing_left, until
from zrl.errors import ProcessError
from zrl.launch import tied

PARENT = """
import os, sys, time
from zrl.launch import tied
child = tied.start(["worker", "--connect", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, f"tcp://127.0.0.1:{free_port()}"],
            stdout=subprocess.PIPE,
            env=environment(tmp_path),
        )
        with parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            until(lambda: len(marked(tmp_path)) >= 3, lambda: f"{marked(tmp_path)}")  # with its zygote
            assert os.getpgid(child) == child
            parent.send_signal(signal.SIGKILL)
        until(lambda: not Path(f"/proc/{child}").exists(), lambda: "outlives its parent")


def test_it_does_not_begin_without_its_parent() -> None:
    words = [sys.executable, "-m", "zrl.launch.tied", "1", sys.executable, "-c", "print('began')"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_its_status_is_that_of_a_shell() -> None:
    child = tied.start(["--version"])
    assert tied.stop(child, 60.0) in (0, 143)
    child = tied.start(["worker", "--connect", f"tcp://127.0.0.1:{free_port()}"])
    child.kill()
    assert tied.stop(child, 60.0) == tied.status(child) == 137


def test_only_by_the_main_thread() -> None:
    raised: list[BaseException] = []

    def start() -> None:
        try:
            tied.start(["--version"])
        except ProcessError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    with pytest.raises(ProcessError, match="by the main thread"):
        raise raised[0]
