"""Weights as one flat buffer: all parameters and buffers of a module, and the manifest that says what lies where.

    offset 0            64·a               64·b                        nbytes
    ├── bias ── pad ────┼── count ── pad ──┼── core.weight ── pad ─ … ─┤        sorted by name, each on a cache line

The manifest is a function of the names, dtypes and shapes alone, so learner and worker each make it from their own
module; equal digests mean that the flat bytes of one fit the other. It holds every parameter and every buffer,
non-persistent and integer ones too. A tied parameter stands there once per name.

Names do not show how the learner wrapped its module: `torch.compile`, `DistributedDataParallel` and `DataParallel` are
looked through wherever they stand, at the top or around a part.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from zrl.data.memory import Bytes
from zrl.errors import WeightsError

# The closed table: what a peer may name.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    )
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PARALLEL = (DataParallel, DistributedDataParallel)
_ALIGN = 64
_MAX_ENTRIES = 1 << 16
_MAX_NAME = 1 << 10
_MAX_NDIM = 64
_View = tuple[torch.Tensor, torch.dtype | None, tuple[int, ...]]  # with its dtype and shape, to compare at no cost
_NO_VIEW: _View = (torch.empty(0), None, ())
_CPU = torch.device("cpu")
_CACHED_BUFFERS = 4  # the board's two, and one to read into


@dataclass(frozen=True, slots=True)
class WeightsEntry:
    """One tensor: its name without wrappers, dtype (a key of `DTYPES`), shape, and offset in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes, without padding."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class WeightsManifest:
    """What lies where in the flat buffer.

    Attributes:
        entries: sorted by name and by offset, none overlapping.
        nbytes: size of the flat buffer, a multiple of 64; 0 for a module without state.
        digest: 16 bytes (blake2b) over the entries.
    """

    entries: tuple[WeightsEntry, ...]
    nbytes: int
    digest: bytes

    @classmethod
    def of(cls, module: nn.Module) -> WeightsManifest:
        """The manifest of a module, wrapped or not.

        Raises:
            WeightsError: names a tensor that cannot travel: uninitialised, sparse, on the meta device, of a dtype that
                is not in `DTYPES`, or of the same name as another one.
        """
        return cls._build(_describe(name, tensor) for name, tensor in _tensors(module))

    @classmethod
    def _build(cls, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Self:
        """Lay tensors out, given as (name, dtype, shape) in any order."""
        entries: list[WeightsEntry] = []
        offset = 0
        for name, dtype, shape in sorted(tensors):
            if entries and entries[-1].name == name:
                raise WeightsError(f"two tensors are called {_show(name)}")
            entries.append(WeightsEntry(name, dtype, shape, offset))
            offset += -(-entries[-1].nbytes // _ALIGN) * _ALIGN
        text = json.dumps([[e.name, e.dtype, e.shape, e.offset] for e in entries], separators=(",", ":"))
        digest = hashlib.blake2b(text.encode(), digest_size=16, person=b"zrl weights 1").digest()
        return cls(tuple(entries), offset, digest)

    def require(self, found: WeightsManifest) -> None:
        """Raise a WeightsError that names the first tensor in which `found` differs from this manifest."""
        have = {entry.name: f"{entry.dtype} {entry.shape}" for entry in found.entries}
        want = {entry.name: f"{entry.dtype} {entry.shape}" for entry in self.entries}
        for name in sorted(want.keys() | have.keys()):
            if want.get(name) != have.get(name):
                expected, came = want.get(name, "no such tensor"), have.get(name, "no such tensor")
                raise WeightsError(f"{_show(name)}: expected {expected}, found {came}")

    def to_plain(self) -> list[Any]:
        """`[nbytes, digest, [[name, dtype, shape, offset], …]]`: ints, bytes, texts and lists, for a message."""
        return [self.nbytes, self.digest, [[e.name, e.dtype, list(e.shape), e.offset] for e in self.entries]]

    @classmethod
    def from_plain(cls, plain: object, *, max_nbytes: int = 1 << 40) -> WeightsManifest:
        """The manifest of `to_plain`, from a peer that is not trusted.

        The layout follows from names, dtypes and shapes, so it is made anew, and whatever the peer says of offsets,
        size and digest must agree with it.

        Raises:
            WeightsError: anything else than a manifest of at most `max_nbytes` bytes.
        """
        if not isinstance(plain, list | tuple) or len(plain) != 3 or not isinstance(plain[2], list | tuple):
            raise WeightsError("manifest: expected [nbytes, digest, entries]")
        nbytes, digest, rows = plain
        if len(rows) > _MAX_ENTRIES:
            raise WeightsError(f"manifest: {len(rows)} entries, at most {_MAX_ENTRIES} are possible")
        offsets = dict(_check_row(row) for row in rows)
        made = cls._build(offsets)
        for entry in made.entries:
            if offsets[entry.name, entry.dtype, entry.shape] != entry.offset:
                raise WeightsError(f"manifest: offset of {_show(entry.name)}: expected {entry.offset}")
        if len(made.entries) != len(rows) or type(nbytes) is not int or not nbytes == made.nbytes <= max_nbytes:
            raise WeightsError(f"manifest: {made.nbytes} bytes, {_show(nbytes)} announced, at most {max_nbytes}")
        if not isinstance(digest, bytes) or digest != made.digest:
            raise WeightsError(f"manifest: digest: expected {made.digest.hex()}")
        return made


class WeightsPacker:
    """Copies the weights of one module into flat buffers, and from them.

    The module is walked anew each time, because an optimizer, `.to()` or `load_state_dict(assign=True)` may have put
    other tensors into the places of the old (about 1 µs per tensor). The views of a flat buffer are made once and kept,
    for the few buffers seen last; they keep its memory mapped: drop the packer when the board is closed.

    Attributes:
        module: as given.
        manifest: of the module as it was then.
    """

    def __init__(self, module: nn.Module) -> None:
        """Raises WeightsError as `WeightsManifest.of` does."""
        self.module = module
        self.manifest = WeightsManifest.of(module)
        self._views: dict[int, tuple[Bytes, dict[str, _View]]] = {}
        self._stage: _Stage | None = None

    def pack(self, out: Bytes) -> None:
        """Copy the module's tensors, from whatever device, into `out`, `[manifest.nbytes]` uint8. Fits `Board.publish`.

        On CUDA it waits for what the current stream has to do before, as the weights may come of that.

        Raises:
            WeightsError: names the tensor whose dtype or shape is no longer that of the manifest, or that is new or
                missing; or `out` has the wrong size. Nothing is copied then.
        """
        views = self._views_of(out)
        device = next((tensor.device for _, tensor in _tensors(self.module)), _CPU)
        if device.type == "cuda":
            self._pack_by_stage(device, out)
        else:
            self._gather(views)

    def _pack_by_stage(self, device: torch.device, out: Bytes) -> None:
        if self._stage is None or self._stage.device != device:
            self._stage = _Stage(self.manifest, device)
        self._gather(self._stage.views)
        np.copyto(out, self._stage.to_host())

    def _gather(self, views: dict[str, _View]) -> None:
        with torch.no_grad():
            for tensor, view in self._pairs(views):
                view.copy_(tensor)

    def unpack(self, flat: Bytes) -> None:
        """Copy `flat`, `[manifest.nbytes]` uint8, into the module's tensors, in place. Gradients are left alone.

        Raises:
            WeightsError: as `pack`.
        """
        with torch.inference_mode():  # unlike no_grad it may write tensors made in inference mode, and normal ones too
            for tensor, view in self._pairs(self._views_of(flat)):
                tensor.copy_(view)

    def _pairs(self, views: dict[str, _View]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tensor of the module, its view), all checked: `copy_` itself would broadcast and cast."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, tensor in _tensors(self.module):
            view, dtype, shape = views.get(name, _NO_VIEW)
            if tensor.dtype != dtype or tensor.shape != shape or tensor.is_meta:
                there = f"{dtype} {shape}" if dtype else "no such tensor"
                raise WeightsError(f"{_show(name)}: the manifest has {there}, the module {_describe(name, tensor)[1:]}")
            pairs.append((tensor, view))
        if len(pairs) != len(views):
            missing = sorted(views.keys() - {name for name, _ in _tensors(self.module)})
            raise WeightsError(f"{_show(missing[0])}: in the manifest, but not in the module")
        return pairs

    def _views_of(self, flat: Bytes) -> dict[str, _View]:
        """The tensor views of a flat buffer, by name. The kept reference to `flat` is what makes its id unique."""
        known = self._views.get(id(flat))
        if known is None:
            while len(self._views) >= _CACHED_BUFFERS:
                del self._views[next(iter(self._views))]
            known = self._views[id(flat)] = (flat, _make_views(flat, self.manifest))
        return known[1]


class _Stage:
    """The flat buffer once more, on the device of the module, and in pinned memory: each tensor costs a small kernel,
    and then all travel in one copy. One by one they would each wait for the device, and go through memory of the
    driver's."""

    def __init__(self, manifest: WeightsManifest, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):
            self._flat = torch.zeros(manifest.nbytes, dtype=torch.uint8, device=device)  # gaps are zero on the board
            self._pinned = torch.empty(manifest.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            self.views = _cut(self._flat, manifest)

    def to_host(self) -> Bytes:
        """The bytes as the current stream leaves them; valid until the next call."""
        self._pinned.copy_(self._flat, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return self._pinned.numpy()


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside `torch.compile`, `DistributedDataParallel` and `DataParallel`, however nested."""
    while True:
        if isinstance(module, _PARALLEL):
            module = cast(nn.Module, module.module)
        elif "_orig_mod" in module._modules:  # what torch.compile returns
            module = cast(nn.Module, module._modules["_orig_mod"])
        else:
            return module


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name without wrappers, tensor) of all parameters and buffers; tied ones once per name.

    `named_parameters` would leave the wrappers in the names, and takes half as long again.
    """
    module = unwrap(module)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")


def _describe(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...]]:
    """(name, dtype, shape) of a tensor that can travel."""
    if is_lazy(tensor):
        raise WeightsError(f"{_show(name)}: is not initialised yet: run the module once first")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise WeightsError(f"{_show(name)}: expected a dense tensor with data, found {tensor.layout} {tensor.device}")
    if tensor.dtype not in _NAMES:
        raise WeightsError(f"{_show(name)}: {tensor.dtype} cannot travel: expected one of {', '.join(DTYPES)}")
    return name, _NAMES[tensor.dtype], tuple(tensor.shape)


def _make_views(flat: Bytes, manifest: WeightsManifest) -> dict[str, _View]:
    if flat.shape != (manifest.nbytes,) or flat.dtype != np.uint8 or not flat.flags.carray:
        want = f"{manifest.nbytes} contiguous, aligned, writable uint8"
        raise WeightsError(f"flat buffer: expected {want}, found {flat.dtype} {flat.shape}, {flat.flags.writeable=}")
    with torch.inference_mode(False):  # views made in inference mode could not be written outside it
        return _cut(torch.from_numpy(flat), manifest)


def _cut(flat: torch.Tensor, manifest: WeightsManifest) -> dict[str, _View]:
    views: dict[str, _View] = {}
    for e in manifest.entries:
        dtype = DTYPES[e.dtype]
        views[e.name] = flat[e.offset : e.offset + e.nbytes].view(dtype).view(e.shape), dtype, e.shape
    return views


def _check_row(row: object) -> tuple[tuple[str, str, tuple[int, ...]], int]:
    """One entry of a peer's manifest, as ((name, dtype, shape), offset)."""
    if not isinstance(row, list | tuple) or len(row) != 4:
        raise WeightsError("manifest: an entry is not [name, dtype, shape, offset]")
    name, dtype, shape, offset = row
    if type(name) is not str or not 0 < len(name) <= _MAX_NAME:
        raise WeightsError(f"manifest: name {_show(name)}: expected a text of 1 to {_MAX_NAME} characters")
    if type(dtype) is not str or dtype not in DTYPES:
        raise WeightsError(f"manifest: dtype of {_show(name)}: found {_show(dtype)}, known are {', '.join(DTYPES)}")
    if not isinstance(shape, list | tuple) or len(shape) > _MAX_NDIM or not all(map(_is_size, shape)):
        raise WeightsError(f"manifest: shape of {_show(name)}: found {_show(shape)}")
    if not _is_size(offset):
        raise WeightsError(f"manifest: offset of {_show(name)}: found {_show(offset)}")
    return (name, dtype, tuple(shape)), offset


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _show(value: object) -> str:
    """A peer's value, escaped and cut, for a message."""
    try:
        return f"{value!r:.100}"
    except (ValueError, RecursionError):  # an int of more than 4300 digits, lists in lists in lists …
        return f"some {type(value).__name__}"
