"""The page that a child shares with its host: how far it is, readable at any moment, also while the child hangs.

    offset
      0  magic        8 bytes   b"zrl.page"    written once by the host, before the child exists
      8  layout       u64       version of this drawing
     16  incarnation  16 bytes  which life of which worker this page belongs to
     64  calls        u64       environment calls done                     ┐
     72  phase        u64       see `Phase`                                │ stored by the child alone,
     80  sent         u64       sequence number of the last Ready sent     │ loaded by the host
     88  releases     u64       Releases received                          │
     96  blame        u64       1 + column of the environment that raised  ┘
    104  leave        u64       1: the child is to finish what it has in hand, and leave; stored by the host
    112  looks        u64       times that it has looked for weights that are still on their way; stored by the child
    120  (unused up to 4096)

Words are native and aligned, each stored and loaded whole: a reader sees an old value or a new one, never half of each.
Words are not consistent with one another, and nobody needs them to be: the host looks for words that stand still.
The words of the child share one cache line, which its host touches about once a second.
"""

from __future__ import annotations

import enum
import struct
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from zrl.data.memory import Memory, MemoryAddress, check_header, check_id
from zrl.errors import SharedMemoryError

MAGIC = b"zrl.page"
LAYOUT = 3
NBYTES = 4096
_HEADER = struct.Struct("=8sQ16s")
_CALLS, _PHASE, _SENT, _RELEASES, _BLAME, _LEAVE, _LOOKS = range(8, 15)  # words of 8 bytes


class Phase(enum.IntEnum):
    """What a worker is doing. BUILD is 0, so that a child that never came to write its page is building."""

    BUILD = 0
    WAIT = 1
    COLLECT = 2
    ADOPT = 3
    DRAIN = 4
    CUT_OFF = 5  # its connection ended, and it with it


class Progress(NamedTuple):
    """A look at a page: environment calls done, phase, last sequence number sent, Releases received, the column of the
    environment that ended the child, -1 if none did, and how often it has looked for weights."""

    calls: int
    phase: Phase
    sent: int
    releases: int
    blamed: int
    looks: int = 0


class Page:
    """The words of one child. Make one with `create` (the host, which owns the memory) or `attach` (the child)."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._bytes = memory.data.data
        self._words = self._bytes.cast("Q")  # += takes 74 ns, in a NumPy array 209
        #: one word, to be counted up by whoever calls the environments
        self.calls = self._words[_CALLS : _CALLS + 1]

    @classmethod
    def create(cls, incarnation: bytes) -> Page:
        """A page on which nothing has happened yet, for the child with this incarnation (16 bytes).

        Raises:
            SharedMemoryError: the incarnation is not 16 bytes, or there is no memory.
        """
        check_id("incarnation", incarnation)
        memory = Memory.create(NBYTES)
        memory.data[: _HEADER.size] = np.frombuffer(_HEADER.pack(MAGIC, LAYOUT, incarnation), np.uint8)
        return cls(memory)

    @classmethod
    def attach(cls, address: MemoryAddress, incarnation: bytes) -> Page:
        """The page that the host made for this child.

        Raises:
            SharedMemoryError: it cannot be opened, or is not that page: names what was expected and what was found.
        """
        memory = Memory.attach(address, max_nbytes=NBYTES)
        try:
            check_header("page", {"mapping": (NBYTES, memory.nbytes)})
            expected = {"magic": MAGIC, "layout": LAYOUT, "incarnation": incarnation}
            found = _HEADER.unpack(memory.data[: _HEADER.size].tobytes())
            check_header("page", dict(zip(expected, zip(expected.values(), found, strict=True), strict=True)))
            return cls(memory)
        except BaseException:
            memory.close()
            raise

    @property
    def address(self) -> MemoryAddress:
        """What the child needs to attach."""
        return self.memory.address

    # ── the child ────────────────────────────────────────────────────────────────────────────────────────────────────

    def enter(self, phase: Phase) -> None:
        """The child is in `phase` from now on."""
        self._words[_PHASE] = phase

    def set_sent(self, seq: int) -> None:
        """The Ready with this sequence number is sent."""
        self._words[_SENT] = seq

    def count_release(self) -> None:
        """One more Release was received."""
        self._words[_RELEASES] += 1

    def count_look(self) -> None:
        """The weights that a grant calls for have not come yet."""
        self._words[_LOOKS] += 1

    def blame(self, column: int) -> None:
        """The environment of this column raised; -1: the one that was probed, or the factory itself."""
        self._words[_BLAME] = column + 1

    @property
    def leave(self) -> bool:
        """Whether the host wants the child to leave."""
        return bool(self._words[_LEAVE])

    # ── the host ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self) -> Progress:
        """How far the child is.

        Raises:
            SharedMemoryError: the child wrote a phase that does not exist.
        """
        calls, phase, sent, releases, blame = self._words[_CALLS : _BLAME + 1]
        try:
            return Progress(calls, Phase(phase), sent, releases, blame - 1, self._words[_LOOKS])
        except ValueError:
            raise SharedMemoryError(f"page: phase: expected 0 to {max(Phase)}, found {phase}") from None

    def ask_to_leave(self) -> None:
        """The child is to finish its fragment, and leave; it looks a few times a second."""
        self._words[_LEAVE] = 1

    def close(self) -> None:
        """Let go of the mapping; idempotent. Nothing else may be called afterwards."""
        self.calls.release()
        self._words.release()
        self._bytes.release()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
