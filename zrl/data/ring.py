"""The ring of a worker: one mapping of K slots, each holding one fragment, plus a small header.

    offset 0                     4096                4096 + stride            4096 + K · stride
    ├── header ── zeros ─────────┼── slot 0 ── pad ──┼── slot 1 ── pad ── … ──┤

    header, little-endian, written once, before anybody attaches:

     0  magic        8 bytes   b"zrlring\\0"
     8  layout       u32       version of this drawing
    12  n_slots      u32       K
    16  slot_nbytes  u64       bytes of one fragment
    24  stride       u64       slot_nbytes rounded up to 4096
    32  run_id       16 bytes  the run,
    48  incarnation  16 bytes  the life of the worker,
    64  digest       16 bytes  and the layout of a fragment that these slots belong to

Every slot begins on a page: every leaf's alignment in the mapping is its alignment in the fragment.

The ring says nothing about who may read or write a slot. That is known by the collator's books and told by messages;
both sides get here with a message in hand, which also orders the memory accesses of the two processes. The worker
makes the ring (`create`), so one that was revoked can write only into its own, abandoned one; the collator attaches.
What it expects comes from its own books, and it looks at the header once: changing that later changes nothing.
"""

from __future__ import annotations

import struct
from types import TracebackType
from typing import Self

import numpy as np

from zrl.data.memory import Bytes, Memory, MemoryAddress, check_header, check_id
from zrl.errors import SharedMemoryError

MAGIC = b"zrlring\0"
LAYOUT = 1
_HEADER = struct.Struct("<8sIIQQ16s16s16s")
_FIELDS = ("magic", "layout", "n_slots", "slot_nbytes", "stride", "run_id", "incarnation", "digest")
_PAGE = 4096


class Ring:
    """K slots of `slot_nbytes` bytes. Make one with `create` or `attach`; close it, or use it as a context manager.

    Attributes:
        memory: the whole mapping (for `cudaHostRegister`).
        n_slots: K.
        slot_nbytes: size of a slot in bytes.
    """

    def __init__(self, memory: Memory, slot_nbytes: int, n_slots: int) -> None:
        self.memory = memory
        self.n_slots = n_slots
        self.slot_nbytes = slot_nbytes
        starts = range(_PAGE, _PAGE + n_slots * _stride(slot_nbytes), _stride(slot_nbytes))
        self._slots = [memory.data[start : start + slot_nbytes] for start in starts]

    @classmethod
    def create(
        cls, slot_nbytes: int, n_slots: int, *, run_id: bytes, incarnation: bytes, digest: bytes, shared: bool = True
    ) -> Ring:
        """A new, zeroed ring; `shared=False` for a worker whose learner is on another machine.

        Args:
            slot_nbytes: bytes of one fragment.
            n_slots: K.
            run_id: 16 bytes.
            incarnation: 16 bytes.
            digest: 16 bytes, of the fragment's specification.
            shared: whether another process may attach.

        Raises:
            SharedMemoryError: a size or an identity makes no sense, or there is not that much memory.
        """
        fields = _fields(slot_nbytes, n_slots, run_id, incarnation, digest)
        total = _total(slot_nbytes, n_slots)
        memory = Memory.create(total) if shared else Memory.private(total)
        memory.data[: _HEADER.size] = np.frombuffer(_HEADER.pack(*fields), np.uint8)
        return cls(memory, slot_nbytes, n_slots)

    @classmethod
    def attach(
        cls,
        address: MemoryAddress,
        *,
        run_id: bytes,
        incarnation: bytes,
        digest: bytes,
        slot_nbytes: int,
        n_slots: int,
        max_nbytes: int,
    ) -> Ring:
        """The ring of a worker on this machine. Everything but `address` is what the caller's books say.

        Args:
            address: from the worker; not trusted.
            run_id: as for `create`, and so are the following.
            incarnation: of the worker.
            digest: of the fragment's specification.
            slot_nbytes: bytes of one fragment.
            n_slots: K.
            max_nbytes: refuse a ring that is larger, all slots and the header together.

        Raises:
            SharedMemoryError: it cannot be opened (see `Memory.attach`), or is not the ring that is expected: names the
                field, what was expected and what was found.
        """
        _fields(slot_nbytes, n_slots, run_id, incarnation, digest)
        _check_total(slot_nbytes, n_slots, address.nbytes)
        memory = Memory.attach(address, max_nbytes=max_nbytes)
        try:
            return cls.over(
                memory, run_id=run_id, incarnation=incarnation, digest=digest, slot_nbytes=slot_nbytes, n_slots=n_slots
            )
        except BaseException:
            memory.close()
            raise

    @classmethod
    def over(
        cls, memory: Memory, *, run_id: bytes, incarnation: bytes, digest: bytes, slot_nbytes: int, n_slots: int
    ) -> Ring:
        """The ring in memory that was attached already, which stays the caller's to close if it is none.

        Raises:
            SharedMemoryError: it is not the ring that is expected.
        """
        fields = _fields(slot_nbytes, n_slots, run_id, incarnation, digest)
        _check_total(slot_nbytes, n_slots, memory.nbytes)
        found = _HEADER.unpack(memory.data[: _HEADER.size].tobytes())
        check_header("ring", dict(zip(_FIELDS, zip(fields, found, strict=True), strict=True)))
        return cls(memory, slot_nbytes, n_slots)

    def slot(self, k: int) -> Bytes:
        """Slot k, `[slot_nbytes]` uint8: always the same array.

        Raises:
            IndexError: there is no slot k; negative numbers do not count from the end.
            SharedMemoryError: the ring is closed.
        """
        if not self._slots:
            raise SharedMemoryError("this ring is closed")
        if not 0 <= k < self.n_slots:
            raise IndexError(f"slot {k} of a ring with the slots 0 to {self.n_slots - 1}")
        return self._slots[k]

    @property
    def address(self) -> MemoryAddress:
        """What the collator needs to attach.

        Raises:
            SharedMemoryError: the ring is private.
        """
        return self.memory.address

    def close(self) -> None:
        """Let go of the mapping; idempotent. Views that are still held stay valid (see `Memory.close`)."""
        self._slots = []
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _stride(slot_nbytes: int) -> int:
    return -(-slot_nbytes // _PAGE) * _PAGE


def _total(slot_nbytes: int, n_slots: int) -> int:
    return _PAGE + n_slots * _stride(slot_nbytes)


def _check_total(slot_nbytes: int, n_slots: int, found: int) -> None:
    check_header("ring", {"nbytes": (_total(slot_nbytes, n_slots), found)})


def _fields(
    slot_nbytes: int, n_slots: int, run_id: bytes, incarnation: bytes, digest: bytes
) -> tuple[bytes, int, int, int, int, bytes, bytes, bytes]:
    """The header's values, in the order of `_FIELDS`."""
    if not 0 < slot_nbytes < 1 << 48:
        raise SharedMemoryError(f"ring: slot_nbytes: expected 1 to 2**48 - 1, found {slot_nbytes}")
    if not 0 < n_slots < 1 << 32:
        raise SharedMemoryError(f"ring: n_slots: expected 1 to 2**32 - 1, found {n_slots}")
    for name, value in (("run_id", run_id), ("incarnation", incarnation), ("digest", digest)):
        check_id(f"ring: {name}", value)
    return MAGIC, LAYOUT, n_slots, slot_nbytes, _stride(slot_nbytes), run_id, incarnation, digest
