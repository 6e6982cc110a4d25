"""The command line as a user meets it: real processes, their output and their exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.faults.world import impatient
from zrl.cli import main

ZRL = [sys.executable, "-c", "from zrl.cli import main; main()"]
SMALL = ["--envs", "4", "--n-steps", "16", "--seed", "1", "--epochs", "1"]


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_train_then_eval(tmp_path: Path) -> None:
    result = run("train", "CartPole-v1", *SMALL, "--steps", "0.5k", "--eval-episodes", "2", "--runs", str(tmp_path))
    assert result.exit_code == 0, result.output
    for word in (
        "ppo on CartPole-v1",
        "seed 1",
        "all steps taken",
        "steps/s",
        "run folder",
        "checkpoint",
        "return.png",
    ):
        assert word in result.output
    assert "2 episodes: mean return" in result.output
    (folder,) = tmp_path.iterdir()
    again = run("eval", str(folder), "--episodes", "2")
    assert again.exit_code == 0, again.output
    assert again.output.splitlines()[-1] == result.output.splitlines()[-1]


def test_a_missed_goal_fails_if_it_is_required(tmp_path: Path) -> None:
    words = ["train", "CartPole-v1", *SMALL, "--steps", "128", "--runs", str(tmp_path), "--eval-episodes", "0"]
    result = run(*words, "--stop-at-return", "475", "--require-goal")
    assert result.exit_code == 1
    assert "was not reached" in result.output
    assert run(*words, "--stop-at-return", "475").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["train"], 2, "ENV: expected a Gymnasium id such as CartPole-v1"),
        (["train", "CartPole-v1", "--config", "nowhere.toml"], 2, "'nowhere.toml' cannot be read: No such file"),
        (["train", "nowhere.toml"], 2, "'nowhere.toml' cannot be read: No such file"),
        (["train", "CartPole-v1", "--set", "stepz=1"], 2, "--set stepz: no such setting; did you mean steps?"),
        (["train", "CartPole-v1", "--set", "steps"], 2, "--set: expected KEY=VALUE, not 'steps'"),
        (["train", "CartPole-v1", "--envs", "4", "--set", "envs=4"], 2, "--set envs: given twice"),
        (["train", "CartPole-v1", "--env-kwargs", "{"], 2, "--env-kwargs: expected a JSON object"),
        (["train", "CartPole-v1", "--env-kwargs", '{"colour": 1}'], 5, "Gymnasium cannot make 'CartPole-v1'"),
        (["train", "CartPole-v1", "--batch", "3"], 2, "batch: with max_lag=0"),
        (["train", "CartPole-v1", "--eval-every", "9", "--eval-episodes", "0"], 2, "eval_every: needs eval_episodes"),
        (["train", "CartPole-v1", "--actor", "MyActor"], 5, "actor: expected module:function, not 'MyActor'"),
        (["train", "CartPole-v1", "--actor", "no.where:Actor"], 5, "the module 'no.where' cannot be imported"),
        (["train", "CartPole-v1", "--actor", "zrl.zoo:Actor"], 5, "'zrl.zoo' has no function 'Actor'"),
        (["train", "--resume", "/nowhere"], 2, "is no run folder"),
        (["train", "CartPole-v1", "--workers", "-1"], 2, "workers: expected at least 0, not -1"),
        (["train", "CartPole-v1", "--algo", "dqn"], 2, "'dqn' is not one of"),
        (["train", "CartPole-v1", "--steps", "many"], 2, "not a whole number such as"),
        (["train", "CartPole-v1", "--steps", "inf"], 2, "not a whole number such as"),
        (["train", "CartPole-v1", "--steps", "nan"], 2, "not a whole number such as"),
        (["train", "CartPole-v1", "--seed", "18446744073709551616"], 2, "seed: expected 0 to"),
        (["train", "CartPole-v1", "--steps", "0"], 2, "steps: expected at least 1"),
        (["train", "CartPole-v1", "--gamma", "2"], 2, "gamma: expected 0.0 to 1.0, not 2.0"),
        (["train", "CartPole-v1", "--require-goal"], 2, "--require-goal needs --stop-at-return"),
        (["train", "CartPole-v1", "--colour", "red"], 2, "No such option"),
        (["train", "NoSuchThing-v0"], 5, "Gymnasium cannot make 'NoSuchThing-v0'"),
        (["train", "CartPole-v1", "--device", "cuda:99"], 5, "device: 'cuda:99' cannot be used"),
        (["train", "CartPole-v1", "--runs", "/proc/nowhere"], 5, "cannot write a run folder"),
        (["eval", "/nowhere"], 2, "is no run folder"),
        (["plot"], 2, "RUN"),
        (["plot", "/nowhere"], 2, "is no run folder"),
        (["check", "NoSuchThing-v0"], 5, "NoSuchThing-v0"),
        (["status", "nonsense"], 2, "nonsense"),
        (["top", "nonsense"], 2, "nonsense"),
        (["worker"], 2, "Missing option '--connect'"),
        (["worker", "--connect", "ipc:///x", "--env-kwargs", "3"], 2, "--env-kwargs: expected a JSON object"),
        (["fly"], 2, "No such command"),
    ],
)
def test_wrong_words_get_a_message_and_a_code(words: list[str], code: int, text: str) -> None:
    result = run(*words)
    assert result.exit_code == code, result.output
    assert text in result.output
    assert "Traceback" not in result.output


def test_eval_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = run("eval", str(tmp_path))
    assert result.exit_code == 1
    assert "there is no checkpoint" in result.output


def test_version_and_help() -> None:
    assert run("--version").exit_code == 0
    shown = run("train", "--help").output
    assert "--envs" in shown
    assert "--stop-at-return" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zrl.train.run_folder import RunFolder

    created = RunFolder.create

    def with_full_metrics(config: object) -> RunFolder:
        folder = created(config)  # type: ignore[arg-type]
        (folder.path / "metrics.jsonl").symlink_to("/dev/full")
        return folder

    monkeypatch.setattr(RunFolder, "create", with_full_metrics)
    result = run("train", "CartPole-v1", *SMALL, "--steps", "1k", "--runs", str(tmp_path))
    assert result.exit_code == 1
    assert "is the disk full?" in result.output


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_stops_cleanly_with_a_checkpoint(tmp_path: Path, signum: signal.Signals) -> None:
    words = [*ZRL, "train", "CartPole-v1", *SMALL, "--steps", "100M", "--runs", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 40
        while not any(m.stat().st_size for m in tmp_path.glob("*/metrics.jsonl")):
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signum)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signum, output
    assert f"stopped by {signum.name}" in output
    assert "Traceback" not in output
    assert list(tmp_path.glob("*/checkpoints/step_*.pt"))


def test_too_many_failures_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first fragment a worker is replaced; when that has happened too often, the run ends with 4."""
    impatient(monkeypatch, restarts=1)
    words = ["--env-kwargs", '{"steps": 40}', "--workers", "1", *SMALL, "--runs", str(tmp_path)]
    result = run("train", "tests.fragile:Fragile-v0", *words)
    assert result.exit_code == 4, result.output
    assert "failed again after 1 restarts" in result.output
    assert result.output.rstrip().endswith("RuntimeError: broken after 40 steps")
    assert list(tmp_path.glob("*/checkpoints/step_*.pt"))


def test_ctrl_c_before_a_verb_looks_out_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zrl.cli.train.settings_of", interrupted)
    assert run("train", "CartPole-v1").exit_code == 130
