"""Spaces of every kind, an environment and an actor for any of them, and what must become of their values in a record.

`recorded` and `decoded` say it anew, from the words of the documentation. `Replay` plays an environment of `EchoEnv`
again, and compares with batches whatever collected them.
"""

from __future__ import annotations

import copy
import os
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle  # type: ignore[import-untyped]
import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from tests.toys import SpaceEnv, StepResult
from zrl import BaseActorModule, Batch
from zrl.data.fragment import map_leaves
from zrl.data.spec import DTYPES

s = gym.spaces
LIMIT = 3  # steps of an episode
REAL = sorted(dtype for dtype in DTYPES if not dtype.startswith("complex"))  # those that a Box may have
NAMED: list[Any] = [namedtuple(f"Named{n}", [f"f{i}" for i in range(n)]) for n in range(4)]


class Nest(NamedTuple):
    """A space, and how an environment shows its samples."""

    space: gym.Space[Any]
    show: Callable[[Any], Any]


def leaf(space: gym.Space[Any]) -> Nest:
    return Nest(space, lambda x: x)


def dictionary(parts: dict[str, Nest]) -> Nest:
    space = s.Dict({key: nest.space for key, nest in parts.items()})
    return Nest(space, lambda x: {key: nest.show(x[key]) for key, nest in parts.items()})


def sequence(parts: list[Nest], kind: str) -> Nest:
    def show(x: Any) -> Any:
        items = [nest.show(y) for nest, y in zip(parts, x, strict=True)]
        return NAMED[len(items)](*items) if kind == "named" else tuple(items) if kind == "tuple" else items

    return Nest(s.Tuple([nest.space for nest in parts]), show)


def choice(parts: list[Nest]) -> Nest:
    return Nest(s.OneOf([nest.space for nest in parts]), lambda x: (x[0], parts[x[0]].show(x[1])))


def leaves(space: gym.Space[Any]) -> Iterator[gym.Space[Any]]:
    if isinstance(space, s.Dict):
        for sub in space.spaces.values():
            yield from leaves(sub)
    elif isinstance(space, s.Tuple):
        for sub in space.spaces:
            yield from leaves(sub)
    else:
        yield space


# -- what must be recorded -------------------------------------------------------------------------------------------


def recorded(space: Any, x: Any, *, chosen: bool = False) -> Any:
    """What must be in the record of a value, in the record's dtypes; `chosen`: inside of a OneOf."""
    if isinstance(space, s.Dict):
        parts = {key: recorded(space[key], x[key], chosen=chosen) for key in x}
        return parts if chosen else type(x)(parts)
    if isinstance(space, s.Tuple):
        items = [recorded(sub, y, chosen=chosen) for sub, y in zip(space.spaces, x, strict=True)]
        return tuple(items) if chosen else type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(space, s.OneOf):
        index, value = x
        alternatives = [absent(sub) for sub in space.spaces]
        alternatives[index] = recorded(space.spaces[index], value, chosen=True)
        return np.int64(index), tuple(alternatives)
    if isinstance(space, s.Text):
        codes = [sorted(space.character_set).index(c) for c in x]
        return np.array(codes + [len(space.character_set)] * (space.max_length - len(x)), np.int32)
    return np.asarray(x, space.dtype)


def absent(space: Any) -> Any:
    """What stands for an alternative that was not chosen."""
    if isinstance(space, s.Dict):
        return {key: absent(sub) for key, sub in space.spaces.items()}
    if isinstance(space, s.Tuple):
        return tuple(absent(sub) for sub in space.spaces)
    if isinstance(space, s.OneOf):
        return np.int64(0), tuple(absent(sub) for sub in space.spaces)
    if isinstance(space, s.Text):
        return np.full(space.max_length, len(space.character_set), np.int32)
    return np.full(space.shape, getattr(space, "start", 0), space.dtype)


def decoded(space: Any, a: Any) -> Any:
    """What the environment must get for a recorded action."""
    if isinstance(space, s.Dict):
        return {key: decoded(sub, a[key]) for key, sub in space.spaces.items()}
    if isinstance(space, s.Tuple):
        return tuple(decoded(sub, x) for sub, x in zip(space.spaces, a, strict=True))
    if isinstance(space, s.OneOf):
        return int(a[0]), decoded(space[int(a[0])], a[1][int(a[0])])
    if isinstance(space, s.Text):
        return "".join(sorted(space.character_set)[code] for code in a.tolist() if code < len(space.character_set))
    if isinstance(space, s.Discrete):
        return int(a)
    x = np.asarray(a)
    return np.asarray(np.clip(x, space.low, space.high) if isinstance(space, s.Box) else x, space.dtype)


def assert_alike(x: Any, y: Any) -> None:
    """The same containers, all the way down; not dicts for namedtuples, nor lists for tuples. From another process a
    namedtuple comes as one of the same name and fields."""
    if isinstance(y, (dict, list, tuple)):
        assert type(x).__name__ == type(y).__name__
        assert getattr(x, "_fields", ()) == getattr(y, "_fields", ())
        assert len(x) == len(y)
        if isinstance(y, dict):
            assert set(x) == set(y)
            for key in y:
                assert_alike(x[key], y[key])
        else:
            for a, b in zip(x, y, strict=True):
                assert_alike(a, b)
    else:
        assert not isinstance(x, (dict, list, tuple))


def assert_equal(x: Any, y: Any) -> None:
    """The same containers, with the same dtypes, shapes and bits in them."""
    assert_alike(x, y)
    found: list[Any] = []
    map_leaves(found.append, x)
    expected: list[Any] = []
    map_leaves(expected.append, y)
    for a, b in zip(map(np.asarray, found), map(np.asarray, expected), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), (a, b)


def entry(field: Any, t: int, j: int) -> Any:
    """Row t of column j."""
    return map_leaves(lambda x: x[t, j], field)


# -- environment and actor -------------------------------------------------------------------------------------------


class EchoEnv(SpaceEnv):
    """Observes ``{"did": the action as it came, "seen": a sample}``; what it "did" before a reset is a sample too.

    With its seed alone, and the actions, everything it returns can be had again.
    """

    def __init__(self, seen: Nest, act: gym.Space[Any]) -> None:
        space = s.Dict({"did": copy.deepcopy(act), "seen": copy.deepcopy(seen.space)})

        def shown(x: Any) -> dict[str, Any]:
            return {"did": x["did"], "seen": seen.show(x["seen"])}

        super().__init__(space, copy.deepcopy(act), limit=LIMIT, shown=shown)

    def step(self, action: Any) -> StepResult:
        obs, *rest = super().step(action)
        obs["did"] = action
        info = {"at": self.at, "none": np.zeros((2, 0), np.uint16), "odd": [self.at % 2 == 1]}
        return (obs, *rest[:-1], info)


def draw(space: Any, lead: torch.Size) -> Any:
    """Actions as an actor samples them: of alternatives that are not chosen too, and outside of the bounds of Boxes."""
    if isinstance(space, s.Dict):
        return {key: draw(sub, lead) for key, sub in space.spaces.items()}
    if isinstance(space, s.Tuple):
        return tuple(draw(sub, lead) for sub in space.spaces)
    if isinstance(space, s.OneOf):
        return torch.randint(len(space), lead), tuple(draw(sub, lead) for sub in space.spaces)
    if isinstance(space, s.Text):
        n, most = len(space.character_set), space.max_length
        lengths = torch.randint(space.min_length, most + 1, (*lead, 1))
        return torch.randint(n, (*lead, most)).masked_fill(torch.arange(most) >= lengths, n)
    if isinstance(space, s.Discrete):
        return torch.randint(int(space.start), int(space.start + space.n), lead)
    if isinstance(space, s.MultiDiscrete):
        each = [torch.randint(int(a), int(a + n), lead) for a, n in zip(space.start.flat, space.nvec.flat, strict=True)]
        return torch.stack(each, -1).view(*lead, *space.shape)
    if isinstance(space, s.MultiBinary):
        return torch.randint(2, (*lead, *space.shape))
    assert isinstance(space, s.Box)
    x = 3 * torch.randn(*lead, *space.shape)
    return x if np.dtype(space.dtype).kind == "f" else x.long()


class AnyActor(BaseActorModule):
    """Actions for any space; its info and its state hold what it saw, nested as it saw it, and leaves without size."""

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        self.space = space

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        saw = map_leaves(lambda x: x[-1:].clone(), {"obs": obs, "act": act})
        n = fin.shape[1]
        state = {"saw": saw, "no layer": torch.zeros(0, n, 2), "empty": [torch.zeros(1, n, 0, dtype=torch.int16)]}
        info = {
            "value": rew.clone(),
            "saw": {"obs": obs, "act": act},
            "more": NAMED[3](torch.zeros(*fin.shape, 0, 2), [fin.clone()], (fin.short(), {"x": rew.double()})),
        }
        return draw(self.space, fin.shape), state, info


# -- the same again --------------------------------------------------------------------------------------------------


class Replay:
    """Plays the columns of one worker anew, and compares each fragment with that; they come in their order.

    Args:
        envs: new ones, one a column.
        seeds: of these columns.
    """

    def __init__(self, envs: list[EchoEnv], seeds: list[int]) -> None:
        self.envs = envs
        self.rows: list[Any] = []  # the last observation by column, as it must be recorded
        for env, seed in zip(envs, seeds, strict=True):
            env.action_space.seed(seed)
            self.rows.append(recorded(env.observation_space, env.reset(seed=seed)[0]))

    def check(self, batch: Batch, first: int = 0) -> None:
        """The fragment in the columns of `batch` from `first` on; it must have `final_obs` and `env`."""
        assert batch.env is not None
        for k, env in enumerate(self.envs):
            j, row = first + k, self.rows[k]
            assert_equal(entry(batch.state.obs, 0, j), row)
            for t in range(len(batch.mask)):
                if batch.mask[t, j]:
                    row = self._step(env, batch, t, j)
                assert_equal(entry(batch.state.obs, t + 1, j), row)
            self.rows[k] = row

    def _step(self, env: EchoEnv, batch: Batch, t: int, j: int) -> Any:
        action = decoded(env.action_space, entry(batch.state.act, t + 1, j))
        obs, _, _, truncated, info = env.step(action)
        assert batch.env is not None
        for key, x in info.items():
            assert_equal(batch.env[key][t, j], np.asarray(x))
        row = recorded(env.observation_space, obs)
        assert bool(batch.state.fin[t + 1, j]) == truncated
        if not truncated:
            return row
        assert_equal(entry(batch.final_obs, t + 1, j), row)
        return recorded(env.observation_space, env.reset()[0])


INFO_KEYS = {"at": int, "none": s.Box(0, 9, (2, 0), np.uint16), "odd": np.zeros(1, bool)}


# -- one environment with all of it ----------------------------------------------------------------------------------


def everything(width: int = 3) -> Nest:
    """All spaces at once, in all containers; one Box is as wide as told."""
    box = leaf(s.Box(-9, 9, (width,), np.float32))
    text, short = leaf(s.Text(6, min_length=0)), leaf(s.Text(2, charset="zyx"))
    whole = sequence([leaf(s.Discrete(3, start=-1)), leaf(s.MultiDiscrete([2, 5])), leaf(s.MultiBinary(3))], "named")
    each = {name: leaf(s.Box(0, 1, (2,), np.dtype(name))) for name in REAL}
    sizes = [leaf(s.Box(0, 9, shape, np.int32)) for shape in ((), (0,), (3, 0))]
    inner = choice([short, sequence([box, text], "list"), dictionary({"b": whole, "a": box})])
    return dictionary(
        {
            "box": box,
            "choice": choice([leaf(s.Discrete(2)), inner, sequence([], "tuple")]),
            "dtypes": dictionary(each),
            "number": Nest(s.Discrete(5), int),
            "sizes": sequence(sizes, "list"),
            "texts": sequence([text, short], "tuple"),
            "whole": whole,
        }
    )


def every_env() -> EchoEnv:
    """Everything to be observed, and to be done; as wide as the environment variable ZRL_TEST_WIDTH says."""
    return EchoEnv(everything(int(os.environ.get("ZRL_TEST_WIDTH", "3"))), everything().space)


def any_actor(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> AnyActor:
    return AnyActor(action_space)


def drawn_env() -> EchoEnv:
    """Of two `Nest`s, to be observed and to be done, in the file that ZRL_TEST_NESTS names."""
    seen, act = cloudpickle.loads(Path(os.environ["ZRL_TEST_NESTS"]).read_bytes())
    return EchoEnv(seen, act.space)


for _name, _make in (("tests/Every-v0", every_env), ("tests/Drawn-v0", drawn_env)):
    if _name not in gym.registry:
        made: Any = _make
        gym.register(_name, entry_point=made)
