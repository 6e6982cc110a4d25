"""The board of a host: shared memory with the newest weights. One writer, any number of readers, no locks between them.

    offset 0                4096                4096 + stride       4096 + 2 · stride
    ├── header ─────────────┼── buffer 0 ─ pad ─┼── buffer 1 ─ pad ─┤         stride: nbytes rounded up to 4096

    header
      0  magic     8 bytes   b"zrlboard"         written once, little-endian, before anybody attaches
      8  layout    u32       version of this drawing; then 4 zero bytes
     16  run_id    16 bytes
     32  digest    16 bytes  of the weights' manifest
     48  nbytes    u64       of one buffer
    128  newest    u64       2 · version + buffer that holds it; 0: nothing published yet
    256  before 0  u64       stamps: version whose writing into buffer 0 has begun,
    384  after 0   u64       and has ended
    512  before 1  u64       the same of buffer 1
    640  after 1   u64

The words from `newest` on are native 64-bit integers, each stored and loaded whole, each on a cache line of its own.

    writer, version v                             reader
    ─────────────────                             ──────
    b = the buffer that is not the newest's       v, b = newest;  nothing to do unless v is newer than mine
    before[b] = v                                 done = after[b]
    fence                                         fence
    write the data of b                           copy the data of b
    fence                                         fence
    after[b] = v                                  begun = before[b]
    fence                                         the copy is version `done`, untorn, if begun == done; else again
    newest = 2·v + b

The reader takes the stamps in the opposite order, and that is why one comparison is enough. It saw `after[b] == done`,
so all of `done`'s data was written before it began to copy. Had any byte of its copy come from a later version, then
that version's `before`, stored ahead of its data, would have been visible behind the copy, and `begun` be larger. A
writer that dies half-way leaves before ≠ after in a buffer that `newest` does not name: the old weights stay readable.

The writer must publish twice while a reader copies to disturb it, because it leaves the newest buffer alone. It
chooses the buffer by that rule, not by the version's parity: a host gets its versions through a conflating socket,
and two even ones in a row would have it overwrite what its workers are reading.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from zrl.data.memory import Bytes, Memory, MemoryAddress, check_header, check_id
from zrl.errors import SharedMemoryError, WeightsError

MAGIC = b"zrlboard"
LAYOUT = 1
_HEADER = struct.Struct("<8sII16s16sQ")
_FIELDS = ("magic", "layout", "reserved", "run_id", "digest", "nbytes")
_PAGE = 4096
_NEWEST = 128 // 8
_BEFORE = (256 // 8, 512 // 8)
_AFTER = (384 // 8, 640 // 8)
_ATTEMPTS = 3
_MAX_VERSION = (1 << 63) - 1


class Board:
    """The newest weights of a run, `nbytes` bytes. Make one with `create` (the host) or `attach` (its workers).

    One thread publishes. A `Board` is not to be shared by several reading threads: `torn` would miscount.

    Attributes:
        memory: the whole mapping.
        nbytes: size of the weights in bytes; may be 0.
        torn: reads that were given up because the writer kept overtaking them.
    """

    def __init__(self, memory: Memory, nbytes: int) -> None:
        self.memory = memory
        self.nbytes = nbytes
        self.torn = 0
        self._lock = threading.Lock()  # for `_fence` alone
        self._words: npt.NDArray[np.uint64] | None = memory.data[:_PAGE].view(np.uint64)
        self._buffers = [memory.data[start : start + nbytes] for start in (_PAGE, _PAGE + _stride(nbytes))]

    @classmethod
    def create(cls, nbytes: int, *, run_id: bytes, digest: bytes, shared: bool = True) -> Board:
        """A new board with nothing published.

        Args:
            nbytes: size of the weights (`WeightsManifest.nbytes`).
            run_id: 16 bytes.
            digest: 16 bytes (`WeightsManifest.digest`).
            shared: whether other processes may attach.

        Raises:
            SharedMemoryError: a size or an identity makes no sense, or there is not that much memory.
        """
        fields = _fields(nbytes, run_id, digest)
        total = _PAGE + 2 * _stride(nbytes)
        memory = Memory.create(total) if shared else Memory.private(total)
        memory.data[: _HEADER.size] = np.frombuffer(_HEADER.pack(*fields), np.uint8)
        return cls(memory, nbytes)

    @classmethod
    def attach(cls, address: MemoryAddress, *, run_id: bytes, digest: bytes, nbytes: int) -> Board:
        """The board of this worker's host, for reading only: the mapping itself cannot be written.

        Raises:
            SharedMemoryError: it cannot be opened (see `Memory.attach`), or is not the board that is expected: names
                the field, what was expected and what was found.
        """
        fields = _fields(nbytes, run_id, digest)
        total = _PAGE + 2 * _stride(nbytes)
        check_header("board", {"mapping": (total, address.nbytes)})
        memory = Memory.attach(address, max_nbytes=total, writable=False)
        try:
            found = _HEADER.unpack(memory.data[: _HEADER.size].tobytes())
            check_header("board", dict(zip(_FIELDS, zip(fields, found, strict=True), strict=True)))
            return cls(memory, nbytes)
        except BaseException:
            memory.close()
            raise

    @property
    def version(self) -> int:
        """The newest version, ≥ 1; 0 while nothing is published."""
        return int(self._open()[_NEWEST]) >> 1

    def publish(self, version: int, write: Callable[[Bytes], None]) -> None:
        """Make `version` the newest. Readers of the previous one are not disturbed.

        Args:
            version: larger than the one on the board, below 2**63.
            write: fills the array it is given, `[nbytes]` uint8 (what it held before is an older version). If it
                raises, nothing is published and the board stays as it was.

        Raises:
            WeightsError: the version does not grow.
            SharedMemoryError: the board is closed, or attached, hence for reading only.
        """
        words = self._open()
        if not words.flags.writeable:
            raise SharedMemoryError("an attached board is for reading: only its creator publishes")
        newest = int(words[_NEWEST])
        if not newest >> 1 < version <= _MAX_VERSION:
            raise WeightsError(f"version {version} cannot follow {newest >> 1}: versions grow")
        index = 1 - (newest & 1)
        words[_BEFORE[index]] = version
        self._fence()
        write(self._buffers[index])
        self._fence()
        words[_AFTER[index]] = version
        self._fence()
        words[_NEWEST] = version << 1 | index

    def read(self, out: Bytes, newer_than: int) -> int | None:
        """Copy the newest weights into `out` if they are newer than `newer_than`.

        Args:
            out: `[nbytes]` uint8.
            newer_than: the version that the caller has; 0 for none.

        Returns:
            the version, > `newer_than`, that is in `out` now; `newer_than` itself if there is none newer, and `out` is
            untouched; None if each of three attempts was overtaken by the writer: `torn` counts it, and `out` holds
            nothing that may be used.

        Raises:
            WeightsError: `out` has another size or dtype.
            SharedMemoryError: the board is closed.
        """
        words = self._open()
        if out.shape != (self.nbytes,) or out.dtype != np.uint8:
            raise WeightsError(f"out: expected {self.nbytes} uint8, found {out.shape} {out.dtype}")
        for _ in range(_ATTEMPTS):
            newest = int(words[_NEWEST])
            if newest >> 1 <= newer_than:
                return newer_than
            self._fence()
            done = int(words[_AFTER[newest & 1]])
            self._fence()
            _copy(out, self._buffers[newest & 1])
            self._fence()
            if int(words[_BEFORE[newest & 1]]) == done:
                return done
        self.torn += 1
        return None

    @property
    def address(self) -> MemoryAddress:
        """What a worker needs to attach.

        Raises:
            SharedMemoryError: the board is private.
        """
        return self.memory.address

    def close(self) -> None:
        """Let go of the mapping; idempotent."""
        self._words, self._buffers = None, []
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open(self) -> npt.NDArray[np.uint64]:
        if self._words is None:
            raise SharedMemoryError("this board is closed")
        return self._words

    def _fence(self) -> None:
        """Let no load or store pass this point, in either direction.

        Python has no fence, but a lock is made of one. Acquiring keeps later accesses behind it and releasing keeps
        earlier ones before it; one pair still lets both slip *into* the section and there past each other, so it takes
        two: all that is earlier stays before the first release, all that is later behind the second acquire, and an
        acquire does not pass the release of the same lock. On x86, program order orders plain stores and plain loads
        already; the locked instruction covers the streaming stores of a large memcpy too. Never contended: 0.5 µs.
        """
        for _ in range(2):
            self._lock.acquire()
            self._lock.release()


def _copy(out: Bytes, source: Bytes) -> None:
    np.copyto(out, source)  # releases the interpreter's lock


def _stride(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _fields(nbytes: int, run_id: bytes, digest: bytes) -> tuple[bytes, int, int, bytes, bytes, int]:
    """The header's values, in the order of `_FIELDS`."""
    if not 0 <= nbytes < 1 << 48:
        raise SharedMemoryError(f"board: nbytes: expected 0 to 2**48 - 1, found {nbytes}")
    check_id("board: run_id", run_id)
    check_id("board: digest", digest)
    return MAGIC, LAYOUT, 0, run_id, digest, nbytes


def crc32(flat: Bytes) -> int:
    """The checksum that guards weights on the wire: of a contiguous uint8 array, 0 to 2**32 - 1."""
    return zlib.crc32(flat.data)
