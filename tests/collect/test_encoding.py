"""Text and OneOf, observed and done: codes and alternatives by hand, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import LambdaActor, SpaceEnv
from zrl import ActorError, BaseActorModule, EnvError, evaluate
from zrl.collect.evaluate import Stage, play
from zrl.rollout import same

s = gym.spaces
BOX = s.Box(-9, 9, (2,), np.float32)
WORD = s.Text(4, charset="abc")
EITHER = s.OneOf([BOX, s.Dict(n=s.Discrete(3, start=5), w=WORD)])


def showing(space: gym.Space[Any], *values: Any, act: Any = s.Discrete(2)) -> SpaceEnv:  # noqa: B008 - never changed
    """Shows these values in turn, the last one for good; the first of them is looked at, the next is the first row."""
    shown = iter(values)
    return SpaceEnv(space, act, limit=99, shown=lambda _: next(shown, values[-1]))


def doing(act: Any) -> Callable[[Tensor], Any]:
    """An action of every row and column, from plain Python."""

    def made(fin: Tensor) -> Any:
        def every(x: Any) -> Tensor:
            a = torch.tensor(x, dtype=torch.float32 if np.asarray(x).dtype.kind == "f" else torch.int64)
            return a.expand(*fin.shape, *a.shape).clone()

        def tree(x: Any) -> Any:
            if isinstance(x, dict):
                return {key: tree(y) for key, y in x.items()}
            return tuple(map(tree, x)) if isinstance(x, tuple) else every(x)

        return tree(act)

    return made


def still(act: Any = 0, then: Any = None) -> BaseActorModule:
    """Does `act`; `then`, if anything, in column 1 from the second row on."""

    def forward(obs: Any, last: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
        a = doing(act)(fin)
        if then is not None and not fin.any():
            a = map_columns(a, doing(then)(fin))
        return a, (), {"value": rew.clone()}

    return LambdaActor(forward)


def map_columns(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {key: map_columns(a[key], b[key]) for key in a}
    if isinstance(a, tuple):
        return tuple(map(map_columns, a, b))
    return torch.cat([a[:, :1], b[:, 1:]], 1)


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_a_text_is_its_codes_and_padding() -> None:
    with same.rollout([showing(WORD, "a", "a", "cab", "bbbb", "c")], still(), 4) as it:
        obs = next(it).state.obs
    assert obs.dtype == torch.int32
    assert obs[:, 0].tolist() == [[0, 3, 3, 3], [2, 0, 1, 3], [1, 1, 1, 1], [2, 3, 3, 3], [2, 3, 3, 3]]


def test_of_a_one_of_the_others_hold_fillers() -> None:
    shown = [(0, np.array([1, 2], np.float32))] * 2 + [(1, {"n": 7, "w": "ba"}), (np.int64(0), [3.0, 4.0])]
    with same.rollout([showing(EITHER, *shown)], still(), 2) as it:
        index, (box, rest) = next(it).state.obs
    assert (index.dtype, box.dtype, rest["n"].dtype, rest["w"].dtype) == (
        torch.int64,
        torch.float32,
        torch.int64,
        torch.int32,
    )
    assert index[:, 0].tolist() == [0, 1, 0]
    assert box[:, 0].tolist() == [[1, 2], [0, 0], [3, 4]]
    assert rest["n"][:, 0].tolist() == [5, 7, 5]
    assert rest["w"][:, 0].tolist() == [[3, 3, 3, 3], [1, 0, 3, 3], [3, 3, 3, 3]]


def test_actions_are_read_back() -> None:
    space = s.Dict(say=WORD, pick=EITHER)
    env = SpaceEnv(BOX, space)
    chosen = (1, ([50.0, 0.0], {"n": 6, "w": [2, 2, 3, 3]}))
    with same.rollout([env], still({"say": [0, 1, 2, 3], "pick": chosen}), 2, debug=True) as it:
        act = next(it).state.act
    assert env.actions == [{"say": "abc", "pick": (1, {"n": 6, "w": "cc"})}] * 2
    # before the first step there was no action; later ones stand as the actor gave them, what was not chosen too
    assert act["say"][:, 0].tolist() == [[3, 3, 3, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    index, (box, rest) = act["pick"]
    assert index[:, 0].tolist() == [0, 1, 1]
    assert box[:, 0].tolist() == [[0, 0], [50, 0], [50, 0]]
    assert rest["n"][:, 0].tolist() == [5, 6, 6]
    env = SpaceEnv(BOX, EITHER)
    with same.rollout([env], still((0, ([50.0, 0.0], {"n": 77, "w": [9, 9, 9, 9]}))), 1, debug=True) as it:
        next(it)
    assert env.actions[0][0] == 0
    assert env.actions[0][1].tolist() == [9, 0]  # clipped; nobody looks at what was not chosen


def test_evaluation() -> None:
    class Words(SpaceEnv):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, float(len(action)), *rest

    envs = [Words(WORD, WORD, limit=n) for n in (1, 3)]
    assert [r.tolist() for r in evaluate(envs, still([0, 0, 3, 3]))] == [[2, 2], [0, 2], [0, 2]]
    stage = Stage(envs, still([0, 0, 3, 3]), torch.device("cpu"))
    stage.begin()
    assert play(stage, [0, 2], 99).returns == [6, 6]  # column 0 never acts: its padding is read by nobody


def test_the_density_of_a_text_is_that_of_its_characters() -> None:
    actor = still()
    logits = torch.randn(2, 3, 4, 4)
    act = torch.randint(4, (2, 3, 4))
    log_pi = torch.log_softmax(logits, -1)
    expected = sum(log_pi[..., i, :].gather(-1, act[..., i : i + 1])[..., 0] for i in range(4))
    torch.testing.assert_close(actor.log_prob({"logits": logits}, act), expected)
    even = {"logits": torch.zeros(2, 3, 4, 4)}
    torch.testing.assert_close(actor.entropy(even), torch.full((2, 3), 4 * math.log(4)))
    pick = (torch.zeros(2, 3, 2), (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 5)))
    done = (act[..., 0] % 2, (act, act[..., 0]))
    expected = torch.full((2, 3), -math.log(2) - 4 * math.log(4) - math.log(5))
    torch.testing.assert_close(actor.log_prob({"logits": pick}, done), expected)


# -- observations that are refused -----------------------------------------------------------------------------------

WORDS = "a text of 1 to 4 characters of 'abc'"
GOOD: dict[str, tuple[Any, Any]] = {"WORD": (WORD, "ab"), "EITHER": (EITHER, (1, {"n": 5, "w": "a"}))}
BAD: list[tuple[str, Any, str, str, str]] = [
    ("WORD", "", "", WORDS, "0 characters, ''"),
    ("WORD", "aaaab", "", WORDS, "5 characters, 'aaaab'"),
    ("WORD", "abd", "", WORDS, "the character 'd'"),
    ("WORD", np.array([0, 1], np.int32), "", WORDS, "ndarray"),
    ("WORD", b"ab", "", WORDS, "bytes"),
    ("EITHER", "ab", "", "(index, value of that alternative)", "str"),
    ("EITHER", (1,), "", "(index, value of that alternative)", "(*,)"),
    ("EITHER", (2, "a"), "[0]", "an index from 0 to 1", "2"),
    ("EITHER", (-1, "a"), "[0]", "an index from 0 to 1", "-1"),
    ("EITHER", (0.0, "a"), "[0]", "an index from 0 to 1", "0.0"),
    ("EITHER", (0, np.array([1], np.float32)), "[1][0]", "float32[2]", "[1]"),
    ("EITHER", (0, np.array([1, 2], np.int64)), "[1][0]", "float32[2]", "int64[2]"),
    ("EITHER", (1, {"n": 5}), "[1][1]", "a dict with keys ['n', 'w']", "{'n': *}"),
    ("EITHER", (1, {"n": 5, "w": "x"}), "[1][1]['w']", WORDS, "the character 'x'"),
    ("EITHER", (1, {"n": 5.0, "w": "a"}), "[1][1]['n']", "int64[]", "float64[]"),
]


@pytest.mark.parametrize(("name", "bad", "leaf", "expected", "found"), BAD)
def test_an_observation_outside_of_its_space(name: str, bad: Any, leaf: str, expected: str, found: str) -> None:
    """The first of all, and one in mid-run; alone and nested."""
    space, good = GOOD[name]
    for where, put in (("", lambda x: x), ("['x'][0]", lambda x: {"x": [x]})):
        outer = s.Dict(x=s.Tuple([space])) if where else space
        with pytest.raises(EnvError) as e:
            same.rollout([showing(outer, put(bad))], still(), 2)
        assert (e.value.env_index, e.value.phase, e.value.leaf) == (-1, "reset", f"state.obs{where}{leaf}")
        assert (expected, found in e.value.found) == (e.value.expected, True)
        for sticky in (False, True):
            envs = [showing(outer, put(good)), showing(outer, put(good), put(good), put(bad))]
            with same.rollout(envs, still(), 4, sticky=sticky) as it, pytest.raises(EnvError) as e:
                next(it)
            assert (e.value.env_index, e.value.leaf) == (1, f"state.obs{where}{leaf}")
            assert (e.value.phase, "\n" in str(e.value)) == ("step", False)
            assert (expected, found in e.value.found) == (e.value.expected, True)


def test_another_nesting() -> None:
    space = s.Dict(x=s.Tuple([EITHER]))
    good = {"x": (GOOD["EITHER"][1],)}
    with (
        same.rollout([showing(space, good, good, {"x": [good["x"][0]]})], still(), 4) as it,
        pytest.raises(EnvError) as e,
    ):
        next(it)
    assert (e.value.leaf, e.value.expected) == ("state.obs", "{'x': (*,)}")


# -- actions that are refused ----------------------------------------------------------------------------------------

SAY, PICK = [0, 1, 3, 3], (1, ([0.0, 0.0], {"n": 5, "w": [0, 3, 3, 3]}))
BAD_ACTS: list[tuple[Any, Any, Any, str, str, str]] = [
    (WORD, SAY, [0, 1, 4, 3], "", "codes from 0 to 2, then padding, 3", "[0, 1, 4, 3]"),
    (WORD, SAY, [-1, 1, 3, 3], "", "codes from 0 to 2, then padding, 3", "[-1, 1, 3, 3]"),
    (WORD, SAY, [1 << 32, 1, 3, 3], "", "codes from 0 to 2, then padding, 3", "[4294967296, 1, 3, 3]"),
    (WORD, SAY, [0, 3, 1, 3], "", "nothing but padding, 3, behind the first 3", "[0, 3, 1, 3]"),
    (WORD, SAY, [3, 3, 3, 3], "", WORDS, "0 characters, ''"),
    (EITHER, PICK, (2, PICK[1]), "[0]", "an index from 0 to 1", "2"),
    (EITHER, PICK, (-1, PICK[1]), "[0]", "an index from 0 to 1", "-1"),
    (EITHER, PICK, (1, ([0.0, 0.0], {"n": 5, "w": [0, 9, 3, 3]})), "[1][1]['w']", "codes from 0", "[0, 9, 3, 3]"),
]


@pytest.mark.parametrize(("space", "good", "bad", "leaf", "expected", "found"), BAD_ACTS)
def test_an_action_outside_of_its_space(space: Any, good: Any, bad: Any, leaf: str, expected: str, found: str) -> None:
    """At the first look, and in mid-run, without debug."""
    with pytest.raises(ActorError) as e:
        same.rollout([SpaceEnv(BOX, space)], still(bad), 2)
    assert (e.value.leaf, e.value.found) == (f"state.act{leaf}", found)
    for sticky in (False, True):
        envs = [SpaceEnv(BOX, space, limit=9) for _ in range(2)]
        with same.rollout(envs, still(good, bad), 4, sticky=sticky) as it, pytest.raises(ActorError) as e:
            next(it)
        assert (e.value.leaf, e.value.found) == (f"state.act{leaf}", found)
        assert e.value.expected.startswith(expected)
        assert "the action of column 1 is outside of its space" in str(e.value)


def test_what_only_debug_looks_at() -> None:
    bad = (1, ([0.0, 0.0], {"n": 8, "w": [0, 3, 3, 3]}))
    envs = [SpaceEnv(BOX, EITHER, limit=9) for _ in range(2)]
    with same.rollout(envs, still(PICK, bad), 4, debug=True) as it, pytest.raises(ActorError) as e:
        next(it)
    assert (e.value.leaf, e.value.expected, e.value.found) == ("state.act[1][1]['n']", "Discrete(3, start=5)", "8")
    nan = (0, ([math.nan, 0.0], PICK[1][1]))
    with pytest.raises(ActorError) as e:
        same.rollout(envs, still(nan), 2)
    assert (e.value.leaf, "nan" in e.value.found) == ("state.act[1][0]", True)


@pytest.mark.parametrize("act", [1, (1, ([0.0, 0.0],)), (1, {"n": 5, "w": SAY}), (1, ([0.0], {"n": 5, "w": SAY}))])
def test_actions_must_have_all_alternatives(act: Any) -> None:
    with pytest.raises(ActorError) as e:
        same.rollout([SpaceEnv(BOX, EITHER)], still(act), 2)
    assert e.value.leaf in ("state.act", "state.act[1][0]")


def test_a_space_without_a_fixed_shape_in_an_alternative() -> None:
    space = s.OneOf([BOX, s.Tuple([s.Sequence(BOX)])])
    for obs, act, leaf in ((space, s.Discrete(2), "state.obs[1][1][0]"), (BOX, space, "action_space[1][1][0]")):
        with pytest.raises(EnvError) as e:
            same.rollout([SpaceEnv(obs, act)], still(), 2)
        assert (e.value.phase, e.value.leaf, e.value.found) == ("spaces", leaf, "Sequence")
        assert "pad" in str(e.value)
