"""A slot: the place in memory that holds one fragment, with every view that anybody needs built once.

The hot loop (`zrl.collect.collect`) slices nothing: a `Row` holds the NumPy and torch views of one step of every leaf,
and `Slot.rows` has one for each step. All views alias the slot's memory. They are made outside
`torch.inference_mode`, so that what reaches the user may take part in autograd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import optree
import torch

from zrl.data.spec import FragmentSpec, rows_of
from zrl.errors import RecordError

Array = npt.NDArray[Any]
Inputs = tuple[Any, Any, torch.Tensor, torch.Tensor]  # (obs, act, rew, fin)
T = TypeVar("T")


class State(NamedTuple):
    """What the actor is given at row t: ``(x_t, a_{t-1}, r_t, d_t)``, and whether d_t was a termination.

    Every leaf is ``[T+1, B, ...]``; `obs` and `act` may be nested.
    """

    obs: Any
    act: Any
    rew: Any
    fin: Any
    term: Any

    def rows(self, start: int, stop: int) -> State:
        """The same with rows ``start:stop`` of every leaf (views)."""
        return State(*(map_leaves(lambda x: x[start:stop], tree) for tree in self))


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `fn` to every leaf of a nested container."""
    if isinstance(tree, (torch.Tensor, np.ndarray)):  # most are: ten times as fast
        return fn(tree)
    return optree.tree_map(fn, tree, none_is_leaf=True)


@dataclasses.dataclass
class Record:
    """The fields of `zrl.data.spec` as attributes: NumPy arrays or tensors, nested as the environment nests them."""

    state: State
    actor: Any
    hx: Any
    bootstrap: Any
    final_value: Any
    mask: Any
    ep_return: Any
    ep_length: Any
    final_obs: Any = None
    env: Any = None

    @classmethod
    def of(cls, spec: FragmentSpec, leaves: list[Any]) -> Record:
        """Put `leaves`, in the order of ``spec.leaves``, into their places."""
        trees = {f.name: f.unflatten(leaves[f.first : f.first + len(f.leaves)]) for f in spec.fields.values()}
        state = State(*(trees[f"state.{name}"] for name in State._fields))
        plain = {name: tree for name, tree in trees.items() if not name.startswith("state.")}
        return cls(state=state, **plain)


class Row:
    """Views of row t of a slot. NumPy views are ``[B, ...]``, torch views ``[1, B, ...]``.

    Attributes:
        inputs: ``(obs, act, rew, fin)`` as nested tensors: what `BaseActorModule.step` takes.
        obs: one array per leaf, ``[B, ...]``.
        obs_flat: the same memory with the columns folded into the next axis, ``[B*n, ...]``; where a leaf is a
            scalar, ``[B]``: the target of one `numpy.concatenate` over all columns.
        act: one array per leaf.
        rew, fin, term, final_value, ep_return, ep_length: ``[B]``.
        final_obs: one array per leaf; empty unless recorded.
        carried: all arrays of the fields with T+1 rows: what row T of one fragment hands on to row 0 of the next.
        mask: ``[B]``; `env`: one array per leaf of the environment's info.
        outputs: what the actor's step at row t writes, one tensor per leaf: the action in row t+1, the info in this
            one. Like `mask` and `env` empty at row T, which has no step.
        output_arrays: the same as arrays, ``[B, ...]``.
    """

    __slots__ = (
        "act",
        "carried",
        "env",
        "ep_length",
        "ep_return",
        "fin",
        "final_obs",
        "final_value",
        "inputs",
        "mask",
        "obs",
        "obs_flat",
        "output_arrays",
        "outputs",
        "rew",
        "term",
    )

    def __init__(self, slot: Slot, t: int) -> None:
        spec = slot.spec
        fields = spec.fields
        here = [f for f in fields if f not in ("hx", "bootstrap") and t < rows_of(f, spec.n_steps)]
        arrays = {name: [a[t] for a in slot.arrays_of(name)] for name in here}
        tensors = {name: [x[t : t + 1] for x in slot.tensors_of(name)] for name in here}
        self.inputs: Inputs = (
            fields["state.obs"].unflatten(tensors["state.obs"]),
            fields["state.act"].unflatten(tensors["state.act"]),
            tensors["state.rew"][0],
            tensors["state.fin"][0],
        )
        self.obs: list[Array] = arrays["state.obs"]
        self.obs_flat: list[Array] = [
            a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]) if a.ndim > 1 else a for a in self.obs
        ]
        self.act: list[Array] = arrays["state.act"]
        self.rew: Array = arrays["state.rew"][0]
        self.fin: Array = arrays["state.fin"][0]
        self.term: Array = arrays["state.term"][0]
        self.final_value: Array = arrays["final_value"][0]
        self.ep_return: Array = arrays["ep_return"][0]
        self.ep_length: Array = arrays["ep_length"][0]
        self.final_obs: list[Array] = arrays.get("final_obs", [])
        self.carried: list[Array] = [a for f in here if rows_of(f, spec.n_steps) > spec.n_steps for a in arrays[f]]
        last = t == spec.n_steps
        self.mask: Array = np.empty(0, bool) if last else arrays["mask"][0]
        acts = [x[t + 1 : t + 2] for x in slot.tensors_of("state.act")]
        self.outputs: list[torch.Tensor] = [] if last else acts + tensors["actor"]
        self.output_arrays: list[Array] = [x[0].numpy() for x in self.outputs]
        self.env: list[Array] = [] if last else arrays.get("env", [])


class Slot:
    """One fragment in `memory`.

    Args:
        spec: the layout.
        memory: uint8 ``[>= spec.nbytes]``, 64-byte aligned; private, if None.

    Attributes:
        arrays, tensors: the leaves in the order of ``spec.leaves``, ``[rows, B, ...]``.
        np, pt: the same as a `Record`.

    Raises:
        RecordError: `memory` is too small or not aligned.
    """

    def __init__(self, spec: FragmentSpec, memory: Array | None = None) -> None:
        if memory is None:
            memory = private_memory(spec.nbytes)
        if memory.nbytes < spec.nbytes or memory.ctypes.data % 64:
            raise RecordError(
                "memory of a slot", expected=f"{spec.nbytes} bytes, 64-byte aligned", found=f"{memory.nbytes} bytes"
            )
        self.spec = spec
        self.memory = memory
        self.arrays: list[Array] = []
        for leaf in spec.leaves:
            raw = memory[leaf.offset : leaf.offset + leaf.nbytes(spec.n_columns)]
            self.arrays.append(raw.view(leaf.dtype).reshape(leaf.full_shape(spec.n_columns)))
        with torch.inference_mode(False):
            self.tensors = [torch.from_numpy(a) for a in self.arrays]
        self.np = Record.of(spec, list(self.arrays))
        self.pt = Record.of(spec, list(self.tensors))
        self._rows: list[Row] | None = None

    def arrays_of(self, field: str) -> list[Array]:
        """The NumPy leaves of one field; empty if the record has no such field."""
        return self._of(field, self.arrays)

    def tensors_of(self, field: str) -> list[torch.Tensor]:
        """The torch leaves of one field; empty if the record has no such field."""
        return self._of(field, self.tensors)

    def _of(self, field: str, leaves: list[T]) -> list[T]:
        if field not in self.spec.fields:
            return []
        f = self.spec.fields[field]
        return leaves[f.first : f.first + len(f.leaves)]

    @property
    def rows(self) -> list[Row]:
        """T+1 rows of views, made at the first use: only who writes fragments needs them."""
        if self._rows is None:
            with torch.inference_mode(False):
                self._rows = [Row(self, t) for t in range(self.spec.n_steps + 1)]
        return self._rows

    def poison(self) -> None:
        """Overwrite everything with values that no sound record holds: NaN, the least integer, True."""
        for a in self.arrays:
            fill_with_poison(a)


def private_memory(nbytes: int) -> Array:
    """`nbytes` of zeroed memory of this process, 64-byte aligned, as uint8."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def fill_with_poison(a: Array) -> None:
    """Fill an array with NaN, the least value of signed and the greatest of unsigned integers, or True."""
    if a.dtype.kind in "fc":
        a.fill(np.nan)
    elif a.dtype.kind == "b":
        a.fill(True)
    else:
        info = np.iinfo(a.dtype)
        a.fill(info.min if a.dtype.kind == "i" else info.max)
