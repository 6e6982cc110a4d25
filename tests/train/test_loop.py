from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import zrl
from zrl.config import ALGORITHMS, TrainConfig
from zrl.errors import CheckpointError, ConfigError, EnvError, PreflightError
from zrl.train import checkpoint
from zrl.train.evaluation import evaluate_run
from zrl.train.loop import train
from zrl.train.setup import Adam
from zrl.train.status import Status
from zrl.train.stop import Stopped


def config(tmp_path: Path, **settings: object) -> TrainConfig:
    values: dict[str, object] = {
        "steps": 512,
        "n_envs": 4,
        "n_steps": 16,
        "seed": 3,
        "epochs": 2,
        "runs": str(tmp_path),
    }
    return TrainConfig(**{**values, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_runs_and_leaves_a_run_folder(tmp_path: Path, algo: str) -> None:
    seen: list[Status] = []
    result = train(config(tmp_path, algo=algo), on_update=seen.append)
    assert result.outcome == "steps"
    assert [s.step for s in seen] == list(range(64, 513, 64))
    assert result.plot is not None
    assert result.plot.stat().st_size > 0
    rows = result.run.metrics()
    assert [r["step"] for r in rows] == [s.step for s in seen]
    assert result.run.config().algo == algo
    path, state = checkpoint.newest(result.run.checkpoints)
    assert path == result.checkpoint
    assert (state["step"], state["update"]) == (512, 8)
    assert evaluate_run(result.run, 3, seed=0)[1] == evaluate_run(result.run, 3, seed=0)[1]


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        torch.rand(7)  # what was drawn before does not matter
        result = train(config(tmp_path))
        weights.append(checkpoint.newest(result.run.checkpoints)[1]["weights"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_stops_at_the_goal(tmp_path: Path) -> None:
    result = train(config(tmp_path, steps=20_000, stop_at_return=5.0))
    assert result.outcome == "goal"
    assert result.status is not None
    assert result.status.episodes >= 100
    assert result.status.step < 20_000


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path: Path, signum: signal.Signals) -> None:
    def interrupt(status: Status) -> None:
        if status.update == 3:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    result = train(config(tmp_path, steps=1_000_000), on_update=interrupt)
    assert result.outcome == signum.name
    assert checkpoint.newest(result.run.checkpoints)[1]["update"] == 3
    assert signal.getsignal(signum) is before


class Chance(zrl.BaseActorModule):
    """Has nothing to train."""

    def __init__(self, *spaces: Any) -> None:
        super().__init__()

    def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> Any:
        return torch.randint(2, fin.shape), (), {"value": rew, "logits": rew.new_zeros(*fin.shape, 2)}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"env": "NoSuchThing-v0"}, "NoSuchThing"),
        ({"env": "no_such_module:Thing-v0"}, "no_such_module"),
        ({"device": "cuda:77"}, "device: 'cuda:77' cannot be used"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
        ({"actor": "tests.train.test_loop:Chance"}, "actor: expected one with parameters to train, not Chance"),
    ],
)
def test_preflight(tmp_path: Path, settings: dict[str, object], text: str) -> None:
    with pytest.raises(PreflightError, match=text):
        train(config(tmp_path, **settings))
    assert list(tmp_path.iterdir()) == []


def test_a_config_names_what_is_wrong_with_it() -> None:
    with pytest.raises(ConfigError, match=r"gamma: expected 0\.0 to 1\.0, not 1\.5"):
        TrainConfig(gamma=1.5)
    with pytest.raises(ConfigError, match="steps: expected at least 1, not 0"):
        TrainConfig(steps=0)
    with pytest.raises(ConfigError, match=r"lr: expected at least 0\.0, not nan"):
        TrainConfig(lr=float("nan"))
    with pytest.raises(ConfigError, match="algo: expected one of"):
        TrainConfig(algo="dqn")
    with pytest.raises(ConfigError, match="unknown settings: colour"):
        TrainConfig.from_dict({"colour": 1})


def test_a_config_round_trips() -> None:
    config = TrainConfig(algo="a2c").resolved(seed=5)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert (config.n_envs, config.seed) == (16, 5)


def test_a_signal_stops_between_two_minibatches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step: Any = Adam.step

    def counting(self: Adam, *args: object) -> object:
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Adam, "step", counting)
    whole: list[dict[str, Any]] = []

    def look(status: Status) -> None:
        (saved,) = tmp_path.glob("*/checkpoints/step_*.pt")
        whole.append(checkpoint.load(saved))

    result = train(config(tmp_path, epochs=3, checkpoint_every=64), on_update=look)
    assert result.outcome == "SIGINT"
    assert len(steps) == 5  # the second of the three steps of the second update
    assert result.checkpoint is not None
    after = checkpoint.load(result.checkpoint)
    (before,) = whole
    assert (after["step"], after["update"]) == (64, 1)
    assert all(torch.equal(after["weights"][name], x) for name, x in before["weights"].items())
    assert torch.equal(after["random"]["torch"], before["random"]["torch"])


def test_a_signal_in_the_first_update_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step: Any = Adam.step

    def interrupted(self: Adam, *args: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Adam, "step", interrupted)
    result = train(config(tmp_path))
    assert (result.outcome, result.checkpoint) == ("SIGINT", None)


def test_a_folder_that_fills_up_leaves_a_checkpoint(tmp_path: Path) -> None:
    def fail(status: Status) -> None:
        if status.update == 3:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="is the disk full"):
        train(config(tmp_path, workers=0), on_update=fail)
    (run,) = tmp_path.iterdir()
    assert checkpoint.newest(run / "checkpoints")[1]["update"] == 3
    assert json.loads((run / "status.json").read_text())["outcome"] == "failed"


def test_evaluations_that_stop_do_not_keep_checkpoints(tmp_path: Path) -> None:
    """An environment that works in training only: the best is then that of the returns."""
    c = config(
        tmp_path, workers=0, steps=1280, eval_every=64, eval_episodes=2, keep=2, env_kwargs={"spare": os.getpid()}
    )
    result = train(dataclasses.replace(c, env="tests.fragile:Spare-v0"))
    saved = {path.name for path in result.run.checkpoints.glob("step_*.pt")}
    assert len(saved) <= 4, saved  # two, the best, and one that was being evaluated


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    first = train(config(tmp_path, workers=0, steps=64))
    with first.run.locked(), pytest.raises(PreflightError, match="another process writes this run"):
        train(config(tmp_path, workers=0, steps=128), resume=first.run)
    before = (first.run.path / "config.json").read_text()
    with pytest.raises(PreflightError, match="the run is done, with 64 of 64"):
        train(config(tmp_path, workers=0, steps=64), resume=first.run)
    assert (first.run.path / "config.json").read_text() == before


def test_a_folder_for_runs_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "nowhere").write_text("a file")
    with pytest.raises(PreflightError, match="choose another with --runs"):
        train(config(tmp_path, workers=0, steps=64, runs=str(tmp_path / "link")))


def test_an_error_in_mid_run_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv

    calls = []
    step: Any = CartPoleEnv.step

    def failing(self: CartPoleEnv, action: int) -> object:
        calls.append(1)
        if len(calls) > 200:
            raise RuntimeError("the pole broke")
        return step(self, action)

    monkeypatch.setattr(CartPoleEnv, "step", failing)
    with pytest.raises(EnvError, match="the pole broke"):
        train(config(tmp_path, workers=0))
    assert checkpoint.newest(next(tmp_path.iterdir()) / "checkpoints")[1]["step"] == 192


def test_a_signal_in_preflight_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr("zrl.train.loop.make_actor", interrupt)
    with pytest.raises(Stopped):
        train(config(tmp_path, workers=0))
    assert list(tmp_path.iterdir()) == []


def test_evaluations_beside_training_find_the_best(tmp_path: Path) -> None:
    result = train(config(tmp_path, workers=0, steps=1024, eval_every=256, eval_episodes=3, keep=1))
    rows = [row for row in result.run.metrics() if "eval_mean" in row]
    assert rows
    assert rows[-1]["eval_step"] == 1024  # the last weights are played as well
    best = max(rows, key=lambda row: row["eval_mean"])  # the first of equals
    link = result.run.checkpoints / checkpoint.BEST
    assert checkpoint.load(link)["step"] == best["eval_step"]
    assert link.resolve().exists()
    kept = {path.name for path in result.run.checkpoints.glob("step_*.pt")}
    assert kept == {link.readlink().name, "step_000000001024.pt"}
    status = json.loads((result.run.path / "status.json").read_text())
    assert status["training"]["eval"]["step"] in {row["eval_step"] for row in rows}


def test_the_best_without_evaluations_is_that_of_the_returns(tmp_path: Path) -> None:
    result = train(config(tmp_path, workers=0, steps=6400, checkpoint_every=640, keep=100))
    states = [checkpoint.load(path) for path in sorted(result.run.checkpoints.glob("step_*.pt"))]
    best = [state["step"] for state in states if state["return_best"] is not None][-1]
    found = checkpoint.load(result.run.checkpoints / checkpoint.BEST)
    assert found["return_best"] is not None
    assert found["step"] <= best


def test_arguments_of_the_environment_reach_it(tmp_path: Path) -> None:
    result = train(config(tmp_path, env_kwargs={"sutton_barto_reward": True}, steps=256))
    returns = [row["return_update"] for row in result.run.metrics() if row["return_update"] is not None]
    assert returns
    assert all(x == -1.0 for x in returns)  # 0 a step, and −1 for the fall
