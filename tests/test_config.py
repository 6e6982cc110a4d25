"""Settings: what a value of each kind may be, and which source wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zrl.config import TrainConfig, from_environment, from_toml, layered, misspelt, value_of
from zrl.errors import ConfigError


def plain(name: str) -> str:
    return name


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("steps", "500k", 500_000),
        ("steps", "1.5M", 1_500_000),
        ("seed", "9007199254740993", 9007199254740993),
        ("steps", 7, 7),
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("env", "CartPole-v1", "CartPole-v1"),
        ("tensorboard", "yes", True),
        ("tensorboard", "False", False),
        ("tensorboard", True, True),
        ("env_kwargs", '{"size": [3, 4]}', {"size": [3, 4]}),
        ("env_kwargs", {"size": 3}, {"size": 3}),
    ],
)
def test_values(field: str, given: object, value: object) -> None:
    found = value_of(field, given, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("steps", "many", "a whole number such as 500000, 500k or 1.5M"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", "inf", "a whole number"),
        ("lr", "fast", "a finite number"),
        ("lr", "nan", "a finite number"),
        ("lr", "inf", "a finite number"),
        ("lr", [1], "a finite number"),
        ("env", 3, "a text"),
        ("tensorboard", "maybe", "true or false"),
        ("tensorboard", 2, "true or false"),
        ("env_kwargs", "{size: 3}", "a JSON object"),
        ("env_kwargs", "[1]", "a JSON object"),
    ],
)
def test_values_that_will_not_do(field: str, given: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: expected {expected}.*not {given!r}".replace("[", r"\[")):
        value_of(field, given, "here")


def test_the_first_source_that_names_a_setting_wins() -> None:
    layers: list[dict[str, Any]] = [
        {"steps": None, "n_envs": 4},
        {"envs": "8", "steps": "2k"},
        {"steps": 3, "max-lag": 1},
    ]
    assert layered([(plain, x) for x in layers]) == {"n_envs": 4, "steps": 2000, "max_lag": 1}


def test_all_sources_are_checked_also_those_that_lose() -> None:
    with pytest.raises(ConfigError, match="steps: expected a whole number"):
        layered([(plain, {"steps": 1}), (plain, {"steps": "x"})])
    with pytest.raises(ConfigError, match=r"in it: stepz: no such setting; did you mean steps\?"):
        layered([(lambda name: f"in it: {name}", {"stepz": 1})])


def test_the_environment() -> None:
    variables = {"ZRL_ENVS": "4", "ZRL_MAX_LAG": "1", "ZRL_SECRET_OF_OTHERS": "x", "HOME": "/", "ZRL_STEPZ": "3"}
    assert from_environment(variables) == {"envs": "4", "max_lag": "1"}
    assert misspelt(variables) == ["ZRL_STEPZ: no such setting; did you mean ZRL_STEPS?"]


def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('env = "CartPole-v1"\nn-steps = 32\nsteps = "1M"\n[env_kwargs]\nsize = 3\n')
    settings = layered([(plain, from_toml(file))])
    assert settings == {"env": "CartPole-v1", "n_steps": 32, "steps": 1_000_000, "env_kwargs": {"size": 3}}
    file.write_text("env = \n")
    with pytest.raises(ConfigError, match=r"run\.toml' is no TOML: .*line 1"):
        from_toml(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        from_toml(tmp_path / "other.toml")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"workers": 3, "n_envs": 16}, "envs: expected a multiple of the 3 workers, not 16"),
        ({"workers": 0, "batch": 2}, "batch: without workers a batch is one fragment, not 2"),
        ({"workers": 2, "batch": 3}, "batch: with max_lag=0 .* a multiple of the 2 workers, not 3"),
    ],
)
def test_what_cannot_be_shared_out(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TrainConfig(**settings).resolved(seed=1)


def test_a_batch_has_a_fragment_of_each_worker_unless_told_otherwise() -> None:
    assert TrainConfig(workers=4).resolved(seed=1).batch == 4
    assert TrainConfig(workers=0).resolved(seed=1).batch == 1
    assert TrainConfig(workers=2, batch=3, max_lag=-1).resolved(seed=1).batch == 3


def test_evaluations_need_episodes() -> None:
    with pytest.raises(ConfigError, match="eval_every: needs eval_episodes"):
        TrainConfig(eval_every=10, eval_episodes=0)


def test_a_config_survives_json() -> None:
    config = TrainConfig(env_kwargs={"size": [1, 2]}, tensorboard=True)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
