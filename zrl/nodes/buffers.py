"""The memory of batches, on the CPU and on CUDA, and how P slots get there; `zrl.nodes.feed` says when.

How a leaf is copied on the CPU (measured with the 14 leaves of a CartPole, T = 64, B = 16, P = 4):

- By NumPy: ``dst[...] = src`` takes 1.0 µs for a small leaf, `torch.Tensor.copy_` 2.5; at 4 MiB both are as fast as the
  memory.
- A large leaf as it is: NumPy lets go of the GIL for more than 500 elements.
- A small one as T+1 elements, a whole row each: 0.5 µs, and the GIL is kept. To let go of it 56 times a batch, and wait
  each time for a user's thread in plain Python, took up to 75 ms; without that it is 0.09 at most.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from zrl.data.fragment import Array, Slot
from zrl.data.spec import FragmentSpec

AHEAD = 1  # batches beyond those in the user's hands
IN_HANDS = 2  # current and previous
PORTABLE = 1  # cudaHostRegisterPortable: registered for every context
SMALL = 1 << 16  # bytes: copied in less than what it costs to let go of the GIL


class Buffers(Protocol):
    """Batch buffers on one device; all is called from the feed's thread but `take` and `give_back`."""

    n_buffers: int

    def fill(self, k: int, sources: Sequence[Slot]) -> None:
        """Copy P slots side by side into buffer k. When it returns, their bytes are out."""

    def leaves(self, k: int) -> list[torch.Tensor]:
        """The tensors of buffer k: objects of their own, so that what the user does to them ends with the batch."""

    def take(self, k: int) -> None:
        """The user's thread is about to read buffer k."""

    def give_back(self, k: int) -> None:
        """The user's thread has done with buffer k."""

    def register(self, memory: Array) -> bool:
        """See `Feed.register`."""

    def unregister(self, memory: Array) -> None:
        """See `Feed.unregister`."""

    def finish(self) -> None:
        """Wait for what is under way."""


class HostBuffers:
    """Three slots of P*B columns in memory, and the views that fragment i is copied to: columns i*B to (i+1)*B - 1."""

    n_buffers = IN_HANDS + AHEAD

    def __init__(self, spec: FragmentSpec, n_per_batch: int) -> None:
        wide, b = spec.with_columns(n_per_batch * spec.n_columns), spec.n_columns
        self._slots = [Slot(wide) for _ in range(self.n_buffers)]
        self._places: list[list[list[Array]]] = [
            [for_copying([a[:, i * b : (i + 1) * b] for a in slot.arrays]) for i in range(n_per_batch)]
            for slot in self._slots
        ]
        self._sources: WeakKeyDictionary[Slot, list[Array]] = WeakKeyDictionary()

    def fill(self, k: int, sources: Sequence[Slot]) -> None:
        for place, source in zip(self._places[k], sources, strict=True):
            leaves = self._sources.get(source)
            if leaves is None:
                leaves = self._sources[source] = for_copying(source.arrays)
            for to, leaf in zip(place, leaves, strict=True):
                to[...] = leaf

    def leaves(self, k: int) -> list[torch.Tensor]:
        return [x.detach() for x in self._slots[k].tensors]

    def take(self, k: int) -> None:
        pass

    def give_back(self, k: int) -> None:
        pass

    def register(self, memory: Array) -> bool:
        return False

    def unregister(self, memory: Array) -> None:
        pass

    def finish(self) -> None:
        pass


def for_copying(arrays: Sequence[Array]) -> list[Array]:
    """The same bytes of leaves ``[rows, B, ...]`` in the shape that is copied fastest, see the top; no empty ones."""
    return [rows_of_bytes(a) if a.nbytes < SMALL else a for a in arrays if a.size]


def rows_of_bytes(a: Array) -> Array:
    """A view ``[rows]`` of `a`, one element a row; each row must be contiguous."""
    return a.reshape(len(a), -1).view(np.dtype(("V", a[0].nbytes))).reshape(len(a))


class CudaBuffers:
    """Four batches on a CUDA device. A slot goes there as it is, in one asynchronous copy on a stream of our own; then
    one kernel a leaf puts all P fragments into their columns.

    What waits for what:

    - a slot is written again: the host waits for `copied`, which is recorded behind its copy.
    - `staging` is written again: the same stream.
    - a batch is read: the user's stream waits for its `filled`.
    - its buffer is written again: our stream waits for its `read`, recorded on the user's stream when it is given back.

    `cuda` is `torch.cuda`, untyped; another one in tests.
    """

    n_buffers = IN_HANDS + AHEAD + 1

    def __init__(self, spec: FragmentSpec, n_per_batch: int, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._warned = False
        self._stream = cuda.Stream(device)
        self._staging = torch.empty((n_per_batch, spec.nbytes), dtype=torch.uint8, device=device)
        self._from = staged_leaves(spec, self._staging)
        self._to = [empty_leaves(spec, n_per_batch, device) for _ in range(self.n_buffers)]
        self._copied = cuda.Event(blocking=True)  # sleep, do not spin
        self._filled = [cuda.Event() for _ in range(self.n_buffers)]
        self._read = [cuda.Event() for _ in range(self.n_buffers)]
        self._readers: list[set[Any]] = [set() for _ in range(self.n_buffers)]
        self._own = cuda.current_stream(device)  # for which torch keeps this memory
        self._stream.wait_stream(self._own)  # who used it before us may still do so

    def fill(self, k: int, sources: Sequence[Slot]) -> None:
        with self._cuda.stream(self._stream):
            for row, source in zip(self._staging, sources, strict=True):
                row.copy_(torch.from_numpy(source.memory[: len(row)]), non_blocking=True)
            self._copied.record()
            self._stream.wait_event(self._read[k])
            lay_out(self._from, self._to[k])
            self._filled[k].record()
        self._copied.synchronize()

    def leaves(self, k: int) -> list[torch.Tensor]:
        return [x.detach().flatten(1, 2) for x in self._to[k]]

    def take(self, k: int) -> None:
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(self._filled[k])
        if stream != self._own and stream not in self._readers[k]:
            # When the last tensor of this buffer is gone, its memory must not go to others before that stream is done.
            self._readers[k].add(stream)
            for x in self._to[k]:
                x.record_stream(stream)

    def give_back(self, k: int) -> None:
        self._read[k].record(self._cuda.current_stream(self._device))

    def register(self, memory: Array) -> bool:
        with self._cuda.device(self._device):
            code = int(self._cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, PORTABLE))
            if code:
                self._forget_error()
        if code and not self._warned:
            self._warned = True
            warnings.warn(
                f"cudaHostRegister refused {memory.nbytes} bytes (error {code}): slower, pageable copies to the device",
                RuntimeWarning,
                stacklevel=3,
            )
        return code == 0

    def unregister(self, memory: Array) -> None:
        with self._cuda.device(self._device):
            if int(self._cuda.cudart().cudaHostUnregister(memory.ctypes.data)):
                self._forget_error()

    def finish(self) -> None:
        self._stream.synchronize()

    def _forget_error(self) -> None:
        """CUDA keeps the last error of a thread until somebody asks for it. That is the next kernel's launch, which
        would be blamed for it, so let it be one that nobody needs."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)


def staged_leaves(spec: FragmentSpec, staging: torch.Tensor) -> list[torch.Tensor]:
    """Views ``[rows, P, B, ...]`` of the leaves in `staging`, uint8 ``[P, spec.nbytes]``."""
    views = []
    for leaf in spec.leaves:
        raw = staging[:, leaf.offset : leaf.offset + leaf.nbytes(spec.n_columns)].view(getattr(torch, leaf.dtype))
        views.append(raw.view(len(staging), *leaf.full_shape(spec.n_columns)).transpose(0, 1))
    return views


def empty_leaves(spec: FragmentSpec, n_per_batch: int, device: torch.device) -> list[torch.Tensor]:
    """Tensors ``[rows, P, B, ...]``, one a leaf: dims 1 and 2 together are the columns of a batch."""
    b = spec.n_columns
    return [
        torch.empty((x.rows, n_per_batch, b, *x.shape), dtype=getattr(torch, x.dtype), device=device)
        for x in spec.leaves
    ]


def lay_out(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy leaf by leaf, one kernel each."""
    for to, leaf in zip(targets, sources, strict=True):
        to.copy_(leaf)
