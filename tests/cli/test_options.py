"""Where settings come from, and which of them counts: flags, ZRL_*, a TOML file, the run that is resumed, defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from zrl.cli.options import settings_of
from zrl.config import TrainConfig
from zrl.errors import ConfigError
from zrl.train.run_folder import RunFolder


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text('env = "CartPole-v1"\nsteps = 3\nn_steps = 3\nepochs = 3\nlam = 0.3\n')
    return file


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = TrainConfig(runs=str(tmp_path), steps=4, n_steps=4, epochs=4, lam=0.4, gamma=0.4).resolved(seed=9)
    return RunFolder.create(config)


def test_precedence(toml: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRL_STEPS", "2")
    monkeypatch.setenv("ZRL_N_STEPS", "2")
    monkeypatch.setenv("ZRL_EPOCHS", "2")
    config = settings_of({"steps": 1, "lr": None}, ("n-steps=1",), toml, run)
    assert (config.steps, config.n_steps, config.epochs, config.lam, config.gamma) == (1, 1, 2, 0.3, 0.4)
    assert config.clip == TrainConfig().clip


def test_a_file_in_the_place_of_the_environment(toml: Path) -> None:
    assert settings_of({"env": str(toml)}, (), None, None) == settings_of({}, (), toml, None)
    with pytest.raises(ConfigError, match=r"run\.toml is a config already"):
        settings_of({"env": str(toml)}, (), toml, None)


def test_sources_are_named(toml: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text("steps = false\n")
    with pytest.raises(ConfigError, match=r"run\.toml: steps: expected a whole number .*not False"):
        settings_of({}, (), toml, None)
    (run.path / "config.json").write_text('{"colour": "red"}')
    with pytest.raises(ConfigError, match=r"config\.json.* unknown settings: colour"):
        settings_of({}, (), None, run)
    with pytest.raises(ConfigError, match=r"--set stepz: no such setting; did you mean steps\?"):
        settings_of({"env": "x"}, ("stepz=1",), None, None)
    monkeypatch.setenv("ZRL_STEPS", "few")
    with pytest.raises(ConfigError, match="ZRL_STEPS: expected a whole number"):
        settings_of({"env": "x"}, (), None, None)


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (("steps",), "--set: expected KEY=VALUE, not 'steps'"),
        (("lr=1", "lr=2"), "--set lr: given twice"),
        (("envs=1",), "--set envs: given twice"),
        (("n-envs=1",), "--set n-envs: given twice"),
        (("n_envs=1",), "--set n_envs: given twice"),
        (("env_kwargs=5",), "--set env_kwargs: expected a JSON object"),
    ],
)
def test_pairs_that_will_not_do(sets: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        settings_of({"env": "CartPole-v1", "n_envs": 4}, sets, None, None)


def test_an_environment_is_needed() -> None:
    with pytest.raises(ConfigError, match="ENV: expected a Gymnasium id"):
        settings_of({}, (), None, None)


@pytest.mark.parametrize(("name", "value"), [("seed", 8), ("algo", "a2c"), ("env", "Acrobot-v1")])
def test_a_resumed_run_stays_what_it_is(run: RunFolder, name: str, value: object) -> None:
    assert settings_of({"env": "CartPole-v1", "seed": 9}, (), None, run).seed == 9
    with pytest.raises(ConfigError, match=f"{name}: a resumed run keeps its own"):
        settings_of({name: value}, (), None, run)


def test_misspelt_variables_are_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ZRL_STEPZ", "1")
    settings_of({"env": "CartPole-v1"}, (), None, None)
    assert "did you mean ZRL_STEPS?" in capsys.readouterr().err


def test_another_number_of_workers_brings_its_own_batch(tmp_path: Path) -> None:
    run = RunFolder.create(TrainConfig(runs=str(tmp_path), workers=0).resolved(seed=1))
    assert settings_of({"workers": 4}, (), None, run).resolved(seed=1).batch == 4
    other = RunFolder.create(TrainConfig(runs=str(tmp_path), workers=2, batch=4).resolved(seed=1))
    assert settings_of({"workers": 4}, (), None, other).resolved(seed=1).batch == 4
    assert settings_of({"workers": 1}, (), None, other).resolved(seed=1).batch == 4
