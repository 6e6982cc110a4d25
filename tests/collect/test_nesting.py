"""Observations, actions, infos and states of any space and nesting: what goes in comes out, bit for bit."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.spaces import (
    INFO_KEYS,
    NAMED,
    REAL,
    AnyActor,
    EchoEnv,
    Nest,
    Replay,
    assert_alike,
    assert_equal,
    choice,
    dictionary,
    entry,
    leaf,
    leaves,
    recorded,
    sequence,
)
from tests.toys import CountingEnv, LambdaActor
from zrl import Batch
from zrl.collect.streams import env_seeds
from zrl.data.fragment import map_leaves
from zrl.data.spec import DTYPES
from zrl.rollout import multi, same

T, B = 4, 2
s = gym.spaces


def boxes(dtype: str, shape: tuple[int, ...], how: str) -> Nest:
    """A Box, whose samples are shown as they are, as plain Python, or as the strangest values of their dtype."""
    signed = dtype.startswith(("int", "float"))
    space: Any = s.Box(-1 if signed else 0, 1 if dtype == "bool" else 9, shape, np.dtype(dtype))
    odd = {"u": [0, -1], "i": [-1, 0], "b": [True], "f": [np.nan, -0.0, np.inf, -np.inf]}[space.dtype.kind]

    def strange(x: Any) -> Any:
        limits = [] if space.dtype.kind in "bf" else [np.iinfo(dtype).min, np.iinfo(dtype).max]
        return np.resize(np.array(limits or odd, dtype), shape)

    return Nest(space, {"as it is": lambda x: x, "plain": lambda x: x.tolist(), "strange": strange}[how])


SHAPES = st.sampled_from([(), (2,), (0,), (3, 0), (2, 1, 3)])
BOXES = st.builds(boxes, st.sampled_from(REAL), SHAPES, st.sampled_from(["as it is", "plain", "strange"]))
OTHERS = st.sampled_from(
    [
        leaf(s.Discrete(4)),
        leaf(s.Discrete(3, start=-5)),
        Nest(s.Discrete(4), lambda x: x.item()),
        leaf(s.MultiDiscrete([2, 5])),
        leaf(s.MultiDiscrete(np.array([[2, 5], [3, 3]]), start=np.array([[1, -1], [0, 7]]))),
        leaf(s.MultiBinary(3)),
        leaf(s.MultiBinary((2, 2))),
        leaf(s.Text(4)),
        leaf(s.Text(3, min_length=0, charset="zyx")),
        leaf(s.Text(1, charset="é")),
        Nest(s.Text(2), np.str_),
    ]
)
KEYS = st.sampled_from(["b", "a", "a key", "B", "_", "0"])


def nests(kinds: list[str]) -> st.SearchStrategy[Nest]:
    """Trees over all spaces; the tuples of the space are shown as one of `kinds`."""

    def extend(inner: st.SearchStrategy[Nest]) -> st.SearchStrategy[Nest]:
        sequences = st.builds(sequence, st.lists(inner, max_size=3), st.sampled_from(kinds))
        choices = st.builds(choice, st.lists(inner, min_size=1, max_size=3))
        return st.builds(dictionary, st.dictionaries(KEYS, inner, max_size=3)) | sequences | choices

    return st.recursive(BOXES | OTHERS, extend, max_leaves=6).filter(lambda nest: any(True for _ in leaves(nest.space)))


def batches(how: str, seen: Nest, act: Nest, sticky: bool) -> list[Batch]:
    def factory() -> EchoEnv:
        return EchoEnv(seen, act.space)

    actor, n, more = AnyActor(act.space), 2, {"sticky": sticky, "keep_final_obs": True, "info_keys": INFO_KEYS}
    it: Any
    if how == "same":
        it = same.rollout(factory, actor, T, B, entropy=1, **more)  # type: ignore[arg-type]
    else:
        it = multi.rollout(factory, actor, T, 1, B, 2, 1, entropy=1, start_method="inline", **more)  # type: ignore[arg-type]
    with it:
        return [batch.clone() for batch in itertools.islice(it, n)]


def acted_on(x: Tensor, hidden: Any) -> Any:
    """What the actor saw of an observation or action: rows 0 to T-1, and 0 where nobody acted."""
    a = x[:-1].numpy().copy()
    a[hidden] = 0
    return a


@settings(max_examples=80, derandomize=True)
@given(
    how=st.sampled_from(["same", "inline"]),
    seen=nests(["tuple", "list", "named"]),
    act=nests(["tuple"]),
    sticky=st.booleans(),
)
def test_what_goes_in_comes_out(how: str, seen: Nest, act: Nest, sticky: bool) -> None:
    replay = Replay([EchoEnv(seen, act.space) for _ in range(B)], env_seeds(1, 0, 0, B))
    shown = recorded(replay.envs[0].observation_space, replay.envs[0].given[0])
    for batch in batches(how, seen, act, sticky):
        replay.check(batch)
        assert_alike(batch.hx["saw"], {"obs": shown, "act": recorded(act.space, act.space.sample(), chosen=True)})
        kept = {"obs": batch.state.obs, "act": batch.state.act}
        assert_equal(batch.actor["saw"], map_leaves(partial(acted_on, hidden=~batch.mask.numpy()), kept))
        assert_alike(batch.actor["more"], NAMED[3](0, [0], (0, {"x": 0})))


def test_without_an_observation_space_the_first_observation_says_it_all() -> None:
    """All dtypes, in all containers, and plain numbers; so they go through the actor's info and state too."""
    names = sorted(DTYPES)
    shown = NAMED[3](
        {name: np.array([k % 2, 1], name) for k, name in enumerate(names)},
        [True, 3, 0.5, 1j, np.zeros((0, 2), np.int8)],
        OrderedDict(b=np.float32(2), a=(np.zeros((), np.uint64),)),
    )

    class Unstated(CountingEnv):
        observation_space: Any = None

        def __init__(self) -> None:
            super().__init__(limit=3)
            self.observation_space = None

        def observe(self) -> Any:
            return shown

    def forward(obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Any:
        last = map_leaves(lambda x: x[-1:].clone(), obs)
        return torch.zeros(fin.shape, dtype=torch.int64), last, {"value": rew.clone(), "obs": obs}

    with same.rollout(Unstated, LambdaActor(forward), 4, 1, debug=True, keep_final_obs=True) as it:
        batch = next(it)
    expected = map_leaves(np.asarray, shown)
    for row in (entry(batch.state.obs, 2, 0), entry(batch.actor["obs"], 1, 0), entry(batch.final_obs, 3, 0)):
        assert_equal(row, expected)
    assert_alike(batch.hx, shown)
    assert [x.dtype for x in batch.hx[0].values()] == [getattr(torch, name) for name in names]
