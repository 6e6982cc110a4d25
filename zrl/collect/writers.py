"""Between an environment's values and the rows of a slot: observations in, actions out, each with its checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import optree

from zrl.collect.bounds import check_bounds
from zrl.data.fragment import Array, Row
from zrl.data.spec import ArraySpec, flatten, tree_paths
from zrl.errors import ActorError, EnvError

_RANK = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}  # a value may move to a kind of at least its rank


class LeafWriter:
    """Writes one leaf of all columns into its row, and refuses what does not belong there.

    The fast path is one `numpy.concatenate` that casts nothing; only when it fails does anybody look closer.

    Args:
        spec: dtype and shape of one column.
        path: of the leaf, for messages.
        n: number of columns.
        debug: refuse every cast of arrays, and observations that are not finite.
        declared: the dtype was asked for by the user (a declared info key): casts that fit need no warning.
    """

    def __init__(self, spec: ArraySpec, path: str, n: int, *, debug: bool, declared: bool = False) -> None:
        self.path = path
        self.shape = spec.shape
        self.dtype = np.dtype(spec.dtype)
        self.write: Callable[[Sequence[Any], Array, Array], None]
        self.write = self._write_each if debug else self._write_arrays if spec.shape else self._write_scalars
        self._lengths = [spec.shape[0]] * n if spec.shape else []
        self._scalars = (n,)
        self._declared = declared
        self._strict = debug and not declared
        self._warned = declared

    def _write_arrays(self, values: Sequence[Any], row: Array, flat: Array) -> None:
        try:
            # concatenate itself refuses other dtypes, other numbers of axes, other lengths of all axes but the first
            if list(map(len, values)) == self._lengths:
                np.concatenate(values, 0, flat, casting="no")
                return
        except Exception:  # what has a length may raise anything; column by column it gets a name
            pass
        self._write_each(values, row, flat)

    def _write_cast(self, values: Sequence[Any], row: Array, flat: Array) -> None:
        """`_write_arrays` once another width of floats was let pass; other kinds are refused as ever."""
        try:
            kinds = {x.dtype.kind for x in values}
            if kinds == {self.dtype.kind} and list(map(len, values)) == self._lengths:
                np.concatenate(values, 0, flat, casting="same_kind")
                return
        except Exception:
            pass
        self._write_each(values, row, flat)

    def _write_scalars(self, values: Sequence[Any], row: Array, flat: Array) -> None:
        try:
            a = np.array(values)
        except Exception:  # columns of different shapes, or worse
            a = np.empty(0)
        if a.dtype == self.dtype and a.shape == self._scalars:
            row[:] = a
            return
        self._write_each(values, row, flat)

    def _write_each(self, values: Sequence[Any], row: Array, flat: Array) -> None:
        for j, x in enumerate(values):
            self.write_one(j, x, row)

    def write_one(self, j: int, x: Any, row: Array, phase: str = "step") -> None:
        """Write column `j`, with every check.

        Raises:
            EnvError: no array, another shape, a dtype that cannot be cast, or under debug not finite.
        """
        try:
            a = np.asarray(x)
        except Exception as e:
            raise self._refusal(j, phase, f"something that is no array ({first_line(e)})") from e
        if a.shape != self.shape:
            raise self._refusal(j, phase, f"{a.dtype}{list(a.shape)}")
        if a.dtype is not self.dtype and a.dtype != self.dtype:
            self._check_cast(j, x, a, phase)
        if self._strict and a.dtype.kind in "fc" and not np.isfinite(a).all():
            raise self._refusal(j, phase, "NaN or inf", "an observation is not finite", "finite numbers")
        row[j] = a

    def _check_cast(self, j: int, x: Any, a: Array, phase: str) -> None:
        """Let a value of another width pass if it fits; say so once."""
        if problem := cast_problem(x, a, self.dtype, declared=self._declared):
            raise self._refusal(j, phase, problem)
        if not hasattr(x, "dtype"):  # Python numbers have no dtype to get wrong
            return
        if self._strict:
            raise self._refusal(j, phase, f"{a.dtype}{list(a.shape)}")
        if self.shape and self.dtype.kind in "fc":
            self.write = self._write_cast  # not for integers: their limits are looked at every time
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"environment {j}: {self.path} is {a.dtype}, its space says {self.dtype}; it is cast at every step",
                stacklevel=2,
            )

    def _refusal(self, j: int, phase: str, found: str, what: str = "", expected: str = "") -> EnvError:
        usual = "an info value does not fit its declaration" if self._declared else "an observation does not fit its"
        return EnvError(
            what or (usual if self._declared else f"{usual} record"),
            env_index=j,
            phase=phase,
            leaf=self.path,
            expected=expected or f"{self.dtype}{list(self.shape)}",
            found=found,
        )


def cast_problem(x: Any, a: Array, dtype: np.dtype[Any], *, declared: bool = False) -> str:
    """Why `x`, as the array `a`, cannot be cast to `dtype`; empty if it can.

    An array may change its width, if its values fit, but not its kind: an integer where floats belong is a mistake.
    Python numbers, and values whose dtype the user has `declared`, may also move from bool to integer to float to
    complex.
    """
    kind = _RANK.get(a.dtype.kind)
    wanted = _RANK[dtype.kind]
    may_rise = declared or not hasattr(x, "dtype")
    if not (a.size or hasattr(x, "dtype")):  # an empty list is of no kind
        return ""
    if kind is None or kind > wanted or (kind != wanted and not may_rise):
        return f"{a.dtype}{list(a.shape)}"
    if dtype.kind in "ui" and a.size:
        limits = np.iinfo(dtype)
        if a.min() < limits.min or a.max() > limits.max:
            return f"a value outside of {limits.min} to {limits.max}"
    return ""


class ObsWriter:
    """Writes whole observations, nested as the environment nests them.

    Args:
        specs: tree of `ArraySpec`.
        n: number of columns.
        debug: see `LeafWriter`; and check every observation against `space`, where there is one.
    """

    def __init__(self, specs: Any, n: int, *, debug: bool, space: gym.Space[Any] | None = None) -> None:
        leaves, self._tree = flatten(specs)
        paths = tree_paths(self._tree, "state.obs")
        self.leaves = [LeafWriter(s, p, n, debug=debug) for s, p in zip(leaves, paths, strict=True)]
        self._flat = self._tree.is_leaf()
        self._space = space if debug else None

    def write(self, observations: Sequence[Any], row: Row) -> None:
        """All columns into `row`."""
        if self._space is not None:
            for j, obs in enumerate(observations):
                self.write_one(j, obs, row.obs)
            return
        if self._flat:
            self.leaves[0].write(observations, row.obs[0], row.obs_flat[0])
            return
        try:
            columns = zip(*map(self._tree.flatten_up_to, observations), strict=True)
        except (ValueError, TypeError):
            for j, obs in enumerate(observations):
                self.split(j, obs)
            raise
        for leaf, values, a, flat in zip(self.leaves, columns, row.obs, row.obs_flat, strict=True):
            leaf.write(values, a, flat)

    def write_one(self, j: int, obs: Any, arrays: Sequence[Array], phase: str = "step") -> None:
        """Column `j` of one array ``[B, ...]`` per leaf."""
        values = [obs] if self._flat else self.split(j, obs, phase)
        for leaf, x, a in zip(self.leaves, values, arrays, strict=True):
            leaf.write_one(j, x, a, phase)
        if self._space is not None:
            check_bounds(self._space, obs, j, phase)

    def split(self, j: int, obs: Any, phase: str = "step") -> list[Any]:
        """The leaves of one observation.

        Raises:
            EnvError: it is nested in another way than the first one was.
        """
        try:
            return self._tree.flatten_up_to(obs)
        except (ValueError, TypeError) as e:
            raise other_nesting(j, obs, phase, self._tree) from e


def other_nesting(j: int, obs: Any, phase: str, tree: optree.PyTreeSpec) -> EnvError:
    """The error for an observation that is not nested like `tree`."""
    return EnvError(
        "an observation is nested in another way than the first one",
        env_index=j,
        phase=phase,
        leaf="state.obs",
        expected=nesting(tree),
        found=nesting_of(obs),
    )


def nesting(tree: optree.PyTreeSpec) -> str:
    """A structure in words of Python, with ``*`` for every leaf: ``{'at': (*, *), 'seen': *}``."""
    return str(tree).removeprefix("PyTreeSpec(").removesuffix(")").removesuffix(", NoneIsLeaf")


def nesting_of(x: Any) -> str:
    """`nesting` of a value; of a single leaf its type."""
    tree = flatten(x)[1]
    return type(x).__name__ if tree.is_leaf() else nesting(tree)


def first_line(e: BaseException) -> str:
    """The first line of an exception's text: what fits into one of ours."""
    return str(e).partition("\n")[0] or type(e).__name__


class ActionReader:
    """Turns a row of recorded actions into what every environment takes: clipped and cast copies."""

    def __init__(self, spaces: Any) -> None:
        self._spaces, self._tree = optree.tree_flatten(spaces)
        self._leaves = [_leaf_reader(space) for space in self._spaces]
        self._flat = self._tree.is_leaf()

    def __call__(self, arrays: Sequence[Array], wanted: Iterable[int] | None = None) -> list[Any]:
        """One action a column from one array ``[B, ...]`` per leaf; if only some are `wanted`, others may be None."""
        if self._flat:
            return self._leaves[0](arrays[0])
        columns = zip(*(read(a) for read, a in zip(self._leaves, arrays, strict=True)), strict=True)
        return [self._tree.unflatten(parts) for parts in columns]

    def check(self, arrays: Sequence[Array], columns: Iterable[int]) -> None:
        """Look whether the space contains every action of `columns`; a Box only refuses what clipping leaves outside.

        Raises:
            ActorError: naming the leaf and the column.
        """
        paths = tree_paths(self._tree, "state.act")
        for path, space, read, a in zip(paths, self._spaces, self._leaves, arrays, strict=True):
            taken = read(a) if isinstance(space, gym.spaces.Box) else a
            for j in columns:
                if not space.contains(taken[j]):
                    raise ActorError(
                        f"the action of column {j} is outside of its space",
                        leaf=path,
                        expected=str(space),
                        found=str(a[j].tolist()),
                    )


def _leaf_reader(space: gym.Space[Any]) -> Callable[[Array], list[Any]]:
    dtype = np.dtype(space.dtype)
    if isinstance(space, gym.spaces.Discrete):
        return lambda a: a.tolist()
    if isinstance(space, gym.spaces.Box):
        low, high = space.low, space.high
        if not space.shape:  # arrays, not the NumPy scalars that `list` makes
            return lambda a: [np.asarray(x) for x in np.clip(a, low, high).astype(dtype)]
        if np.isfinite(low).any() or np.isfinite(high).any():
            return lambda a: list(np.clip(a, low, high).astype(dtype, copy=False))
    # copies: an environment may keep its action, or write into it
    return lambda a: list(a.astype(dtype))
