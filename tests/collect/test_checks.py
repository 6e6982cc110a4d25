"""Faults that once slipped through, or came as the wrong error: each is found, and the right one is blamed."""

from __future__ import annotations

import collections
import operator
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import CountingActor, CountingEnv, LambdaActor, RandomActor, SpaceEnv, SpoiltEnv, StepResult
from zrl import ActorError, BaseActorModule, ConfigError, EnvError, evaluate
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import collect
from zrl.collect.debug import CheckedStep
from zrl.collect.envs import shorten
from zrl.collect.probe import check_untouched, first_actions
from zrl.collect.spaces import make_env, probe_env
from zrl.data.fragment import Slot
from zrl.data.spec import ArraySpec
from zrl.rollout import same

BOX = gym.spaces.Box(-9, 9, (3,), np.float32)
TWO = gym.spaces.Discrete(2)


def zeros(fin: Tensor) -> Tensor:
    return torch.zeros(fin.shape, dtype=torch.int64)


def first_error(kind: type[Any], env: Any, actor: BaseActorModule | None = None, **options: Any) -> Any:
    """The error of building, or of the first batch, of two environments (the second is `env`)."""
    first = CountingEnv(nested=env.nested) if isinstance(env, CountingEnv) else env
    envs = [first, env] if first is not env else [env]
    with pytest.raises(kind) as e, same.rollout(envs, actor or RandomActor(), 6, entropy=0, **options) as batches:
        next(batches)
    assert "\n" not in str(e.value)
    assert "PyTreeSpec" not in str(e.value)
    assert "NoneIsLeaf" not in str(e.value)
    return e.value


def always(x: Any) -> Callable[[Any], Any]:
    return lambda _: x


def spoilt(**parts: Any) -> SpoiltEnv:
    """Its third step returns these parts instead."""
    names = ["obs", "rew", "terminated", "truncated", "info"]
    return SpoiltEnv(3, lambda r: tuple(parts.get(n, x) for n, x in zip(names, r, strict=True)))


# -- environments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("x", [np.nan, np.inf])
def test_debug_blames_the_environment_for_what_is_not_finite(x: float, sticky: bool) -> None:
    obs = np.array([0, x, 0], np.float32)
    e = first_error(EnvError, spoilt(obs=obs), debug=True, sticky=sticky)
    assert (e.env_index, e.phase, e.leaf) == (1, "step", "state.obs")
    e = first_error(EnvError, spoilt(rew=x), debug=True, sticky=sticky)
    assert (e.env_index, e.phase, e.leaf) == (1, "step", "state.rew")


class LateReset(CountingEnv):
    """Its reset after an end gives something else."""

    def __init__(self, obs: Any, **options: Any) -> None:
        super().__init__({2: "term"}, **options)
        self.obs = obs

    def reset(self, **kwargs: Any) -> Any:
        obs, info = super().reset(**kwargs)
        return (self.obs if self.episode else obs), info


@pytest.mark.parametrize("sticky", [False, True])
def test_a_bad_observation_of_a_reset_says_so(sticky: bool) -> None:
    e = first_error(EnvError, LateReset(np.zeros(4, np.float32)), sticky=sticky)
    assert (e.env_index, e.phase, e.leaf) == (1, "reset", "state.obs")
    e = first_error(EnvError, LateReset({"at": 1}, nested=True), FlatActor(), sticky=sticky)
    assert (e.env_index, e.phase, e.leaf) == (1, "reset", "state.obs")
    assert e.expected == "{'at': Pair(here=*, there=*), 'seen': *}"
    assert e.found == "{'at': *}"
    e = first_error(EnvError, LateReset(np.full(3, np.nan, np.float32)), debug=True, sticky=sticky)
    assert (e.env_index, e.phase, e.leaf) == (1, "reset", "state.obs")


class FlatActor(RandomActor):
    """Looks at nothing."""


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_an_info_that_is_no_dict(end: bool, sticky: bool) -> None:
    options: dict[str, Any] = {} if end else {"info_keys": {"n": int}}  # otherwise nobody looks at it
    e = first_error(EnvError, spoilt(info=None, terminated=end), sticky=sticky, **options)
    assert (e.env_index, e.phase, e.leaf, e.found) == (1, "step", "info", "NoneType")


def vector() -> Any:
    return gym.vector.SyncVectorEnv([CountingEnv])


def test_a_vector_environment_among_plain_ones_is_refused_by_name() -> None:
    made: list[Any] = []

    def mixed() -> Any:
        made.append(vector() if made else CountingEnv())
        return made[-1]

    with pytest.raises(ConfigError, match="it must make the same kind at each call"):
        same.rollout(mixed, RandomActor(), 4, 2)
    for refused in (
        lambda: same.rollout([vector()], RandomActor(), 4),
        lambda: same.rollout([CountingEnv(), vector()], RandomActor(), 4),
        lambda: evaluate([CountingEnv(), vector()], RandomActor()),
        lambda: probe_env(vector(), None, seed=0, may_step=False),
    ):
        with pytest.raises(EnvError, match="a vector environment where a plain one belongs"):
            refused()
    assert all(env.closed for env in made[1:])


@pytest.mark.parametrize("name", ["close", "step", "reset"])
def test_an_environment_that_lacks_a_method(name: str) -> None:
    class Lacks(CountingEnv):
        pass

    setattr(Lacks, name, None)
    with pytest.raises(EnvError) as e:
        make_env(Lacks, 0, 3)
    assert (e.value.env_index, e.value.phase) == (3, "factory")
    assert name in e.value.expected
    assert e.value.found == f"Lacks: no {name}"


class Unreadable:
    """`numpy.asarray` of it raises what it likes."""

    shape = (3,)
    ndim = 1

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("secret")

    def __len__(self) -> int:
        return 3


class Mine(dict[str, Any]):
    pass


class Listed(list[Any]):
    pass


UNREADABLE: list[Any] = [
    [[1.0], [1.0, 2.0], 3.0],
    torch.zeros(3, requires_grad=True),
    [torch.zeros((), requires_grad=True)] * 3,
    Unreadable(),
    np.array([1, 2, 3]),
    np.zeros(3, bool),
    np.array(["a", "b", "c"]),
    None,
]


@pytest.mark.parametrize("obs", UNREADABLE, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("debug", [False, True])
def test_observations_that_cannot_be_read(obs: Any, debug: bool) -> None:
    """The first one, and one in mid-run; alone, nested, or a scalar."""
    e = first_error(EnvError, SpaceEnv(BOX, TWO, shown=lambda _: obs), RandomActor(2))
    assert (e.phase, e.leaf, e.expected) == ("reset", "state.obs", "float32[3]")
    nested = gym.spaces.Dict(a=gym.spaces.Tuple([BOX]))
    e = first_error(EnvError, SpaceEnv(nested, TWO, shown=lambda _: {"a": (obs,)}), RandomActor(2))
    assert (e.phase, e.leaf, e.expected) == ("reset", "state.obs['a'][0]", "float32[3]")
    if "requires_grad=True" not in repr(obs):  # the collector steps in inference mode, where they can be read
        e = first_error(EnvError, spoilt(obs=obs), debug=debug)
        assert (e.env_index, e.phase, e.leaf, e.expected) == (1, "step", "state.obs", "float32[3]")
    if not isinstance(obs, np.ndarray) and obs is not None:
        env = SpaceEnv(BOX, TWO, shown=lambda _: obs)
        env.observation_space = None  # type: ignore[assignment]
        assert first_error(EnvError, env, RandomActor(2)).phase == "reset"


def test_the_first_observation_in_containers_of_its_own() -> None:
    one, two = gym.spaces.Dict(a=TWO), gym.spaces.Tuple([TWO])
    for space, obs in [(one, collections.defaultdict(int, a=1)), (one, Mine(a=1)), (two, Listed([1]))]:
        e = first_error(EnvError, SpaceEnv(space, TWO, shown=always(obs)), RandomActor(2))
        assert (e.phase, e.leaf) == ("reset", "state.obs")
        assert type(obs).__name__ in e.found
    env = SpaceEnv(one, TWO, shown=collections.OrderedDict)
    with same.rollout([env], RandomActor(2), 2) as batches:
        assert isinstance(next(batches).state.obs, collections.OrderedDict)


@pytest.mark.parametrize(
    ("dtype", "obs"),
    [
        ("float32", np.zeros(3, np.int64)),
        ("float32", np.zeros(3, bool)),
        ("int64", np.zeros(3, bool)),
        ("float64", np.zeros(3, np.int8)),
    ],
)
@pytest.mark.parametrize("widened", [False, True])
def test_a_dtype_of_another_kind_is_refused_at_any_step(dtype: str, obs: Any, widened: bool) -> None:
    """Also behind a cast between widths of one kind that was let pass."""
    box: Any = gym.spaces.Box
    space = box(0, 9, (3,), dtype)
    other = {"float32": "float64", "float64": "float32", "int64": "int32"}[dtype]
    shown = iter([np.zeros(3, other if widened and k >= 3 else dtype) for k in range(5)])
    env = SpaceEnv(space, TWO, shown=lambda _: next(shown, obs), limit=99)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        e = first_error(EnvError, env, RandomActor(2))
    assert (e.env_index, e.phase, e.leaf, e.expected) == (0, "step", "state.obs", f"{dtype}[3]")
    assert e.found == f"{obs.dtype}[3]"
    assert len(caught) == widened


def test_scalars_of_another_kind() -> None:
    space = gym.spaces.Box(0, 9, (), np.float32)
    cases: list[tuple[Any, bool]] = [(1, True), (1.5, True), (np.float32(1), True), (np.int64(1), False)]
    for x, good in [*cases, (np.bool_(1), False)]:
        env = SpaceEnv(space, TWO, shown=always(x))
        if good:
            with same.rollout([env], RandomActor(2), 2) as batches:
                assert next(batches).state.obs[0, 0] == x
        else:
            assert first_error(EnvError, env, RandomActor(2)).leaf == "state.obs"


def test_whether_the_environment_raised_or_returned_something_odd() -> None:
    """Told by where it happened, not by how deep: a step written in C has no frames of its own."""

    class Builtin(CountingEnv):
        step: Any = operator.methodcaller("no_such_method")  # raises from C, without a frame

    class Odd(CountingEnv):
        def step(self, action: Any) -> Any:
            def result() -> Any:
                yield super(Odd, self).step(action)[0]
                raise ZeroDivisionError("while it is unpacked")

            return result()

    for sticky in (False, True):
        e = first_error(EnvError, Builtin(), sticky=sticky)
        assert "raised AttributeError" in str(e)
        e = first_error(EnvError, Odd(), sticky=sticky)
        assert "contract" in str(e)
        assert "ZeroDivisionError" in e.found


# -- info keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        (["n", "n"], "twice"),
        ([1], "string"),
        ({1: int}, "string"),
        ([["n"]], "string"),
        (5, "list"),
        ({"n": gym.spaces.Dict(a=BOX)}, "space of one array"),
        ({"n": gym.spaces.Tuple([BOX])}, "space of one array"),
        ({"n": gym.spaces.Text(3)}, "space of one array"),
        ({"n": [[1.0], [1.0, 2.0]]}, "example array"),
        ({"n": torch.zeros(2, requires_grad=True)}, "example array"),
    ],
)
def test_info_keys_that_make_no_sense(keys: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build(CountingEnv, RandomActor(), CollectOptions(2, 1, info_keys=keys))


@pytest.mark.parametrize("x", [[[1.0], [1.0, 2.0]], torch.zeros(2, requires_grad=True)])
def test_an_info_value_that_cannot_be_read(x: Any) -> None:
    def factory() -> CountingEnv:
        return SpoiltEnv(1, lambda r: (*r[:4], {"n": x}))

    with pytest.raises(EnvError) as e:
        build(factory, RandomActor(), CollectOptions(2, 1, info_keys=["n"]))
    assert (e.value.env_index, e.value.leaf) == (-1, "env['n']")
    e2 = first_error(EnvError, spoilt(info={"n": x}), info_keys={"n": "float32"})
    assert (e2.env_index, e2.leaf) == (1, "env['n']")


def test_a_scratch_step_that_breaks_the_contract() -> None:
    broken: list[Callable[[StepResult], Any]] = [lambda r: r[:4], lambda r: (*r[:4], None), lambda r: None]
    for spoil in broken:
        with pytest.raises(EnvError, match="contract") as e:
            build(lambda spoil=spoil: SpoiltEnv(1, spoil), RandomActor(), CollectOptions(2, 1, info_keys=["x"]))
        assert (e.value.env_index, e.value.phase) == (-1, "step")


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("debug", [False, True])
def test_an_info_value_is_never_wrapped_around(sticky: bool, debug: bool) -> None:
    options: dict[str, Any] = {"info_keys": {"n": np.int32}, "sticky": sticky, "debug": debug}
    for x in (np.int64(2**40), 2**40):
        e = first_error(EnvError, spoilt(info={"n": x}), **options)
        assert (e.env_index, e.phase, e.leaf) == (1, "step", "env['n']")
        assert "outside of" in e.found
    with same.rollout([spoilt(info={"n": np.int64(2**30)})], RandomActor(), 6, **options) as batches:
        assert next(batches).env["n"][2, 0] == 2**30


# -- actors ----------------------------------------------------------------------------------------------------------


class Writes(CountingActor):
    """Writes into zeros what leaves them zeros."""

    def __init__(self, fn: Callable[..., Any], late: bool = False, in_value: bool = False) -> None:
        super().__init__()
        self.fn, self.late, self.in_value = fn, late, in_value

    def maybe(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> None:
        if (not self.late or (obs[..., 2] > 2).any()) and hx is not None:
            self.fn(obs, act, rew, fin, hx)

    def step(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
        if not self.in_value:
            self.maybe(obs, act, rew, fin, hx)
        return super().step(obs, act, rew, fin, hx)

    def value(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Tensor:
        if self.in_value:
            self.maybe(obs, act, rew, fin, hx)
        return super().value(obs, act, rew, fin, hx)


WRITES = {
    "obs": lambda obs, act, rew, fin, hx: obs.mul_(1),
    "act": lambda obs, act, rew, fin, hx: act[0].floor_divide_(1),
    "rew": lambda obs, act, rew, fin, hx: rew.mul_(1.0),
    "fin": lambda obs, act, rew, fin, hx: fin.logical_and_(fin),
    "hx": lambda obs, act, rew, fin, hx: hx.clamp_(min=0),
}


@pytest.mark.parametrize("in_value", [False, True])
@pytest.mark.parametrize("what", WRITES)
def test_a_write_that_changes_no_value(what: str, in_value: bool) -> None:
    e = first_error(ActorError, CountingEnv(), Writes(WRITES[what], in_value=in_value))
    assert e.leaf == what
    assert "in place" in str(e)


@pytest.mark.parametrize("what", WRITES)
def test_a_late_write_that_changes_no_value_is_found_by_debug(what: str) -> None:
    assert first_error(ActorError, CountingEnv(), Writes(WRITES[what], late=True), debug=True).leaf == what


@pytest.mark.parametrize("what", WRITES)
def test_checked_values(what: str) -> None:
    ctx = build([CountingEnv()], Writes(WRITES[what], late=True, in_value=True), CollectOptions(6, 1))
    slot = Slot(ctx.spec)
    collect(ctx, slot)
    checked = CheckedStep(ctx.actor)
    with torch.inference_mode():
        good = checked.value(*slot.rows[0].inputs, slot.pt.hx)
        assert torch.equal(good, ctx.actor.value(*slot.rows[0].inputs, slot.pt.hx))
        with pytest.raises(ActorError) as e:
            checked.value(*slot.rows[5].inputs, torch.zeros(1, 1, 1))
    assert e.value.leaf == what


def test_a_checked_value_is_finite() -> None:
    class Endless(RandomActor):
        def value(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Tensor:
            return rew + torch.inf

    rew, fin = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(ActorError) as e:
        CheckedStep(Endless()).value(rew, rew, rew, fin, ())
    assert e.value.leaf == "value()"


def test_containers_that_were_changed() -> None:
    x, y = torch.zeros(1, 2), torch.ones(1, 2)
    for now, expected, found in [
        ({"a": x}, "{'a': *, 'b': *}", "{'a': *}"),
        ({"a": x, "b": y, "c": x}, "{'a': *, 'b': *}", "{'a': *, 'b': *, 'c': *}"),
        (x, "{'a': *, 'b': *}", "Tensor"),
    ]:
        with pytest.raises(ActorError) as e:
            check_untouched((now,), ({"a": x, "b": y},), names=("obs",))
        assert (e.value.leaf, e.value.expected, e.value.found) == ("obs", expected, found)

    def forward(obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
        obs["seen"] = obs["seen"] * 1  # equal, but the next row's observation would never get there
        return zeros(fin), (), {"value": rew.clone()}

    e2 = first_error(ActorError, CountingEnv(nested=True), LambdaActor(forward))
    assert e2.leaf == "obs['seen']"


class Resets(CountingActor):
    """Resets as a function says; its forward never does."""

    def __init__(self, fn: Callable[[int, Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, obs: Any, act: Any, rew: Any, fin: Any, *, hx: Any = None) -> Any:
        return super().forward(obs, act, rew, torch.zeros_like(fin), hx=hx)

    def reset(self, j: int, hx: Any) -> Any:
        return self.fn(j, hx)


def zero(j: Any, hx: Tensor) -> Tensor:
    hx = hx.clone()
    hx[:, j].zero_()
    return hx


def test_a_reset_that_resets_nothing() -> None:
    for fn, found in [
        (lambda j, hx: zero(torch.tensor([j]), hx), "another"),
        (lambda j, hx: hx, "another"),
        (lambda j, hx: zero(0, hx), "another"),
        (lambda j, hx: None, "None"),
        (lambda j, hx: (zero(j, hx),), "('float32[1, 2, 1]',)"),
        (lambda j, hx: zero(j, hx)[..., 0], "float32[1, 2]"),
        (lambda j, hx: zero(j, hx).double(), "float64[1, 2, 1]"),
    ]:
        e = first_error(ActorError, CountingEnv(), Resets(fn))
        assert e.leaf == "hx"
        assert found in e.found
        assert "reset" in str(e)
    with pytest.raises(ActorError, match=r"reset\(0, hx\) of the actor raised IndexError"):
        same.rollout(CountingEnv, Resets(lambda j, hx: hx[:, 7]), 2, 2)


def test_resets_that_are_right() -> None:
    def learnt(j: int, hx: Tensor) -> Tensor:
        hx = hx.clone()
        hx[:, j] = 0.5
        return hx

    def drawn(j: int, hx: Tensor) -> Tensor:
        hx = hx.clone()
        hx[:, j] = torch.rand(())
        return hx

    for fn in (zero, learnt, drawn):
        with same.rollout(CountingEnv, Resets(fn), 2, 2) as batches:
            next(batches)


def test_no_recurrent_state_is_an_empty_tuple() -> None:
    e = first_error(
        ActorError, CountingEnv(), LambdaActor(lambda o, a, rew, fin, h: (zeros(fin), None, {"value": rew}))
    )
    assert e.leaf == "hx"
    assert "return () if there is no recurrent state" in str(e)


def test_a_misshapen_value_has_a_name() -> None:
    class Wrong(RandomActor):
        def value(self, *args: Any) -> Tensor:
            return super().value(*args)[0]

    assert first_error(ActorError, CountingEnv(), Wrong()).leaf == "value()"


def test_nested_actions_in_words() -> None:
    space = gym.spaces.Dict(a=TWO, b=TWO)
    e = first_error(ActorError, SpaceEnv(BOX, space), LambdaActor(lambda o, a, r, f, h: ({"a": f}, (), {"value": r})))
    assert (e.leaf, e.found) == ("state.act", "{'a': *}")


def test_first_actions_begin_at_start() -> None:
    space = gym.spaces.MultiDiscrete(np.array([3, 4]), start=np.array([2, -1]))
    (first,) = first_actions(space, ArraySpec("int64", (2,)))
    assert first.tolist() == [2, -1]
    assert first.dtype == np.int64


def late(obs: Tensor, then: Any, before: Any) -> Any:
    return then if (obs[..., 2] > 2).any() else before


def test_debug_finds_dtypes_that_change() -> None:
    for fn, leaf in [
        (lambda o, a, rew, fin, h: (late(o, zeros(fin).int(), zeros(fin)), (), {"value": rew.clone()}), "state.act"),
        (lambda o, a, rew, fin, h: (zeros(fin), (), {"value": late(o, rew.double(), rew.clone())}), "info['value']"),
        (lambda o, a, rew, fin, h: (zeros(fin), (), {"value": rew, "x": [late(o, fin, rew)]}), "info['x'][0]"),
    ]:
        e = first_error(ActorError, CountingEnv(), LambdaActor(fn), debug=True)
        assert e.leaf == leaf
        assert "dtype" in str(e)


@pytest.mark.parametrize("sticky", [False, True])
def test_debug_finds_actions_outside_of_their_space(sticky: bool) -> None:
    def forward(obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
        bad = torch.arange(fin.shape[1]).view(1, -1) * late(obs, 5, 0) + zeros(fin)
        return bad, (), {"value": rew.clone()}

    e = first_error(ActorError, CountingEnv(), LambdaActor(forward), debug=True, sticky=sticky)
    assert (e.leaf, e.expected, e.found) == ("state.act", "Discrete(5)", "5")
    assert "column 1" in str(e)


def test_debug_lets_clipping_clip() -> None:
    space = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,), np.float32), b=gym.spaces.MultiBinary(2))

    def acting(a: float, b: int) -> LambdaActor:
        def forward(obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
            act = {"a": torch.full((*fin.shape, 2), a), "b": torch.full((*fin.shape, 2), b)}
            return act, (), {"value": rew.clone()}

        return LambdaActor(forward)

    with same.rollout([SpaceEnv(BOX, space)], acting(7.0, 1), 3, debug=True) as batches:
        next(batches)
    assert first_error(ActorError, SpaceEnv(BOX, space), acting(float("nan"), 1), debug=True).leaf == "state.act['a']"


# -- a forward over many rows ----------------------------------------------------------------------------------------


class Layered(BaseActorModule):
    """Logits of a layer with something of its own in mid-way."""

    def __init__(self, middle: Callable[[Tensor], Tensor], nested: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.middle = middle
        self.nested = nested

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        logits = self.layer(self.middle(obs))
        nested = {"value": rew.clone(), "logits": {"a": [logits], "b": rew + 1} if self.nested else logits}
        return zeros(fin), (), nested


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(x.flatten(0, 1))).view_as(x)


def debugged(actor: BaseActorModule) -> Any:
    return same.rollout([CountingEnv(), CountingEnv({3: "trunc"}, column=1)], actor, 5, entropy=0, debug=True)


@pytest.mark.filterwarnings("ignore:the actor changed its buffer")
def test_debug_does_not_mind_dropout_and_batch_normalisation() -> None:
    for middle in (torch.nn.Dropout(0.5), Normed()):
        with debugged(Layered(middle)) as batches:
            next(batches)
            next(batches)


def test_debug_cannot_compare_what_is_always_random() -> None:
    with debugged(Layered(lambda x: x + torch.randn_like(x))) as batches:
        with pytest.warns(UserWarning, match="cannot be checked") as caught:
            next(batches)
        assert len(caught) == 1
        next(batches)


@pytest.mark.parametrize("nested", [False, True])
def test_debug_finds_a_forward_that_looks_at_other_rows(nested: bool) -> None:
    with debugged(Layered(lambda x: x + x.mean(0), nested=nested)) as batches, pytest.raises(ActorError) as e:
        next(batches)
    assert e.value.leaf == ("info['logits']['a'][0]" if nested else "info['logits']")
    assert "from that row alone" in str(e.value)
    assert "unroll" not in str(e.value)


def test_debug_wraps_what_a_forward_over_many_rows_raises() -> None:
    def middle(x: Tensor) -> Tensor:
        assert len(x) == 1, "one row only"
        return x

    with debugged(Layered(middle)) as batches, pytest.raises(ActorError, match="5 rows raised AssertionError") as e:
        next(batches)
    assert isinstance(e.value.__cause__, AssertionError)


def test_debug_finds_a_forward_of_another_shape() -> None:
    with debugged(Layered(lambda x: x[:1])) as batches, pytest.raises(ActorError) as e:
        next(batches)
    assert (e.value.leaf, e.value.expected, e.value.found) == ("info['logits']", "[5, 2, 2]", "[1, 2, 2]")

    class Changing(Layered):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            actions, hx, info = super().forward(*args, **kwargs)
            return actions, hx, info if len(actions) == 1 else {**info, "logits": [info["logits"]]}

    with debugged(Changing(lambda x: x)) as batches, pytest.raises(ActorError) as e:
        next(batches)
    assert e.value.leaf == "info['logits']"
    assert "nests" in str(e.value)


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_refuses_an_environment_that_comes_twice() -> None:
    env = CountingEnv({2: "term"})
    with pytest.raises(ConfigError, match="twice"):
        evaluate([env, env], CountingActor())


@pytest.mark.parametrize("n", [1.5, 2.0, True, "3", 0])
def test_evaluate_takes_whole_steps(n: Any) -> None:
    with pytest.raises(ConfigError, match="n_steps"):
        evaluate([CountingEnv()], CountingActor(), n_steps=n)


def test_evaluate_gives_rewards_as_they_came() -> None:
    rewards = evaluate([SpoiltEnv(1, lambda r: (r[0], 0.1, *r[2:])), CountingEnv()], CountingActor(), n_steps=3)
    assert [r.tolist() for r in rewards] == [[0.1, 1], [2, 2], [3, 3]]


# -- shortened steps --------------------------------------------------------------------------------------------------


class Strict(gym.wrappers.OrderEnforcing[Any, Any]):
    """One's own kind of it, which may do more."""


def test_steps_pass_by_a_check_that_was_passed() -> None:
    plain, short = (gym.make("CartPole-v1", max_episode_steps=9) for _ in range(2))
    assert np.array_equal(plain.reset(seed=3)[0], short.reset(seed=3)[0])
    assert not shorten(short)  # the checker wants to see two steps first
    order = short.env  # type: ignore[attr-defined]  # TimeLimit around OrderEnforcing around the checker
    assert isinstance(order, gym.wrappers.OrderEnforcing)
    assert order.step == order.env.step
    for n in range(20):
        if n == 1:
            assert shorten(short)
            assert order.step == short.unwrapped.step
        for t in range(9):
            (x, *rest), (y, *others) = plain.step(t % 2), short.step(t % 2)
            assert np.array_equal(x, y)
            assert rest == others
        assert np.array_equal(plain.reset()[0], short.reset()[0])
    plain.close()
    short.close()


def test_other_wrappers_and_unused_environments_are_left_alone() -> None:
    strict, fresh = Strict(CountingEnv()), gym.wrappers.OrderEnforcing(CountingEnv())
    strict.reset()
    for env in (strict, fresh):
        shorten(env)
        assert "step" not in vars(env)
    with pytest.raises(gym.error.ResetNeeded):
        fresh.step(0)


def test_the_loop_shortens_the_steps_of_its_environments() -> None:
    envs = [gym.make("CartPole-v1") for _ in range(2)]
    with same.rollout(envs, RandomActor(2), 4, 2, close=True) as it:
        next(it)
        assert all(env.env.step == env.unwrapped.step for env in envs)  # type: ignore[attr-defined]
