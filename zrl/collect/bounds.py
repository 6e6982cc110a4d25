"""Observations and actions against their space, leaf by leaf: the record alone says nothing of bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import optree

from zrl.data.fragment import Array
from zrl.errors import ActorError, EnvError

MOST_TEXT = 200  # characters of a space or a value in a message


def check_bounds(space: gym.Space[Any], obs: Any, env_index: int, phase: str, path: str = "state.obs") -> None:
    """Look whether the space contains an observation that has been written into the record: containers, dtypes and
    shapes fit, or could be cast.

    Raises:
        EnvError: naming the leaf, and of an array the first element outside.
    """
    if isinstance(space, gym.spaces.Dict):
        for key, sub in space.spaces.items():
            check_bounds(sub, obs[key], env_index, phase, f"{path}[{key!r}]")
        return
    if isinstance(space, gym.spaces.Tuple):
        named = optree.is_namedtuple_instance(obs)
        for i, (sub, x) in enumerate(zip(space.spaces, obs, strict=True)):
            check_bounds(sub, x, env_index, phase, f"{path}.{obs._fields[i]}" if named else f"{path}[{i}]")
        return
    bounds = _bounds(space)
    value = obs if bounds is None else np.asarray(obs, space.dtype)  # as it stands in the record
    if not space.contains(value):
        raise EnvError(
            "an observation is outside of its space",
            env_index=env_index,
            phase=phase,
            leaf=path,
            expected=f"{space!s:.{MOST_TEXT}}",
            found=f"{value!r:.{MOST_TEXT}}" if bounds is None else _first_outside(value, *bounds),
        )


def action_bounds(spaces: Any) -> list[tuple[Any, Any] | None]:
    """Of each leaf space of an action, the least and the greatest value of each element; None for a Box, which is
    clipped on the way into the environment, and for text."""
    leaves = optree.tree_leaves(spaces)
    return [None if isinstance(space, gym.spaces.Box) else _bounds(space) for space in leaves]


def check_actions(
    arrays: Sequence[Array], bounds: Sequence[tuple[Any, Any] | None], paths: Sequence[str], first_step: int
) -> None:
    """Refuse actions that the space does not have: many environments take what they are given.

    Args:
        arrays: ``[T, B, ...]`` a leaf, the actions of one fragment.
        bounds: as `action_bounds` gives them.
        paths: of the leaves.
        first_step: number of the step of the first row.

    Raises:
        ActorError: naming leaf, column and step of the first one.
    """
    for a, limits, path in zip(arrays, bounds, paths, strict=True):
        if limits is None or not a.size or ((a >= limits[0]) & (a <= limits[1])).all():
            continue
        t, j, *at = map(int, np.argwhere(~((a >= limits[0]) & (a <= limits[1])))[0])
        low, high = (np.broadcast_to(x, a.shape)[t, j, *at] for x in limits)
        raise ActorError(
            f"the action of step {first_step + t}, column {j}, is outside of its space",
            leaf=path,
            expected=f"{low} to {high}",
            found=str(a[t, j, *at]),
        )


def _bounds(space: gym.Space[Any]) -> tuple[Any, Any] | None:
    """Least and greatest value of each element, both inclusive; None for a space that is not one array."""
    if isinstance(space, gym.spaces.Box):
        return space.low, space.high
    if isinstance(space, gym.spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, gym.spaces.MultiBinary):
        return 0, 1
    return None


def _first_outside(value: Array, low: Any, high: Any) -> str:
    """The first element that is not within its bounds, and where it is."""
    low, high = np.broadcast_to(low, value.shape), np.broadcast_to(high, value.shape)
    outside = np.argwhere(~((value >= low) & (value <= high)))
    if not len(outside):  # what the space itself minds
        return f"{value!r:.{MOST_TEXT}}"
    at = tuple(int(i) for i in outside[0])
    where = f" at {list(at)}" if at else ""
    return f"{value[at]}{where}, where {low[at]} to {high[at]} is allowed"
