"""A start that fails, or that Ctrl-C comes into, leaves nothing behind: the check after each test sees to that."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.toys import CountingActor, CountingEnv
from zrl.errors import ConfigError
from zrl.rollout import cluster, local, multi
from zrl.rollout.pipeline import PipelineRollout


def start(**more: Any) -> PipelineRollout:
    made = multi.rollout(CountingEnv, CountingActor(), 4, 1, 1, n_buffers=2, n_per_batch=1, **more)
    assert isinstance(made, PipelineRollout)
    return made


def test_a_collator_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more threads")

    monkeypatch.setattr(local, "Collator", fail)
    with pytest.raises(OSError, match="no more threads"):
        start(start_method="spawn")


def test_a_folder_for_logs_that_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match=f"the folder {Path(__file__) / 'logs'} cannot be made"):
        start(log_dir=Path(__file__) / "logs")


def test_ctrl_c_in_the_middle_of_the_start_of_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    def interrupted(*args: Any, **more: Any) -> PipelineRollout:
        os.kill(os.getpid(), signal.SIGINT)
        return PipelineRollout(*args, **more)

    monkeypatch.setattr(cluster, "PipelineRollout", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            cluster.rollout("E", CountingActor(), 4, 1, 1, 1, bind=f"ipc://{tmp_path}/l")
    finally:
        signal.signal(signal.SIGINT, before)
