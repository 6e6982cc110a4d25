"""Batched values of nested spaces: between the arrays ``[B, ...]`` of a vector environment and rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import optree

from zrl.collect.encoding import action_reader, is_encoded, obs_writer
from zrl.collect.spaces import EnvLayout
from zrl.data.fragment import Array, Row
from zrl.errors import EVERY, EnvError


class BatchWriter:
    """Writes batched observations, nested like single ones with arrays ``[B, ...]``, into rows.

    The fast path is one copy a leaf. Whatever is of another dtype or shape goes column by column, with the checks of
    plain environments; so does everything under debug, and text, which has no arrays.
    """

    def __init__(self, layout: EnvLayout, n: int, *, debug: bool) -> None:
        self._one = obs_writer(layout.obs, layout.observation_space, n, debug=debug)
        self._space, self._example = layout.observation_space, layout.example
        self._tree = optree.tree_structure(layout.obs, none_is_leaf=True)
        self._flat = self._tree.is_leaf()
        self._fast = not debug and not is_encoded(self._space)
        self._n = n

    def write(self, obs: Any, row: Row, phase: str = "step") -> None:
        """All columns into `row`."""
        leaves = self._leaves(obs, row.obs, 0)
        if leaves:
            for x, a in zip(leaves, row.obs, strict=True):
                a[:] = x
            return
        self._check_length(obs, phase)
        for j in range(self._n):
            self._one.write_one(j, column_of(self._space, obs, j), row.obs, phase)

    def write_some(self, obs: Any, rows: Array, columns: Array, arrays: Sequence[Array], phase: str = "reset") -> None:
        """Rows of `obs` into `columns` of one array ``[B, ...]`` per leaf."""
        leaves = self._leaves(obs, arrays, 1)
        if leaves:
            for x, a in zip(leaves, arrays, strict=True):
                a[columns] = x.take(rows, 0)  # five times as fast as x[rows]
            return
        for r, j in zip(rows.tolist(), columns.tolist(), strict=True):
            self._one.write_one(j, column_of(self._space, obs, r), arrays, phase)

    def write_each(self, observations: Any, columns: Array, arrays: Sequence[Array], phase: str) -> None:
        """Final observations: an array of objects, one a column, as the environments made them; or a usual batch."""
        if not (isinstance(observations, np.ndarray) and observations.dtype == object):
            self.write_some(observations, columns, columns, arrays, phase)
            return
        for j in columns.tolist():
            self._one.write_one(j, in_containers_of(self._example, observations[j]), arrays, phase)

    def _leaves(self, obs: Any, arrays: Sequence[Array], first: int) -> Sequence[Any]:
        """The leaves if they are arrays in dtype and shape of `arrays`, from axis `first` on; else none."""
        if not self._fast:
            return ()
        try:
            leaves = (obs,) if self._flat else self._tree.flatten_up_to(obs)
        except (ValueError, TypeError):
            return ()
        for x, a in zip(leaves, arrays, strict=True):
            if not isinstance(x, np.ndarray) or x.dtype != a.dtype or x.shape[first:] != a.shape[first:]:
                return ()
        return leaves

    def _check_length(self, obs: Any, phase: str) -> None:
        lengths = {len(x) for x in optree.tree_leaves(obs, none_is_leaf=True) if isinstance(x, np.ndarray) and x.ndim}
        if not is_encoded(self._space) and lengths - {self._n}:
            raise EnvError(
                "observations of another number of columns",
                env_index=EVERY,
                phase=phase,
                leaf="state.obs",
                expected=f"{self._n} rows in every array",
                found=f"{sorted(lengths)}",
            )


class BatchActions:
    """Turns a row of recorded actions into what a vector environment takes: clipped and cast copies, batched."""

    def __init__(self, layout: EnvLayout) -> None:
        self._reader = action_reader(layout.action_space, layout.act)
        self.check = self._reader.check
        self._space = layout.action_space
        spaces, self._tree = optree.tree_flatten(layout.act)
        self._flat = self._tree.is_leaf()
        self._leaves = [] if is_encoded(self._space) else [_cast(space) for space in spaces]

    def __call__(self, arrays: Sequence[Array]) -> Any:
        if not self._leaves:
            return batch_of(self._space, self._reader(arrays))
        if self._flat:
            return self._leaves[0](arrays[0])
        return self._tree.unflatten([cast(a) for cast, a in zip(self._leaves, arrays, strict=True)])


def _cast(space: gym.Space[Any]) -> Callable[[Array], Array]:
    dtype = np.dtype(space.dtype)
    if isinstance(space, gym.spaces.Box) and (np.isfinite(space.low).any() or np.isfinite(space.high).any()):
        low, high = space.low, space.high
        return lambda a: np.clip(a, low, high).astype(dtype, copy=False)
    return lambda a: a.astype(dtype)  # a copy: the environment may keep it, or write into it


def column_of(space: Any, batched: Any, j: int) -> Any:
    """Column `j` of batched values; `space` is that of one column."""
    if isinstance(space, gym.spaces.Dict):
        return type(batched)({key: column_of(sub, batched[key], j) for key, sub in space.spaces.items()})
    if isinstance(space, gym.spaces.Tuple):
        parts = [column_of(sub, x, j) for sub, x in zip(space.spaces, batched, strict=True)]
        return type(batched)(*parts) if hasattr(batched, "_fields") else type(batched)(parts)
    return batched[j]


def in_containers_of(example: Any, value: Any) -> Any:
    """`value` in the containers of `example`: batching makes plain dicts and tuples of whatever an environment has."""
    if isinstance(example, dict) and isinstance(value, Mapping) and example.keys() == value.keys():
        return type(example)({key: in_containers_of(example[key], value[key]) for key in example})
    if isinstance(example, tuple | list) and isinstance(value, tuple | list) and len(example) == len(value):
        parts = [in_containers_of(x, y) for x, y in zip(example, value, strict=True)]
        return type(example)(*parts) if hasattr(example, "_fields") else type(example)(parts)
    return value


def batch_of(space: Any, values: Sequence[Any]) -> Any:
    """Values of single columns as one batch: the inverse of `column_of`."""
    if isinstance(space, gym.spaces.Dict):
        return {key: batch_of(sub, [x[key] for x in values]) for key, sub in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(batch_of(sub, [x[i] for x in values]) for i, sub in enumerate(space.spaces))
    return tuple(values) if is_encoded(space) else np.stack([np.asarray(x, space.dtype) for x in values])
