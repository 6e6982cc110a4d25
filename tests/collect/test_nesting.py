"""Observations, actions, infos and states of any nesting: what goes in comes out, with its containers."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.toys import SpaceEnv
from zrl import BaseActorModule
from zrl.data.fragment import map_leaves
from zrl.rollout import same

T, B, LIMIT = 4, 2, 3
NAMED = [namedtuple(f"Named{n}", [f"f{i}" for i in range(n)]) for n in range(4)]


class Nest(NamedTuple):
    """A space, and how an environment shows its samples."""

    space: gym.Space[Any]
    show: Callable[[Any], Any]


def leaf(space: gym.Space[Any]) -> Nest:
    return Nest(space, lambda x: x)


def scalar(space: gym.Space[Any]) -> Nest:
    """A Python number instead of an array."""
    return Nest(space, lambda x: x.item())


def dictionary(parts: dict[str, Nest]) -> Nest:
    space = gym.spaces.Dict({key: nest.space for key, nest in parts.items()})
    return Nest(space, lambda x: {key: nest.show(x[key]) for key, nest in parts.items()})


def sequence(parts: list[Nest], kind: str) -> Nest:
    def show(x: Any) -> Any:
        items = [nest.show(y) for nest, y in zip(parts, x, strict=True)]
        return NAMED[len(items)](*items) if kind == "named" else tuple(items) if kind == "tuple" else items

    return Nest(gym.spaces.Tuple([nest.space for nest in parts]), show)


box = gym.spaces.Box
LEAVES = st.sampled_from(
    [
        leaf(box(-1, 1, (), np.float32)),
        leaf(box(-1, 1, (2,), np.float32)),
        leaf(box(-1, 1, (2, 1, 3), np.float64)),
        leaf(box(0, 255, (2, 2), np.uint8)),
        leaf(box(-9, 9, (1,), np.int16)),
        leaf(gym.spaces.Discrete(4)),
        leaf(gym.spaces.Discrete(3, start=-5)),
        leaf(gym.spaces.MultiDiscrete([2, 5])),
        leaf(gym.spaces.MultiBinary(3)),
        leaf(gym.spaces.MultiBinary((2, 2))),
        scalar(gym.spaces.Discrete(4)),
        scalar(box(-1, 1, (), np.float32)),
    ]
)
KEYS = st.sampled_from(["b", "a", "a key", "B", "_", "0"])


def nests(kinds: list[str]) -> st.SearchStrategy[Nest]:
    """Trees over LEAVES; the tuples of the space are shown as one of `kinds`."""

    def extend(inner: st.SearchStrategy[Nest]) -> st.SearchStrategy[Nest]:
        sequences = st.builds(sequence, st.lists(inner, max_size=3), st.sampled_from(kinds))
        return st.builds(dictionary, st.dictionaries(KEYS, inner, max_size=3)) | sequences

    return st.recursive(LEAVES, extend, max_leaves=6).filter(lambda nest: any(True for _ in leaves(nest.space)))


def leaves(space: gym.Space[Any]) -> Iterator[gym.Space[Any]]:
    if isinstance(space, gym.spaces.Dict):
        for sub in space.spaces.values():
            yield from leaves(sub)
    elif isinstance(space, gym.spaces.Tuple):
        for sub in space.spaces:
            yield from leaves(sub)
    else:
        yield space


def tree(space: gym.Space[Any], fn: Callable[[gym.Space[Any]], Any]) -> Any:
    """Dicts and tuples over the leaves of a space."""
    if isinstance(space, gym.spaces.Dict):
        return {key: tree(sub, fn) for key, sub in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(tree(sub, fn) for sub in space.spaces)
    return fn(space)


def draw(space: gym.Space[Any], lead: torch.Size) -> Tensor:
    """Actions of a leaf, as an actor would sample them."""
    if isinstance(space, gym.spaces.Discrete):
        return torch.randint(int(space.start), int(space.start + space.n), lead)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return torch.stack([torch.randint(int(n), lead) for n in space.nvec], -1)
    if isinstance(space, gym.spaces.MultiBinary):
        return torch.randint(2, (*lead, *space.shape))
    assert isinstance(space, gym.spaces.Box)
    x = torch.rand(*lead, *space.shape)
    return x if space.dtype is not None and np.dtype(space.dtype).kind == "f" else (9 * x).long()


class AnyActor(BaseActorModule):
    """Actions for any space; its info and its state hold what it saw, nested as it saw it."""

    def __init__(self, space: gym.Space[Any], shown: Any) -> None:
        super().__init__()
        self.space, self.shown = space, shown

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        assert_alike(obs, self.shown)
        assert_alike(act, tree(self.space, lambda _: 0))
        last = map_leaves(lambda x: x[-1:].clone(), {"obs": obs, "act": act})
        actions = tree(self.space, lambda space: draw(space, fin.shape))
        return actions, last, {"value": rew.clone(), "saw": {"obs": obs, "act": act}}


def assert_alike(x: Any, y: Any) -> None:
    """The same containers, all the way down; not dicts for namedtuples, nor lists for tuples."""
    if isinstance(y, (dict, list, tuple)):
        assert type(x) is type(y)
        assert len(x) == len(y)
        if isinstance(y, dict):
            assert list(x) == list(y) or set(x) == set(y)
            for key in y:
                assert_alike(x[key], y[key])
        else:
            for a, b in zip(x, y, strict=True):
                assert_alike(a, b)
    else:
        assert not isinstance(x, (dict, list, tuple))


def assert_equal(x: Any, y: Any) -> None:
    """The same containers, with the same numbers in them."""
    assert_alike(x, y)
    found: list[Any] = []
    map_leaves(found.append, x)
    expected: list[Any] = []
    map_leaves(expected.append, y)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def entry(field: Any, t: int, j: int) -> Any:
    """Row t of column j."""
    return map_leaves(lambda x: x[t, j], field)


def played(env: SpaceEnv, skip: int) -> tuple[list[Any], dict[int, Any]]:
    """The observations in rows 0 to T, and the final ones by row, from all that the environment returned."""
    given = iter(env.given[skip:])
    rows, final, at = [next(given)], {}, 0
    for t in range(1, T + 1):
        x, at = next(given), at + 1
        if at == LIMIT:
            final[t], x, at = x, next(given), 0
        rows.append(x)
    assert next(given, None) is None
    return rows, final


@settings(max_examples=60, derandomize=True)
@given(obs=nests(["tuple", "list", "named"]), act=nests(["tuple"]), sticky=st.booleans())
def test_what_goes_in_comes_out(obs: Nest, act: Nest, sticky: bool) -> None:
    envs = [SpaceEnv(obs.space, act.space, limit=LIMIT, shown=obs.show) for _ in range(B)]
    shown = obs.show(obs.space.sample())
    with same.rollout(envs, AnyActor(act.space, shown), T, entropy=1, sticky=sticky, keep_final_obs=True) as batches:
        batch = next(batches)
    for j, env in enumerate(envs):
        env.given += [env.given[-1]] if sticky else []  # the row T that repeats its first observation
        rows, final = played(env, skip=1 if j == 0 else 0)
        for t in range(T + 1):
            assert_equal(entry(batch.state.obs, t, j), rows[t])
            if t in final:
                assert_equal(entry(batch.final_obs, t, j), final[t])
        for t, action in enumerate(env.actions):
            assert_equal(entry(batch.state.act, t + 1, j), action)
    assert_alike(batch.hx, {"obs": shown, "act": tree(act.space, lambda _: 0)})
    saw = {"obs": batch.state.obs, "act": batch.state.act}
    expected = map_leaves(lambda x: x[:-1] * batch.mask.view(T, B, *[1] * (x.dim() - 2)), saw)
    assert_equal(batch.actor["saw"], expected)
    # and a copy is nested in the same way
    assert_equal(batch.clone().state.obs, batch.state.obs)
    assert_equal(batch.clone().hx, batch.hx)
