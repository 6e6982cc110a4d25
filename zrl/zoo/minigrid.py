"""MiniGrid's missions as numbers, so that the whole observation can be recorded and embedded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from zrl.data.fragment import Array
from zrl.errors import ConfigError, MissingExtraError

#: What the missions of the BabyAI levels are made of; they do not say so themselves.
BABYAI_WORDS = (
    *("a", "after", "and", "ball", "behind", "blue", "box", "door", "front", "go", "green", "grey", "in", "key"),
    *("left", "next", "object", "of", "on", "open", "pick", "purple", "put", "red", "right", "the", "then", "to"),
    *("up", "yellow", "you", "your"),
)


class MissionWords(gym.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """The mission of a MiniGrid environment, a sentence, as the numbers of its words, [max_words].

    Number k is word k−1 of `words`, 0 is no word any more. Everything else in the observation stays as it is. Case and
    punctuation are ignored. The space of the mission becomes a MultiDiscrete, of uint8 where that is enough.

    Args:
        env: an environment whose observations are a dict with ``"mission"``, as MiniGrid's are.
        words: the vocabulary; by default the words of all missions that the environment says it has.
        max_words: length of the longest mission; by default that of the longest of these missions.

    Attributes:
        words: the vocabulary, a tuple.

    Raises:
        ConfigError: another environment; or it does not say which missions it has, as those of BabyAI do not, and the
            arguments do not either. Also by ``reset`` and ``step``, for a mission with other words or more of them.
    """

    def __init__(
        self, env: gym.Env[Any, Any], *, words: Sequence[str] | None = None, max_words: int | None = None
    ) -> None:
        RecordConstructorArgs.__init__(self, words=words, max_words=max_words)
        gym.ObservationWrapper.__init__(self, env)
        space = env.observation_space
        if not isinstance(space, gym.spaces.Dict) or "mission" not in space.spaces:
            raise ConfigError(f"MissionWords: expected observations with a 'mission', not {space}")
        if words is None or max_words is None:
            missions = [words_of(mission) for mission in all_missions(space["mission"])]
            words = sorted({word for mission in missions for word in mission}) if words is None else words
            max_words = max(map(len, missions)) if max_words is None else max_words
        self.words = tuple(words)
        self._numbers = {word: k for k, word in enumerate(self.words, 1)}
        self._max_words = max_words
        self._dtype = np.uint8 if len(self.words) < 255 else np.int32
        self._known: tuple[str, Array] | None = None  # the mission of the episode: it is the same at every step
        mission_space = gym.spaces.MultiDiscrete([len(self.words) + 1] * max_words, self._dtype)
        self.observation_space = gym.spaces.Dict({**space.spaces, "mission": mission_space})

    def observation(self, observation: Any) -> dict[str, Any]:
        mission = observation["mission"]
        if self._known is None or self._known[0] != mission:
            self._known = (mission, self._encode(mission))
        return {**observation, "mission": self._known[1].copy()}

    def _encode(self, mission: str) -> Array:
        words = words_of(mission)
        if unknown := [word for word in words if word not in self._numbers]:
            raise ConfigError(f"MissionWords: {unknown[0]!r} in {mission!r} is in no known mission; add it to words=")
        if len(words) > self._max_words:
            raise ConfigError(f"MissionWords: {mission!r} has {len(words)} words; give max_words={len(words)} or more")
        numbers = np.zeros(self._max_words, self._dtype)
        numbers[: len(words)] = [self._numbers[word] for word in words]
        return numbers


def words_of(mission: str) -> list[str]:
    """The words of a mission, in lower case, without punctuation."""
    return re.findall(r"\w+", mission.lower())


def all_missions(space: gym.Space[Any]) -> list[str]:
    """Every mission of a ``minigrid.core.mission.MissionSpace``, some hundreds at most.

    Raises:
        ConfigError: another space, or one that does not say which missions it has.
    """
    from minigrid.core.mission import MissionSpace

    if type(space) is not MissionSpace:  # subclasses contain more than they say
        raise ConfigError(
            f"MissionWords: {type(space).__name__} does not list its missions; give words= and max_words=, for BabyAI "
            "words=zrl.zoo.minigrid.BABYAI_WORDS"
        )
    return [space.mission_func(*words) for words in itertools.product(*(space.ordered_placeholders or []))]


def make_minigrid(
    env_id: str = "MiniGrid-Empty-5x5-v0",
    *,
    words: Sequence[str] | None = None,
    max_words: int | None = None,
    **kwargs: Any,
) -> MissionWords:
    """A MiniGrid or BabyAI environment with `MissionWords`; registered as ``zrl/MiniGrid-v0``.

    `kwargs` are arguments of the environment itself, such as ``render_mode`` or ``max_steps``.

    Raises:
        ConfigError: as `MissionWords`.
        MissingExtraError: minigrid is not installed.
    """
    try:
        import minigrid
    except ImportError as e:
        raise MissingExtraError("MiniGrid needs minigrid: pip install 'zrl[minigrid]'") from e
    gym.register_envs(minigrid)
    return MissionWords(gym.make(env_id, disable_env_checker=True, **kwargs), words=words, max_words=max_words)
