"""Frames of Atari games: those of Gymnasium's wrappers, to the bit, and nothing that changes them in between."""

from __future__ import annotations

import copy
import runpy
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, OrderEnforcing, PassiveEnvChecker, TimeLimit

from zrl import ConfigError, MissingExtraError
from zrl.rollout import same
from zrl.zoo import AtariFrames, CNNActor, make_atari

ale_py = pytest.importorskip("ale_py", reason="the extra atari is not installed")
pytest.importorskip("cv2", reason="the extra atari is not installed")
gym.register_envs(ale_py)


def game(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(env_id, frameskip=1, disable_env_checker=True, **kwargs)


def played(env: gym.Env[Any, Any], seed: int, steps: int) -> list[Any]:
    """Everything that comes of so many steps with random actions, resets included; nothing is copied."""
    assert isinstance(env.action_space, gym.spaces.Discrete)
    actions = np.random.default_rng(seed).integers(env.action_space.n, size=steps)
    results: list[Any] = [env.reset(seed=seed)]
    for action in actions:
        results.append(env.step(action))
        if results[-1][2] or results[-1][3]:
            results.append(env.reset())
    env.close()
    return results


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a[0].dtype == b[0].dtype
        assert np.array_equal(a[0], b[0]), f"observation {k}"
        assert a[1:] == b[1:], f"result {k}"  # reward, flags and info
        assert list(map(type, a)) == list(map(type, b))


@pytest.mark.parametrize(
    ("env_id", "life_loss", "kwargs", "seed"),
    [
        ("ALE/Pong-v5", False, {"max_num_frames_per_episode": 700}, 0),
        ("ALE/Breakout-v5", False, {"repeat_action_probability": 0.0}, 1),
        ("ALE/Breakout-v5", True, {"max_num_frames_per_episode": 150}, 2),
        ("ALE/MsPacman-v5", False, {"full_action_space": True, "max_num_frames_per_episode": 701}, 3),
    ],
)
def test_the_frames_are_gymnasiums(env_id: str, life_loss: bool, kwargs: dict[str, Any], seed: int) -> None:
    """Over 520 steps and several ends; nothing that was handed out changed later."""
    ours = AtariFrames(game(env_id, **kwargs), terminal_on_life_loss=life_loss)
    theirs = FrameStackObservation(AtariPreprocessing(game(env_id, **kwargs), terminal_on_life_loss=life_loss), 4)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    mine = played(ours, seed, 520)
    assert_same(mine, played(theirs, seed, 520))
    steps = [result for result in mine if len(result) == 5]
    assert sum(term or trunc for *_, term, trunc, _ in steps) >= 2
    assert any(trunc for *_, trunc, _ in steps) == ("max_num_frames_per_episode" in kwargs)
    assert any(term and info["lives"] for *_, term, _, info in steps) == life_loss


@pytest.mark.parametrize(
    ("kwargs", "stack_size", "limit", "steps"),
    [
        ({"noop_max": 30}, 4, 20, 10),  # cut within the frames without an action
        ({"noop_max": 0, "frame_skip": 1}, 1, 30, 60),
        ({"noop_max": 5, "frame_skip": 2, "screen_size": 42}, 3, 41, 60),
    ],
)
def test_other_numbers(kwargs: dict[str, Any], stack_size: int, limit: int, steps: int) -> None:
    """Limits that are no multiple of the frames skipped: the last screens are not read then."""
    ours = AtariFrames(game("ALE/Pong-v5", max_num_frames_per_episode=limit), **kwargs, stack_size=stack_size)
    theirs = AtariPreprocessing(game("ALE/Pong-v5", max_num_frames_per_episode=limit), **kwargs)
    assert_same(played(ours, 3, steps), played(FrameStackObservation(theirs, stack_size), 3, steps))


def test_what_gymnasium_wraps_around_a_game_is_passed_by() -> None:
    env = gym.make("ALE/Pong-v5", frameskip=1)
    assert isinstance(env, OrderEnforcing)
    assert isinstance(env.env, PassiveEnvChecker)
    AtariFrames(env).reset()
    env.close()


@pytest.mark.parametrize(
    ("wrapped", "kwargs", "named"),
    [
        (lambda: TimeLimit(game("ALE/Pong-v5"), 10), {}, "TimeLimit; put that around AtariFrames"),
        (lambda: gym.make("ALE/Pong-v5"), {}, "frameskip=1, not 4"),
        (lambda: game("ALE/Pong-v5", continuous=True), {}, "continuous=False"),
        (lambda: gym.make("CartPole-v1").unwrapped, {}, "not CartPoleEnv"),
        (lambda: gym.make("CartPole-v1").unwrapped, {"frame_skip": 0}, "frame_skip: expected at least 1, not 0"),
        (lambda: gym.make("CartPole-v1").unwrapped, {"noop_max": -1}, "noop_max: expected at least 0, not -1"),
    ],
)
def test_what_cannot_be_passed_by_is_refused(wrapped: Any, kwargs: dict[str, Any], named: str) -> None:
    env = wrapped()
    with pytest.raises(ConfigError, match=named):
        AtariFrames(env, **kwargs)
    env.close()


def test_by_name_and_again() -> None:
    """By its registered name, from its specification, and as a copy of itself; and as a picture."""
    env = gym.make("zrl/Atari-v0", env_id="ALE/Breakout-v5", stack_size=2, render_mode="rgb_array")
    assert env.spec is not None
    first, *others = [played(e, 1, 10) for e in (env, gym.make(env.spec), copy.deepcopy(env))]
    assert first[0][0].shape == (2, 84, 84)
    for other in others:
        assert_same(first, other)
    picture: Any = env.render()
    assert picture.shape == (210, 160, 3)


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module loads without them; what needs them says how to install them."""
    for name in ("ale_py", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    module = runpy.run_path(str(sys.modules["zrl.zoo.atari"].__file__))
    with pytest.raises(MissingExtraError, match=r"pip install 'zrl\[atari\]'"):
        module["make_atari"]()


def test_frames_are_recorded_as_bytes() -> None:
    torch.manual_seed(0)
    env = make_atari(max_num_frames_per_episode=60)
    actor = CNNActor(env.observation_space, env.action_space, hidden=16)
    with same.rollout([env], actor, 20, entropy=0, debug=True, keep_final_obs=True, info_keys={"lives": int}) as it:
        batch = next(it)
    obs = batch.state.obs
    assert obs.dtype == torch.uint8
    assert obs.shape == (21, 1, 4, 84, 84)
    began = batch.state.fin[:, 0]
    assert 2 <= int(began.sum()) < 10
    assert torch.equal(obs[1:, 0, :3][~began[1:]], obs[:-1, 0, 1:][~began[1:]])  # one frame a step moves on
    assert all(episode.truncated for episode in batch.episodes)
