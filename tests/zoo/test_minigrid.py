"""Missions of MiniGrid as the numbers of their words."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from zrl import ConfigError, MissingExtraError
from zrl.rollout import same
from zrl.zoo import MissionWords, default_actor, make_minigrid
from zrl.zoo.minigrid import BABYAI_WORDS, words_of

minigrid = pytest.importorskip("minigrid", reason="the extra minigrid is not installed")


def sentence(env: MissionWords, mission: Any) -> list[str]:
    """The words behind the numbers."""
    return [env.words[k - 1] for k in mission if k]


def test_missions_are_sentences_again() -> None:
    env = make_minigrid("MiniGrid-Fetch-5x5-N2-v0")
    assert set(env.words) >= {"get", "fetch", "red", "key", "ball"}
    seen = set()
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        mission = env.unwrapped.mission  # type: ignore[attr-defined]
        assert sentence(env, obs["mission"]) == mission.split()
        assert obs["mission"].dtype == np.uint8
        assert env.observation_space.contains(obs)
        assert env.step(2)[0]["mission"].tolist() == obs["mission"].tolist()
        seen.add(mission)
    assert len(seen) > 5
    env.close()


def test_numbers_by_hand() -> None:
    env = MissionWords(Told(), words=["go", "left", "now"], max_words=4)
    assert env.observation_space["mission"] == gym.spaces.MultiDiscrete([4] * 4, np.uint8)  # type: ignore[index]
    for mission, numbers in (("Go left, now!", [1, 2, 3, 0]), ("", [0, 0, 0, 0]), ("left left", [2, 2, 0, 0])):
        obs, _ = env.reset(options={"mission": mission})
        assert (obs["mission"].tolist(), obs["other"]) == (numbers, 7)
    obs["mission"][:] = 9  # what is handed out is not what the next ones are made of
    assert env.step(0)[0]["mission"].tolist() == [2, 2, 0, 0]
    assert MissionWords(Told(), words=[f"w{k}" for k in range(255)], max_words=2).observation_space[
        "mission"
    ].dtype == (  # type: ignore[index]
        np.int32
    )


class Told(gym.Env[Any, Any]):
    """Its mission is what ``reset`` is told."""

    observation_space = gym.spaces.Dict(mission=gym.spaces.Text(99), other=gym.spaces.Discrete(9))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.mission = options["mission"]
        return {"mission": self.mission, "other": 7}, {}

    def step(self, action: Any) -> Any:
        return {"mission": self.mission, "other": 7}, 0.0, False, False, {}


@pytest.mark.parametrize(
    ("mission", "named"), [("go right", "'right' in 'go right'"), ("go go go", "has 3 words; give max_words=3")]
)
def test_unknown_missions_are_refused(mission: str, named: str) -> None:
    env = MissionWords(Told(), words=["go", "left"], max_words=2)
    with pytest.raises(ConfigError, match=named):
        env.reset(options={"mission": mission})


def test_environments_that_do_not_list_their_missions() -> None:
    with pytest.raises(ConfigError, match="BABYAI_WORDS"):
        make_minigrid("BabyAI-GoToLocal-v0")
    with pytest.raises(ConfigError, match="expected observations with a 'mission'"):
        MissionWords(gym.make("CartPole-v1"))
    env = make_minigrid("BabyAI-GoToLocal-v0", words=BABYAI_WORDS, max_words=40)
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        assert sentence(env, obs["mission"]) == words_of(env.unwrapped.mission)  # type: ignore[attr-defined]
    env.close()


def test_the_whole_observation_is_recorded() -> None:
    """By its registered name, with the actor that ``zrl train`` takes."""

    def make() -> gym.Env[Any, Any]:
        return gym.make("zrl/MiniGrid-v0", env_id="MiniGrid-Fetch-5x5-N2-v0", max_steps=5)

    env = make()
    torch.manual_seed(0)
    actor = default_actor(env.observation_space, env.action_space)
    env.close()
    with same.rollout(make, actor, 12, 2, entropy=0, debug=True) as it:
        obs = next(it).state.obs
    assert {key: tuple(x.shape) for key, x in obs.items()} == {
        "image": (13, 2, 7, 7, 3),
        "direction": (13, 2),
        "mission": (13, 2, 6),
    }
    assert obs["image"].dtype == obs["mission"].dtype == torch.uint8
    assert (obs["mission"] != 0).sum(-1).min() >= 4


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'zrl\[minigrid\]'"):
        make_minigrid()
