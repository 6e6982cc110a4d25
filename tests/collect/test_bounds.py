"""Under debug every observation is looked for in its space, and the leaf that is outside has a name."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.toys import N_ACTIONS, CountingEnv, Pair, RandomActor, SpaceEnv, SpoiltEnv, StepResult
from zrl import ActorError, EnvError
from zrl.rollout import same

BOX = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32))
TWO = gym.spaces.Discrete(2)


def error(late: Late, **options: Any) -> EnvError:
    """That of the second column, in the first batch."""
    envs = [SpaceEnv(BOX, TWO), late]
    with pytest.raises(EnvError) as caught, same.rollout(envs, RandomActor(2), 6, debug=True, **options) as it:
        next(it)
    assert caught.value.env_index == 1
    assert "outside of its space" in str(caught.value)
    return caught.value


class Late(SpaceEnv):
    """Its observations are `x` from number `at` on; number 0 is that of the first reset."""

    def __init__(self, at: int, x: Any) -> None:
        super().__init__(BOX, TWO, shown=lambda sample: x if len(self.given) >= at else sample)


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_in_resets_steps_and_final_observations(at: int) -> None:
    """An episode has 3 steps: number 3 is a final observation, and number 4 the first of the next episode."""
    e = error(Late(at, np.array([0.5, -2], np.float32)))
    assert e.phase == ("reset" if at in (0, 4) else "step")
    assert e.leaf == "state.obs"
    assert e.expected == str(BOX)
    assert e.found == "-2.0 at [1], where 0.0 to inf is allowed"


def test_in_sticky_fragments_too() -> None:
    assert error(Late(2, np.array([1.5, 0], np.float32)), sticky=True).phase == "step"


@pytest.mark.parametrize(
    ("space", "wrong", "leaf", "found"),
    [
        (gym.spaces.Discrete(3, start=-1), lambda x: np.int64(2), "", "2, where -1 to 1 is allowed"),
        (gym.spaces.Discrete(3), lambda x: 3, "", "3, where 0 to 2 is allowed"),
        (gym.spaces.MultiDiscrete([2, 3]), lambda x: np.array([1, 3]), "", "3 at [1], where 0 to 2 is allowed"),
        (
            gym.spaces.MultiBinary((1, 2)),
            lambda x: np.array([[1, 2]], np.int8),
            "",
            "2 at [0, 1], where 0 to 1 is allowed",
        ),
        (gym.spaces.Box(0, 1, (), np.float32), lambda x: 1.5, "", "1.5, where 0.0 to 1.0 is allowed"),
        (
            gym.spaces.Box(0, 7, (1,), np.uint8),
            lambda x: np.array([8], np.uint8),
            "",
            "8 at [0], where 0 to 7 is allowed",
        ),
        (gym.spaces.Dict(a=BOX, b=TWO), lambda x: {**x, "b": 5}, "['b']", "5, where 0 to 1 is allowed"),
        (gym.spaces.Tuple([BOX, TWO]), lambda x: (x[0], 7), "[1]", "7, where 0 to 1 is allowed"),
        (
            gym.spaces.Dict(p=gym.spaces.Tuple([TWO, TWO])),
            lambda x: {"p": Pair(1, 2)},
            "['p'].there",
            "2, where 0 to 1 is allowed",
        ),
    ],
    ids=lambda x: None if callable(x) else str(x)[:30],
)
def test_by_leaf(space: Any, wrong: Any, leaf: str, found: str) -> None:
    def right(x: Any) -> Any:
        return {"p": Pair(*x["p"])} if "there" in leaf else x

    def two() -> list[SpaceEnv]:
        env = SpaceEnv(space, TWO, shown=right)
        late = SpaceEnv(space, TWO, shown=lambda x: wrong(right(x)) if len(late.given) >= 2 else right(x))
        return [env, late]

    with pytest.raises(EnvError) as caught, same.rollout(two(), RandomActor(2), 6, debug=True) as it:
        next(it)
    assert (caught.value.env_index, caught.value.phase) == (1, "step")
    assert caught.value.leaf == "state.obs" + leaf
    assert caught.value.found == found
    with same.rollout(two(), RandomActor(2), 6) as it:
        next(it)  # nobody looks without debug


def test_bounds_belong_to_the_space_and_lists_and_numbers_may_stand_for_arrays() -> None:
    space = gym.spaces.Dict(box=BOX, pair=gym.spaces.MultiDiscrete([2, 3]), bits=gym.spaces.MultiBinary(2), n=TWO)
    edge = {"box": [1.0, 0.0], "pair": [1, 2], "bits": [0, 1], "n": 1}
    with same.rollout([SpaceEnv(space, TWO, shown=lambda x: edge)], RandomActor(2), 8, debug=True) as it:
        next(it)


def test_what_does_not_fit_the_record_is_said_first() -> None:
    """A wrong shape is no matter of bounds."""

    def spoil(result: StepResult) -> Any:
        return (np.full(2, -5, np.float32), *result[1:])

    with (
        pytest.raises(EnvError, match="does not fit its record"),
        same.rollout([CountingEnv(), SpoiltEnv(3, spoil)], RandomActor(), 6, debug=True) as it,
    ):
        next(it)


class Astray(RandomActor):
    """Its call number `at`, from 1, does what the space does not have, in column 1."""

    def __init__(self, at: int, wrong: int) -> None:
        super().__init__()
        self.at, self.wrong, self.n_calls = at, wrong, 0

    def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> Any:
        actions, hx, info = super().forward(obs, act, rew, fin, hx=hx)
        self.n_calls += 1
        if self.n_calls == self.at:
            actions[0, 1] = self.wrong
        return actions, hx, info


@pytest.mark.parametrize("wrong", [-1, N_ACTIONS])
def test_an_action_that_the_environment_took_though_its_space_has_it_not(wrong: int) -> None:
    actor = Astray(3 + 4 + 1 + 2, wrong)  # calls of the probe, a fragment, its bootstrap; then the second step
    with same.rollout(lambda: CountingEnv(), actor, 4, 2) as it:
        next(it)
        with pytest.raises(ActorError) as caught:
            next(it)
    assert caught.value.leaf == "state.act"
    assert "the action of step 6, column 1, is outside of its space" in str(caught.value)
    assert (caught.value.expected, caught.value.found) == (f"0 to {N_ACTIONS - 1}", str(wrong))
