"""What cannot be recorded is refused once, clearly: which environment, which leaf, what was expected, what came."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.spaces import AnyActor
from tests.toys import (
    CountingActor,
    CountingEnv,
    LambdaActor,
    RandomActor,
    SpaceEnv,
    SpoiltEnv,
    StepResult,
    value_of,
)
from zrl import ActorError, BaseActorModule, Batch, ConfigError, EnvError, RecordError, evaluate
from zrl.data.fragment import Slot
from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.rollout import same
from zrl.zoo import default_actor

SPOILT = 1  # the column with the bad environment, of three


def run(env: Callable[[], Any], actor: BaseActorModule | None = None, n: int = 10, **options: Any) -> list[Batch]:
    """Collect `n` batches of 10 steps from one environment, between two good ones."""
    envs = [CountingEnv(limit=60), env(), CountingEnv(limit=60)]
    with same.rollout(envs, actor or RandomActor(), 10, 3, entropy=0, **options) as batches:
        return [next(batches).clone() for _ in range(n)]


def refused(kind: type[Any], fn: Callable[..., Any], *args: Any) -> Any:
    """The error of `kind`, whose text must contain what its attributes say."""
    with pytest.raises(kind) as e:
        fn(*args)
    error = e.value
    text = str(error)
    for name in ("leaf", "expected", "found"):
        assert getattr(error, name, "") in text, name
    if isinstance(error, EnvError):
        assert f"environment {error.env_index}" in text or (error.env_index == -1 and "scratch" in text)
        assert error.phase in text
    assert "\n" not in text
    return error


# -- factories -------------------------------------------------------------------------------------------------------


def test_a_factory_that_raises() -> None:
    def factory() -> Any:
        raise RuntimeError("no licence")

    e = refused(EnvError, lambda: same.rollout(factory, RandomActor(), 2, 2))
    assert (e.env_index, e.phase) == (-1, "factory")
    assert "RuntimeError: no licence" in str(e)
    assert isinstance(e.__cause__, RuntimeError)


def test_a_factory_that_raises_for_one_column() -> None:
    made: list[CountingEnv] = []

    def factory() -> Any:
        if len(made) == 3:  # the scratch one, and columns 0 and 1
            raise OSError("out of sockets")
        made.append(CountingEnv())
        return made[-1]

    e = refused(EnvError, lambda: same.rollout(factory, RandomActor(), 2, 4))
    assert (e.env_index, e.phase) == (2, "factory")
    assert [env.n_closed for env in made] == [1, 1, 1]


@pytest.mark.parametrize(
    "factory",
    [
        lambda a: CountingEnv(),
        lambda a, *, seed: CountingEnv(),
        lambda *, a: CountingEnv(),
    ],
)
def test_a_factory_with_a_wrong_signature(factory: Any) -> None:
    e = refused(EnvError, lambda: same.rollout(factory, RandomActor(), 2, 2))
    assert e.phase == "factory"
    assert "seed=" in e.expected
    assert "a" in e.found


@pytest.mark.parametrize("made", [None, "CartPole-v1", CountingEnv])
def test_a_factory_that_returns_no_environment(made: Any) -> None:
    e = refused(EnvError, lambda: same.rollout(lambda: made, RandomActor(), 2, 2))
    assert e.phase in ("factory", "reset", "spaces")


def test_a_factory_that_returns_the_same_environment_again() -> None:
    env = CountingEnv()
    with pytest.raises(ConfigError, match="same environment"):
        same.rollout(lambda: env, RandomActor(), 2, 2)


def test_lists_of_environments() -> None:
    env = CountingEnv()
    with pytest.raises(ConfigError, match="twice"):
        same.rollout([env, env], RandomActor(), 2)
    with pytest.raises(ConfigError, match="n_envs is 3"):
        same.rollout([env], RandomActor(), 2, 3)
    with pytest.raises(ConfigError, match="n_envs"):
        same.rollout(CountingEnv, RandomActor(), 2)


# -- spaces ----------------------------------------------------------------------------------------------------------

BOX = gym.spaces.Box(0, 1, (2,), np.float32)
UNFIXED: list[gym.Space[Any]] = [gym.spaces.Graph(BOX, None), gym.spaces.Sequence(BOX)]


@pytest.mark.parametrize("space", UNFIXED, ids=lambda s: type(s).__name__)
def test_spaces_without_a_fixed_shape(space: gym.Space[Any]) -> None:
    nested = gym.spaces.Dict({"x": gym.spaces.Tuple([BOX, space])})
    for obs, act, leaf in [
        (space, gym.spaces.Discrete(2), "observation_space"),
        (nested, gym.spaces.Discrete(2), "state.obs['x'][1]"),
        (BOX, space, "action_space"),
        (BOX, nested, "action_space['x'][1]"),
    ]:
        e = refused(EnvError, same.rollout, [SpaceEnv(obs, act)], RandomActor(), 2)
        assert e.leaf.removeprefix("observation_space") in (leaf, "state.obs", "")
        assert "Box" in e.expected
        assert e.found == type(space).__name__


WIDE, TWO = gym.spaces.Box(0, 2, (2,), np.float32), gym.spaces.Discrete(2)
TEXT = gym.spaces.Text(3, charset="ab")
#: The space of one column, that of the next, the leaf, what was expected and what was found there.
OTHERS: list[tuple[Any, Any, str, str, str]] = [
    (TWO, gym.spaces.Discrete(3), "", "Discrete(2)", "Discrete(3)"),
    (TWO, gym.spaces.Discrete(2, start=1), "", "Discrete(2)", "Discrete(2, start=1)"),
    (TWO, BOX, "", "Discrete(2)", str(BOX)),
    (TWO, gym.spaces.Dict(a=TWO), "", "Discrete(2)", "Dict('a': Discrete(2))"),
    (BOX, gym.spaces.Box(0, 1, (3,), np.float32), "", str(BOX), "Box(0.0, 1.0, (3,), float32)"),
    (BOX, gym.spaces.Box(0, 1, (2,), np.float64), "", str(BOX), "Box(0.0, 1.0, (2,), float64)"),
    (gym.spaces.Dict(a=TWO, b=BOX), gym.spaces.Dict(a=TWO), "", "keys ['a', 'b']", "keys ['a']"),
    (
        gym.spaces.Dict(a=gym.spaces.Tuple([BOX, TWO])),
        gym.spaces.Dict(a=gym.spaces.Tuple([BOX, TEXT])),
        "['a'][1]",
        "Discrete(2)",
        str(TEXT),
    ),
    (gym.spaces.Tuple([TWO]), gym.spaces.Tuple([TWO, TWO]), "", "1 spaces", "2 spaces"),
    (gym.spaces.OneOf([TWO, BOX]), gym.spaces.OneOf([TWO, TWO]), "[1]", str(BOX), "Discrete(2)"),
    (
        gym.spaces.MultiDiscrete([2, 3]),
        gym.spaces.MultiDiscrete([3, 3]),
        "",
        "MultiDiscrete([2 3])",
        "MultiDiscrete([3 3])",
    ),
]


@pytest.mark.parametrize(("first", "other", "leaf", "expected", "found"), OTHERS)
def test_columns_with_other_spaces(first: Any, other: Any, leaf: str, expected: str, found: str) -> None:
    """Observations or actions; given in a list, or made by a factory; refused before anything is reset or stepped."""
    for name, spaces in (("observation_space", [(first, TWO), (other, TWO)]), ("action_space", [(BOX, first)])):
        envs = [SpaceEnv(*pair) for pair in (spaces[0], spaces[0], spaces[-1])]
        if name == "action_space":
            envs[-1].action_space = other
        made = iter(envs)
        actor = AnyActor(spaces[0][1])
        for given in (envs, lambda made=made: next(made)):
            e = refused(EnvError, same.rollout, given, actor, 2, 3 if given is envs else 2)
            assert (e.env_index, e.phase, e.leaf) == (2 if given is envs else 1, "spaces", name + leaf)
            assert (e.expected, e.found) == (expected, found)
        assert not any(env.actions or env.given for env in envs[1:])


def test_bounds_of_what_is_observed_may_differ() -> None:
    with same.rollout([SpaceEnv(BOX, TWO), SpaceEnv(WIDE, TWO)], RandomActor(2), 2) as it:
        next(it)
    # actions are clipped to theirs
    e = refused(EnvError, same.rollout, [SpaceEnv(BOX, BOX), SpaceEnv(BOX, WIDE)], AnyActor(BOX), 2)
    assert (e.env_index, e.leaf, e.expected, e.found) == (1, "action_space", str(BOX), str(WIDE))
    with pytest.raises(EnvError, match="environment 1, spaces"):
        evaluate([SpaceEnv(BOX, TWO), SpaceEnv(BOX, gym.spaces.Discrete(3))], RandomActor(2), 2)


def test_no_action_space() -> None:
    env = CountingEnv()
    env.action_space = None  # type: ignore[assignment]
    e = refused(EnvError, lambda: same.rollout([env], RandomActor(), 2))
    assert (e.phase, e.leaf, e.found) == ("spaces", "action_space", "NoneType")
    e = refused(EnvError, lambda: same.rollout([CountingEnv(), env], RandomActor(), 2))
    assert (e.env_index, e.leaf, e.found) == (1, "action_space", "None")


@pytest.mark.parametrize(
    ("obs", "act"),
    [
        (gym.spaces.Discrete(2), gym.spaces.Tuple([gym.spaces.Discrete(2)])),
        (gym.spaces.Discrete(2), gym.spaces.Dict(a=gym.spaces.Discrete(2))),
        (gym.spaces.Discrete(2), gym.spaces.Box(0, 9, (2,), np.int64)),
        (gym.spaces.Discrete(2), gym.spaces.Text(3)),
        (gym.spaces.Discrete(2), gym.spaces.OneOf([gym.spaces.Discrete(2)])),
    ],
)
def test_no_default_actor_for_a_space(obs: Any, act: Any) -> None:
    e = refused(ActorError, lambda: default_actor(obs, act))
    assert e.leaf == "action_space"
    assert e.found == str(act)
    assert "BaseActorModule" in str(e)


@pytest.mark.parametrize("space", UNFIXED, ids=lambda s: type(s).__name__)
def test_no_default_actor_for_observations(space: gym.Space[Any]) -> None:
    e = refused(RecordError, lambda: default_actor(gym.spaces.Dict(x=space), gym.spaces.Discrete(2)))
    assert "'x'" in e.leaf


# -- observations ----------------------------------------------------------------------------------------------------


def always(x: Any) -> Callable[[Any], Any]:
    return lambda _: x


def observation(x: Any) -> Callable[[StepResult], Any]:
    return lambda result: (x, *result[1:])


BAD_OBS = {
    "shape": (np.zeros(4, np.float32), "float32[4]"),
    "scalar": (1.0, "float64[]"),
    "more dimensions": (np.zeros((1, 3), np.float32), "float32[1, 3]"),
    "complex": (np.zeros(3, np.complex64), "complex64[3]"),
    "text": (np.array(["a", "b", "c"]), "<U1[3]"),
    "object": (np.array([None, None, None]), "object[3]"),
    "nothing": (None, "object[]"),
    "ragged": ([[1.0], [1.0, 2.0], 3.0], "no array"),
    "container": ({"x": np.zeros(3, np.float32)}, "object[]"),
}


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize(("obs", "found"), BAD_OBS.values(), ids=BAD_OBS)
def test_an_observation_that_changes_at_step_100(obs: Any, found: str, sticky: bool) -> None:
    e = refused(EnvError, lambda: run(lambda: SpoiltEnv(100, observation(obs)), n=20, sticky=sticky))
    assert (e.env_index, e.phase, e.leaf, e.expected) == (SPOILT, "step", "state.obs", "float32[3]")
    assert found in e.found


def nested(**changed: Any) -> Callable[[StepResult], Any]:
    return lambda result: ({**result[0], **changed}, *result[1:])


@pytest.mark.parametrize(
    ("changed", "leaf", "expected", "found"),
    [
        ({"seen": np.zeros(2, np.uint8)}, "state.obs['seen']", "uint8[1]", "uint8[2]"),
        ({"seen": np.zeros(1, np.float32)}, "state.obs['seen']", "uint8[1]", "float32[1]"),
        ({"seen": np.array([256])}, "state.obs['seen']", "uint8[1]", "outside of 0 to 255"),
        ({"seen": np.array([-1], np.int8)}, "state.obs['seen']", "uint8[1]", "outside of 0 to 255"),
        ({"at": (np.zeros(2, np.float32), 0.5)}, "state.obs", "Pair", ""),
        ({"more": 1}, "state.obs", "seen", "more"),
    ],
)
def test_a_leaf_of_a_nested_observation(changed: Any, leaf: str, expected: str, found: str) -> None:
    envs = [CountingEnv(nested=True), SpoiltEnv(7, nested(**changed), nested=True)]
    with same.rollout(envs, RandomActor(), 10, entropy=0) as batches:
        e = refused(EnvError, lambda: next(batches))
    assert (e.env_index, e.leaf) == (1, leaf)
    assert expected in e.expected
    assert found in e.found


def test_a_first_observation_that_is_not_in_its_space() -> None:
    space = gym.spaces.Dict(a=gym.spaces.Box(0, 1, (2,), np.float32), b=gym.spaces.Tuple([gym.spaces.Discrete(2)]))
    good = {"a": np.zeros(2, np.float32), "b": (0,)}
    for shown, leaf in [
        (np.zeros(2), "state.obs"),
        ({"a": good["a"]}, "state.obs"),
        (good | {"b": (0, 1)}, "state.obs['b']"),
        (good | {"b": 0}, "state.obs['b']"),
        (good | {"a": np.zeros(3, np.float32)}, "state.obs['a']"),
    ]:
        env = SpaceEnv(space, gym.spaces.Discrete(2), shown=always(shown))
        e = refused(EnvError, same.rollout, [env], RandomActor(2), 2)
        assert (e.phase, e.leaf) == ("reset", leaf)
        assert e.expected
        assert e.found


def test_float64_is_cast_with_one_warning() -> None:
    """One warning for the leaf, however many columns and steps; what is recorded is the float32 of it."""

    def env(column: int) -> SpaceEnv:
        return SpaceEnv(
            gym.spaces.Box(0, 1, (2,), np.float32), gym.spaces.Discrete(5), shown=lambda x: x * np.float64(3)
        )

    envs = [env(0), env(1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with same.rollout(envs, RandomActor(), 5, entropy=0) as batches:
            batch = next(batches).clone()
            next(batches)
    (only,) = caught
    for word in ("environment 0", "state.obs", "float64", "float32"):
        assert word in str(only.message)
    assert batch.state.obs.dtype == torch.float32
    shown = np.array(envs[0].given[2:4], np.float32)  # behind the probe's observation and its own first one
    np.testing.assert_array_equal(batch.state.obs[1:3, 0], shown)


@pytest.mark.parametrize("at", [1, 100])
def test_float64_is_refused_under_debug(at: int) -> None:
    spoil = observation(np.zeros(3))
    e = refused(EnvError, lambda: run(lambda: SpoiltEnv(at, spoil), n=20, debug=True))
    assert (e.env_index, e.leaf, e.expected, e.found) == (SPOILT, "state.obs", "float32[3]", "float64[3]")


def test_an_observation_that_changes_its_dtype_at_step_100_is_cast_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"environment 1: state\.obs is float64.*float32"):
        batches = run(lambda: SpoiltEnv(100, observation(np.full(3, 0.1))), n=10)
    assert batches[9].state.obs[10, SPOILT].tolist() == [np.float32(0.1)] * 3


def test_a_wide_integer_is_never_wrapped_around() -> None:
    """Integers of another width are cast while they fit, and refused when they do not, however late."""
    space = gym.spaces.Box(-30000, 30000, (2,), np.int16)

    def env() -> SpaceEnv:
        made: list[None] = []

        def shown(_: Any) -> Any:
            made.append(None)
            return np.array([3, 40000 if len(made) == 9 else 4])

        return SpaceEnv(space, gym.spaces.Discrete(5), shown=shown, limit=100)

    with pytest.warns(UserWarning, match=r"int64.*int16"):
        e = refused(EnvError, lambda: next(same.rollout([env()], RandomActor(), 20)))
    assert (e.env_index, e.leaf) == (0, "state.obs")
    assert "-32768 to 32767" in e.found


def test_python_numbers_have_no_dtype_to_get_wrong() -> None:
    space = gym.spaces.Dict(a=gym.spaces.Box(0, 9, (), np.float32), b=gym.spaces.MultiDiscrete([3, 3]))
    space["c"] = gym.spaces.Box(0, 9, (0,), np.int16)
    env = SpaceEnv(space, gym.spaces.Discrete(5), shown=lambda _: {"a": 0.1, "b": [1, 2], "c": []})
    with same.rollout([env], RandomActor(), 4, debug=True) as batches:
        batch = next(batches)
    assert batch.state.obs["a"].dtype == torch.float32
    assert batch.state.obs["b"].tolist() == [[[1, 2]]] * 5
    assert (batch.state.obs["c"].dtype, batch.state.obs["c"].shape) == (torch.int16, (5, 1, 0))


# -- rewards and flags -----------------------------------------------------------------------------------------------


def reward(x: Any) -> Callable[[StepResult], Any]:
    return lambda result: (result[0], x, *result[2:])


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("x", [np.nan, np.inf, -np.inf, np.float32(np.nan)])
def test_a_reward_that_is_not_finite(x: Any, sticky: bool) -> None:
    e = refused(EnvError, lambda: run(lambda: SpoiltEnv(37, reward(x)), sticky=sticky))
    assert (e.env_index, e.phase, e.leaf) == (SPOILT, "step", "state.rew")
    assert "finite" in e.expected
    assert e.found == str(np.float32(x))
    assert "step 37" in str(e)


def test_a_reward_beyond_float32() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's own, about the cast
        e = refused(EnvError, lambda: run(lambda: SpoiltEnv(3, reward(1e300))))
    assert (e.env_index, e.leaf) == (SPOILT, "state.rew")


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("at", [1, 37])
@pytest.mark.parametrize("x", [np.zeros(2), [1.0, 2.0], np.zeros(1), "much", None])
def test_a_reward_that_is_not_a_number(x: Any, at: int, sticky: bool) -> None:
    e = refused(EnvError, lambda: run(lambda: SpoiltEnv(at, reward(x)), sticky=sticky))
    assert (e.env_index, e.phase, e.leaf) == (SPOILT, "step", "state.rew")
    assert e.expected
    assert e.found


def test_vector_rewards_of_every_environment() -> None:
    class Vector(CountingEnv):
        def step(self, action: Any) -> Any:
            return reward(np.zeros(2))(super().step(action))

    with same.rollout([Vector(), Vector()], RandomActor(), 3) as batches:
        e = refused(EnvError, lambda: next(batches))
    assert (e.env_index, e.leaf) == (0, "state.rew")
    assert "[2]" in e.found
    assert "wrapper" in str(e)


@pytest.mark.parametrize("x", [np.float32(2), np.array(2.0), 2, True, torch.tensor(2.0)])
def test_scalar_rewards_of_any_kind(x: Any) -> None:
    batch = run(lambda: SpoiltEnv(3, reward(x)), n=1)[0]
    assert batch.state.rew[3].tolist() == [3.0, float(x), 3.0]


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r[:4],
        lambda r: r[0],
        lambda r: None,
        lambda r: (*r[:2], np.zeros(2, bool), False, {}),
    ],
)
def test_a_step_that_breaks_the_contract(spoil: Any, sticky: bool) -> None:
    e = refused(EnvError, lambda: run(lambda: SpoiltEnv(3, spoil), sticky=sticky))
    assert (e.env_index, e.phase) == (SPOILT, "step")
    assert "terminated, truncated" in e.expected


@pytest.mark.parametrize("sticky", [False, True])
def test_a_step_that_raises(sticky: bool) -> None:
    def spoil(_: StepResult) -> Any:
        raise ZeroDivisionError("physics")

    # column 0 is frozen by then, where it can be
    envs = [CountingEnv({11: "term"}), SpoiltEnv(12, spoil), CountingEnv()]
    with same.rollout(envs, RandomActor(), 10, sticky=sticky) as batches:
        next(batches)
        e = refused(EnvError, lambda: next(batches))
    assert (e.env_index, e.phase) == (1, "step")
    assert "ZeroDivisionError: physics" in str(e)
    assert isinstance(e.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("result", [np.zeros(3, np.float32), (np.zeros(3, np.float32), None), None, "raise"])
def test_a_reset_that_breaks_the_contract(result: Any) -> None:
    class Late(CountingEnv):
        def reset(self, **kwargs: Any) -> Any:
            if self.n == 4:
                if isinstance(result, str):
                    raise OSError("gone")
                return result
            return super().reset(**kwargs)

    e = refused(EnvError, lambda: run(lambda: Late({4: "term"})))
    assert (e.env_index, e.phase) == (SPOILT, "reset")
    if isinstance(result, str):
        assert "OSError: gone" in str(e)


def test_an_environment_that_fails_in_close_too() -> None:
    """The first error is the one to see; the other environments are closed all the same."""

    class Broken(SpoiltEnv):
        def close(self) -> None:
            super().close()
            raise OSError("already gone")

    def spoil(_: StepResult) -> Any:
        raise ZeroDivisionError("physics")

    envs = [CountingEnv(), Broken(3, spoil), CountingEnv()]
    batches = same.rollout(envs, RandomActor(), 4)
    e = refused(EnvError, lambda: next(batches))
    assert "physics" in str(e)
    assert [env.n_closed for env in envs] == [1, 1, 1]


def test_an_error_while_info_keys_are_looked_for() -> None:
    def spoil(_: StepResult) -> Any:
        raise ZeroDivisionError("physics")

    e = refused(EnvError, lambda: same.rollout(lambda: SpoiltEnv(2, spoil), RandomActor(), 4, 1, info_keys=["x"]))
    assert (e.env_index, e.phase) == (-1, "step")


# -- actors ----------------------------------------------------------------------------------------------------------


def acting(fn: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: same.rollout([CountingEnv(), CountingEnv()], LambdaActor(fn), 4)


def zeros(fin: Tensor) -> Tensor:
    return torch.zeros(fin.shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("info", "leaf", "expected", "found"),
    [
        (lambda rew: {}, "info", "'value'", "keys []"),
        (lambda rew: {"logits": rew, "Value": rew}, "info", "'value'", "keys ['Value', 'logits']"),
        (lambda rew: rew, "info", "'value'", "Tensor"),
        (lambda rew: {"value": rew.unsqueeze(-1)}, "info['value']", "[1, 2]", "float32[1, 2, 1]"),
        (lambda rew: {"value": rew[0]}, "info['value']", "[1, 2]", "float32[2]"),
        (lambda rew: {"value": 0.0}, "info['value']", "[1, 2]", "float"),
        (lambda rew: {"value": rew, "x": {"y": rew[0]}}, "info['x']['y']", "[1, 2, ...]", "float32[2]"),
        (lambda rew: {"value": rew, "x": "text"}, "info['x']", "[1, 2, ...]", "str"),
        (lambda rew: {"value": rew, "x": rew.bfloat16()}, "info['x']", "float32", "bfloat16"),
    ],
)
def test_info_of_an_actor(info: Any, leaf: str, expected: str, found: str) -> None:
    e = refused(ActorError, acting(lambda obs, act, rew, fin, hx: (zeros(fin), (), info(rew))))
    assert e.leaf == leaf
    assert expected in e.expected
    assert e.found == found
    assert ("squeeze" in str(e)) == (found == "float32[1, 2, 1]")


@pytest.mark.parametrize(
    ("actions", "leaf", "expected", "found"),
    [
        (lambda z: z.unsqueeze(-1), "state.act", "[1, 2]", "int64[1, 2, 1]"),
        (lambda z: z[0], "state.act", "[1, 2]", "int64[2]"),
        (lambda z: z[:, :1], "state.act", "[1, 2]", "int64[1, 1]"),
        (lambda z: z.float(), "state.act", "Discrete(5)", "torch.float32"),
        (lambda z: z + 5, "state.act", "Discrete(5)", "[5, 5]"),
        (lambda z: z - 1, "state.act", "Discrete(5)", "[-1, -1]"),
        (lambda z: z.numpy(), "state.act", "[1, 2]", "ndarray"),
        (lambda z: {"a": z}, "state.act", "[1, 2]", "dict"),
        (lambda z: None, "state.act", "[1, 2]", "NoneType"),
    ],
)
def test_actions_that_do_not_fit(actions: Any, leaf: str, expected: str, found: str) -> None:
    e = refused(ActorError, acting(lambda obs, act, rew, fin, hx: (actions(zeros(fin)), (), {"value": rew})))
    assert e.leaf == leaf
    assert expected in e.expected
    assert e.found == found


def giving(actions: Callable[[Tensor], Any]) -> LambdaActor:
    return LambdaActor(lambda obs, act, rew, fin, hx: (actions(fin), (), {"value": rew}))


def test_actions_that_are_not_nested_like_their_space() -> None:
    space = gym.spaces.Dict(a=gym.spaces.Discrete(2), b=gym.spaces.Box(0, 1, (2,), np.float32))
    for actions, leaf in [
        (zeros, "state.act"),
        (lambda fin: {"a": zeros(fin)}, "state.act"),
        (lambda fin: (zeros(fin), torch.zeros(*fin.shape, 2)), "state.act"),
        (lambda fin: {"a": zeros(fin), "b": torch.zeros(*fin.shape, 3)}, "state.act['b']"),
    ]:
        e = refused(ActorError, same.rollout, [SpaceEnv(BOX, space)], giving(actions), 2)
        assert e.leaf == leaf
        assert e.expected
        assert e.found


def test_an_actor_that_returns_two_things_or_raises() -> None:
    class Two(RandomActor):
        def step(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
            return super().step(obs, act, rew, fin, hx)[::2]

    e = refused(ActorError, lambda: same.rollout(CountingEnv, Two(), 2, 2))
    assert "(actions, hx, info)" in e.expected
    e = refused(ActorError, acting(lambda obs, act, rew, fin, hx: obs @ torch.zeros(7, 7)))
    assert "on the first observation" in str(e)
    assert isinstance(e.__cause__, RuntimeError)


def test_not_an_actor() -> None:
    e = refused(ActorError, lambda: same.rollout(CountingEnv, torch.nn.Linear(3, 5), 2, 2))
    assert "BaseActorModule" in e.expected
    assert e.found == "Linear"


def test_recurrent_state_without_columns() -> None:
    for hx, leaf in [(torch.zeros(2), "hx"), (torch.zeros(1, 3, 4), "hx"), ({"a": [torch.zeros(1)]}, "hx['a'][0]")]:
        e = refused(ActorError, acting(lambda obs, act, rew, fin, _, hx=hx: (zeros(fin), hx, {"value": rew})))
        assert e.leaf == leaf
        assert "[L, 2, ...]" in e.expected


def test_recurrent_state_that_grows() -> None:
    def forward(obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
        h = torch.zeros(1, 2, 1) if hx is None else torch.cat([hx, hx], -1)
        return zeros(fin), h, {"value": rew}

    e = refused(ActorError, acting(forward))
    assert (e.leaf, e.expected, e.found) == ("hx", "float32[1, 2, 1]", "float32[1, 2, 2]")


class InPlace(CountingActor):
    """Writes into what it is given."""

    def __init__(self, what: str, late: bool = False) -> None:
        super().__init__()
        self.what, self.late = what, late

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        hx = torch.zeros(1, fin.shape[1], 1) if hx is None else hx
        value = rew.clone()
        if not self.late or (obs[..., 2] > 2).any():
            x = {"obs": obs, "act": act, "rew": rew, "fin": fin, "hx": hx}[self.what]
            x.copy_(~x if self.what == "fin" else x + 1)
        return zeros(fin), hx if self.what == "hx" else hx + 1, {"value": value}


@pytest.mark.parametrize("what", ["obs", "act", "rew", "fin", "hx"])
def test_an_actor_that_writes_its_inputs(what: str) -> None:
    e = refused(ActorError, lambda: same.rollout([CountingEnv(), CountingEnv()], InPlace(what), 4))
    assert e.leaf == what
    assert "in place" in str(e)


@pytest.mark.parametrize("what", ["obs", "act", "rew", "fin", "hx"])
def test_an_actor_that_writes_its_inputs_later_is_found_by_debug(what: str) -> None:
    with same.rollout([CountingEnv(), CountingEnv()], InPlace(what, late=True), 6, debug=True) as batches:
        e = refused(ActorError, lambda: next(batches))
    assert e.leaf == what


class Later(BaseActorModule):
    """Right on the first row of every run, and what a function says from its third call in a fragment."""

    def __init__(self, fn: Callable[[Tensor], tuple[Any, Any]]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        if (obs[..., 2] == 2).all():
            actions, info = self.fn(rew)
            return actions, (), info
        return torch.zeros(rew.shape, dtype=torch.int64), (), {"value": rew, "x": rew}


@pytest.mark.parametrize(
    ("fn", "leaf"),
    [
        (lambda r: (r.long(), {"value": r, "x": r.unsqueeze(-1)}), "info['x']"),
        (lambda r: (r.long(), {"value": r[:, :1], "x": r}), "info['value']"),
        (lambda r: (r.long()[..., None], {"value": r, "x": r}), "state.act"),
        (lambda r: (r.long(), {"value": r}), ""),
        (lambda r: (r.long(), {"value": r, "x": 1.0}), "info['x']"),
        (lambda r: ((r.long(),), {"value": r, "x": r}), "state.act"),
    ],
)
def test_an_actor_that_changes_its_mind(fn: Any, leaf: str) -> None:
    with same.rollout([CountingEnv(), CountingEnv()], Later(fn), 6) as batches:
        e = refused(ActorError, lambda: next(batches))
    assert e.leaf == leaf


def test_a_misshapen_value_method() -> None:
    class Wrong(RandomActor):
        def value(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().value(*args, **kwargs)[0]

    e = refused(ActorError, lambda: same.rollout(CountingEnv, Wrong(), 2, 3))
    assert (e.expected, e.found) == ("[1, 3]", "float32[3]")


def test_an_actor_that_cannot_be_copied() -> None:
    class Open(RandomActor):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle a lock")

    e = refused(ActorError, lambda: same.rollout(CountingEnv, Open(), 2, 3))
    assert "cannot pickle a lock" in str(e)


# -- what only debug looks at ----------------------------------------------------------------------------------------


def test_debug_finds_a_forward_that_forgets_resets() -> None:
    class Forgetful(CountingActor):
        def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
            actions, h, info = super().forward(obs, act, rew, torch.zeros_like(fin), hx=hx)
            return actions, h, info | {"value": value_of(obs, act, rew, fin, info["count"])}

    with same.rollout([CountingEnv(), CountingEnv({3: "trunc"})], Forgetful(), 5, debug=True) as batches:
        e = refused(ActorError, lambda: next(batches))
    assert e.leaf == "info['value']"
    assert "row 3, column 1" in str(e)
    # where rows behind an end are masked there is nothing to forget
    with same.rollout([CountingEnv({3: "trunc"})], Forgetful(), 5, debug=True, sticky=True) as batches:
        next(batches)
        next(batches)


def test_debug_finds_values_that_are_not_finite() -> None:
    actor = LambdaActor(lambda obs, act, rew, fin, hx: (zeros(fin), (), {"value": rew + (obs[..., 2] > 2) * torch.inf}))
    with same.rollout([CountingEnv()], actor, 6, debug=True) as batches:
        e = refused(ActorError, lambda: next(batches))
    assert e.leaf == "info['value']"


def test_debug_warns_of_buffers_that_the_actor_changes() -> None:
    class Counts(RandomActor):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().forward(*args, **kwargs)

    with same.rollout([CountingEnv()], Counts(), 3, debug=True) as batches:
        with pytest.warns(UserWarning, match="buffer 'calls'") as caught:
            next(batches)
        assert len(caught) == 1
        next(batches)


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_steps": 0},
        {"n_steps": 2.0},
        {"n_steps": True},
        {"n_envs": 0},
        {"n_envs": -1},
        {"entropy": -1},
        {"entropy": 1.5},
        {"max_lag": -1},
        {"max_lag": 0.5},
        {"worker_mode": "test"},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(wrong: dict[str, Any]) -> None:
    made: list[CountingEnv] = []

    def factory() -> CountingEnv:
        made.append(CountingEnv())
        return made[-1]

    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("n_envs", "(n_envs|n_columns)")) as e:
        same.rollout(factory, RandomActor(), **{"n_steps": 2, "n_envs": 2, **wrong})
    assert repr(next(iter(wrong.values()))) in str(e.value)
    assert isinstance(e.value, ValueError)
    assert made == []


def test_memory_that_does_not_fit() -> None:
    spec = FragmentSpec.build(
        2, 1, obs=ArraySpec("float32"), act=ArraySpec("int64"), actor={"value": ArraySpec("float32")}
    )
    with pytest.raises(RecordError, match="aligned"):
        Slot(spec, np.zeros(spec.nbytes - 1, np.uint8))
