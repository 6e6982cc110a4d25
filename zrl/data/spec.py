"""The specification of a fragment: which leaves it has, and where each lies in a slot.

A fragment is ``T`` steps (`n_steps`) of ``B`` environments (`n_columns`). It is a fixed set of *fields*; a field is a
tree (nested dicts, lists, tuples, namedtuples) of *leaves*; a leaf is one array ``[rows, B, ...]``:

======================  ====  =======  ======================================================================
field                   rows  dtype    holds, at row t and column j
======================  ====  =======  ======================================================================
``state.obs``           T+1   any      x_t: the observation to act on
``state.act``           T+1   any      a_{t-1}: the action that led here, as sampled
``state.rew``           T+1   float32  r_t: the reward of that step
``state.fin``           T+1   bool     d_t: that step ended the episode, by termination or truncation
``state.term``          T+1   bool     it ended by termination
``actor``               T     any      the info dict of the actor at t
``hx``                  L     any      h_0: the recurrent state at row 0, after the resets due to ``fin[0]``
``bootstrap``           1     float32  v(x_T)
``final_value``         T+1   float32  v(true final observation) where the step into row t was truncated, else 0
``mask``                T     bool     the action of row t was really taken
``ep_return``           T+1   float32  undiscounted return of the episode that the step into row t ended, else 0
``ep_length``           T+1   int32    its length in environment steps, else 0
``final_obs``           T+1   any      the true final observation where the step into row t ended an episode, else 0
``env``                 T     any      declared keys of the info dict of the step by a_t
======================  ====  =======  ======================================================================

Inside a slot all leaves are contiguous and 64-byte aligned. The same specification with other columns
(`FragmentSpec.with_columns`) describes a batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import optree

from zrl.data.structure import from_text, to_text
from zrl.errors import RecordError

#: The fields that every fragment has, in the order in which they lie in a slot.
ALWAYS = [
    *("state.obs", "state.act", "state.rew", "state.fin", "state.term", "actor", "hx"),
    *("bootstrap", "final_value", "mask", "ep_return", "ep_length"),
]
#: Those of them that are a single number a step and column, whatever environment and actor: their dtypes.
SCALARS = MappingProxyType(
    {
        **dict.fromkeys(("state.rew", "bootstrap", "final_value", "ep_return"), "float32"),
        **dict.fromkeys(("state.fin", "state.term", "mask"), "bool"),
        "ep_length": "int32",
    }
)
MOST_AXES = 30  # of a leaf: NumPy has 64, and views of a slot fold and add some
ALIGNMENT = 64  # bytes: a cache line, and what vectorised loads like best

#: The closed table of dtypes that a leaf may have. NumPy and torch both hold them.
DTYPES = frozenset(
    (
        *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)


def rows_of(field: str, n_steps: int) -> int:
    """Rows of the leaves of a field, ``hx`` excepted, in a fragment of `n_steps` steps."""
    if field == "bootstrap":
        return 1
    return n_steps if field in ("actor", "mask", "env") else n_steps + 1


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One leaf of one step of one environment: dtype, a name in `DTYPES`, and shape without ``[rows, B]``."""

    dtype: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecordError("dtype cannot be recorded", expected=f"one of {sorted(DTYPES)}", found=self.dtype)

    @classmethod
    def of(cls, x: Any) -> ArraySpec:
        """The specification of an array or Python scalar `x`."""
        a = np.asarray(x)
        return cls(a.dtype.name, a.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a slot: ``[rows, B, *shape]`` of `dtype`, `offset` bytes from the slot's start."""

    path: str
    dtype: str
    rows: int
    shape: tuple[int, ...]
    offset: int

    def full_shape(self, n_columns: int) -> tuple[int, ...]:
        return (self.rows, n_columns, *self.shape)

    def nbytes(self, n_columns: int) -> int:
        return math.prod(self.full_shape(n_columns)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Field:
    """A named tree of leaves; `first` is the index of its first leaf among all leaves of the specification."""

    name: str
    tree: optree.PyTreeSpec
    leaves: tuple[Leaf, ...]
    first: int

    def unflatten(self, values: Iterable[Any]) -> Any:
        """The tree with `values` (one a leaf) in place of the leaves."""
        return self.tree.unflatten(values)


def tree_paths(tree: optree.PyTreeSpec, prefix: str) -> list[str]:
    """Readable paths of the leaves of `tree`: ``state.obs['pos'][0]``."""
    return [prefix + accessor.codify("") for accessor in tree.accessors()]


def flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves and structure of a nested container; ``None`` is a leaf (and so refused as a dtype later on)."""
    return optree.tree_flatten(tree, none_is_leaf=True)


@dataclasses.dataclass(frozen=True)
class FragmentSpec:
    """All leaves of a fragment in the order in which they lie in a slot.

    Attributes:
        n_steps: T, steps of a fragment.
        n_columns: B, environments (columns, dim 1 of every leaf).
        fields: by name, in the order of the table above.
        nbytes: size of a slot, a multiple of 64.
    """

    n_steps: int
    n_columns: int
    fields: Mapping[str, Field]
    nbytes: int

    @classmethod
    def build(
        cls,
        n_steps: int,
        n_columns: int,
        *,
        obs: Any,
        act: Any,
        actor: Any,
        hx: Any = (),
        env: Any = None,
        keep_final_obs: bool = False,
    ) -> FragmentSpec:
        """Lay a fragment out.

        Args:
            obs, act, actor, env: trees of `ArraySpec`, one step of one environment. No `env` field without `env`.
            hx: tree of `ArraySpec` whose shape is ``(L, ...)``: all of it but the columns.
            keep_final_obs: add the field ``final_obs``.

        Raises:
            RecordError: T or B below 1.
        """
        if n_steps < 1 or n_columns < 1:
            raise RecordError(
                "a fragment needs steps and columns", expected=">= 1", found=f"T={n_steps}, B={n_columns}"
            )
        given = {"state.obs": obs, "state.act": act, "actor": actor, "hx": hx}
        trees = {name: ArraySpec(SCALARS[name]) if name in SCALARS else given[name] for name in ALWAYS}
        if keep_final_obs:
            trees["final_obs"] = obs
        if env is not None:
            trees["env"] = env
        return cls._lay_out(n_steps, n_columns, ((name, *flatten(tree)) for name, tree in trees.items()))

    @classmethod
    def _lay_out(
        cls, n_steps: int, n_columns: int, wanted: Iterable[tuple[str, list[ArraySpec], optree.PyTreeSpec]]
    ) -> FragmentSpec:
        fields: dict[str, Field] = {}
        offset, first = 0, 0
        for name, specs, tree in wanted:
            leaves = []
            for path, spec in zip(tree_paths(tree, name), specs, strict=True):
                # a leaf of hx brings its own number of rows: layers
                rows = spec.shape[0] if name == "hx" else rows_of(name, n_steps)
                shape = spec.shape[1:] if name == "hx" else spec.shape
                leaf = Leaf(path, spec.dtype, rows, tuple(shape), offset)
                offset += -(-leaf.nbytes(n_columns) // ALIGNMENT) * ALIGNMENT
                leaves.append(leaf)
            fields[name] = Field(name, tree, tuple(leaves), first)
            first += len(leaves)
        return cls(n_steps, n_columns, fields, offset)

    @property
    def leaves(self) -> Iterator[Leaf]:
        """All leaves, in the order in which they lie in a slot."""
        return (leaf for field in self.fields.values() for leaf in field.leaves)

    def with_columns(self, n_columns: int) -> FragmentSpec:
        """The same fields for another number of columns: the layout of a batch of fragments."""
        return self._resized(self.n_steps, n_columns)

    def with_steps(self, n_steps: int) -> FragmentSpec:
        """The same fields for another number of steps."""
        return self._resized(n_steps, self.n_columns)

    def _resized(self, n_steps: int, n_columns: int) -> FragmentSpec:
        def again(f: Field) -> tuple[str, list[ArraySpec], optree.PyTreeSpec]:
            if f.name == "hx":
                return f.name, [ArraySpec(x.dtype, (x.rows, *x.shape)) for x in f.leaves], f.tree
            return f.name, [ArraySpec(x.dtype, x.shape) for x in f.leaves], f.tree

        return self._lay_out(n_steps, n_columns, map(again, self.fields.values()))

    def to_plain(self) -> list[Any]:
        """Plain lists, numbers and strings that say the same: what is hashed, compared and shown."""
        fields = [
            [
                f.name,
                to_text(f.tree),
                [[x.dtype, [x.rows, *x.shape] if f.name == "hx" else list(x.shape)] for x in f.leaves],
            ]
            for f in self.fields.values()
        ]
        return [self.n_steps, self.n_columns, fields]

    @classmethod
    def from_plain(cls, plain: Any, *, most_nbytes: int = 1 << 40) -> FragmentSpec:
        """What `to_plain` gave; `plain` may come from a stranger, so everything is checked, and laid out anew.

        Args:
            most_nbytes: greatest size of a slot.

        Raises:
            RecordError: it is no specification, or too large.
        """
        try:
            n_steps, n_columns, fields = plain
            names = [name for name, _, _ in fields]
            wanted = [
                (name, [ArraySpec(dtype, tuple(shape)) for dtype, shape in leaves], from_text(tree))
                for name, tree, leaves in fields
            ]
            numbers = [n_steps, n_columns, *(n for _, specs, _ in wanted for s in specs for n in s.shape)]
            if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31 for n in numbers):
                raise ValueError("a size out of range")
            if names[: len(ALWAYS)] != ALWAYS or names[len(ALWAYS) :] not in (
                [],
                ["final_obs"],
                ["env"],
                ["final_obs", "env"],
            ):
                raise ValueError("not the fields of a fragment")
            if any(tree.num_leaves != len(specs) for _, specs, tree in wanted) or not all(
                s.shape for name, specs, _ in wanted if name == "hx" for s in specs
            ):
                raise ValueError("leaves do not fit the structure")
            if any(len(s.shape) > MOST_AXES for _, specs, _ in wanted for s in specs):
                raise ValueError(f"a leaf of more than {MOST_AXES} axes")
            scalars = {name: (specs, tree.is_leaf()) for name, specs, tree in wanted if name in SCALARS}
            if scalars != {name: ([ArraySpec(dtype)], True) for name, dtype in SCALARS.items()}:
                raise ValueError("rewards, flags or statistics of another kind")
            if n_steps < 1 or n_columns < 1:
                raise ValueError("no steps or columns")
            spec = cls._lay_out(n_steps, n_columns, wanted)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise RecordError("a specification that cannot be read", expected="that of a fragment", found=str(e)) from e
        if spec.nbytes > most_nbytes:
            size = f"{spec.nbytes:,} bytes" if spec.nbytes < 1 << 63 else "far more"
            raise RecordError("a fragment is too large", expected=f"at most {most_nbytes:,} bytes", found=size)
        return spec

    def differences(self, other: FragmentSpec) -> list[str]:
        """Where `other` is not like this one, a line a leaf; where only containers differ, a line a field."""
        sizes = [(s.n_steps, s.n_columns) for s in (self, other)]
        lines = [] if sizes[0] == sizes[1] else [f"T and B: expected {sizes[0]}, found {sizes[1]}"]
        mine, theirs = self._texts(), other._texts()
        for path in [*mine, *(p for p in theirs if p not in mine)]:
            expected, found = (texts.get(path, "no such leaf") for texts in (mine, theirs))
            if expected != found:
                lines.append(f"{path}: expected {expected}, found {found}")
        if lines:
            return lines
        trees = [{f.name: to_text(f.tree) for f in s.fields.values()} for s in (self, other)]
        fields = {name: [each.get(name, "no such field") for each in trees] for name in {**trees[0], **trees[1]}}
        return [f"{name}: expected nested as {a}, found {b}" for name, (a, b) in fields.items() if a != b]

    def _texts(self) -> dict[str, str]:
        """Dtype and shape of every leaf, by path; that of ``hx`` with its layers."""
        specs = [(x, (x.rows, *x.shape) if f.name == "hx" else x.shape) for f in self.fields.values() for x in f.leaves]
        return {x.path: f"{x.dtype}{list(shape)}" for x, shape in specs}

    @property
    def digest(self) -> bytes:
        """16 bytes that differ when two specifications differ."""
        return hashlib.blake2b(json.dumps(self.to_plain()).encode(), digest_size=16).digest()
