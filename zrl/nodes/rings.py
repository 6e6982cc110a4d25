"""The rings of all workers as the learner has them: attached, where it can open them, or kept here for those who send.

A worker whose ring can be opened is *local*: its fragments are read where it wrote them. All others are *remote*: their
slots are the learner's own memory, and a Ready brings the bytes along, which go from the socket straight into the
slot. That is decided once, when the worker attaches; who reads slots sees no difference.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable

import numpy as np

from zrl.data.fragment import Array, Slot
from zrl.data.memory import MemoryAddress, available_bytes, boot_id
from zrl.data.ring import Ring
from zrl.data.spec import FragmentSpec
from zrl.errors import RecordError, SharedMemoryError
from zrl.net.sockets import Rest
from zrl.nodes.feed import Feed
from zrl.protocol import messages as m

MOST_LINES = 5  # of leaves that are not as they should be

logger = logging.getLogger("zrl")


class Refusal(Exception):
    """An Attach is refused, with this code."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Kept:
    """One ring and its slots, as the feed reads them."""

    def __init__(self, ring: Ring, spec: FragmentSpec, feed: Feed, *, local: bool) -> None:
        self.local = local
        self.ring = ring
        self.slots = [Slot(spec, ring.slot(k)) for k in range(ring.n_slots)]
        #: Flags of a fragment as bytes, by slot: whatever a peer sends, they are made 0 or 1.
        self.flags: list[list[Array]] = []
        if not local:
            self.flags = [
                [a.view(np.uint8) for a in slot.arrays if a.dtype == np.bool_ and a.size] for slot in self.slots
            ]
        self._feed = feed
        self._registered = feed.register(ring.memory.data)

    def close(self) -> None:
        if self._registered:
            self._feed.unregister(self.ring.memory.data)
        self.slots.clear()
        self.flags.clear()
        self.ring.close()


class Rings:
    """Made, used and closed by the collator's thread.

    Args:
        n_steps, n_columns: T and B that fragments must have.
        slots_of: K of the worker with this index.
        max_fragment_bytes: a larger fragment is refused.
        feed: begins with the first specification; told of each ring's memory.

    Attributes:
        spec: of the run's fragments: that of the first worker; None before it.
        n_remote: rings of workers that send, since the start.
    """

    def __init__(
        self, n_steps: int, n_columns: int, slots_of: Callable[[int], int], max_fragment_bytes: int, feed: Feed
    ) -> None:
        self.spec: FragmentSpec | None = None
        self.n_remote = 0
        self._sizes, self._slots_of, self._most, self._feed = (n_steps, n_columns), slots_of, max_fragment_bytes, feed
        self._kept: dict[bytes, _Kept] = {}
        self._said = False

    def attach(self, attach: m.Attach, index: int) -> bool:
        """Take the ring of this worker up; whether it is local.

        Raises:
            Refusal: its fragments are not those of the run, or there is no memory for them.
        """
        spec = self._spec_of(attach)
        n_slots = self._slots_of(index)
        if (attach.n_slots, attach.slot_nbytes) != (n_slots, spec.nbytes):
            expected, found = (n_slots, spec.nbytes), (attach.n_slots, attach.slot_nbytes)
            raise Refusal("ring", f"slots and bytes of a slot: expected {expected}, found {found}")
        opened = self._open(attach, index)
        ring = opened or self._own(attach)
        if self.spec is None:
            self._feed.begin(spec)
            self.spec = spec
        self._kept[attach.incarnation] = _Kept(ring, spec, self._feed, local=opened is not None)
        self.n_remote += opened is None
        return opened is not None

    def slot(self, incarnation: bytes, k: int) -> Slot:
        return self._kept[incarnation].slots[k]

    def is_remote(self, incarnation: bytes) -> bool:
        """Whether a Ready of this worker must bring its fragment along."""
        kept = self._kept.get(incarnation)
        return kept is not None and not kept.local

    def receive(self, incarnation: bytes, k: int, payload: Rest) -> None:
        """Take a fragment from the socket into slot k of a remote worker. Whoever calls has looked into the books: the
        slot is that worker's to write.

        Raises:
            ProtocolError: too few or too many bytes; the slot holds some of them.
        """
        kept = self._kept[incarnation]
        payload.into(kept.ring.slot(k).data)
        for flags in kept.flags[k]:
            np.minimum(flags, 1, out=flags)

    def let_go(self, incarnation: bytes) -> None:
        self._kept.pop(incarnation).close()

    def close(self) -> None:
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()

    def _open(self, attach: m.Attach, index: int) -> Ring | None:
        """The worker's own ring; None where it has none for others, or where it cannot be opened from here."""
        if attach.nbytes == 0:
            return None
        address = MemoryAddress(attach.pid, attach.fd, attach.nbytes, attach.boot_id, attach.path)
        try:
            return Ring.attach(
                address,
                run_id=attach.run_id,
                incarnation=attach.incarnation,
                digest=attach.digest,
                slot_nbytes=attach.slot_nbytes,
                n_slots=attach.n_slots,
                max_nbytes=attach.n_slots * (self._most + 4096) + 4096,
            )
        except SharedMemoryError as error:  # in another container the same numbers may stand for anything
            if attach.boot_id == boot_id() and not self._said:
                self._said = True
                logger.warning(
                    "worker %d is on this machine, but the learner cannot read its memory (%s): it sends its "
                    "fragments, which is slower; the same user and the same container, or pid namespace, would do",
                    index,
                    m.printable(str(error)),
                )
            return None

    def _own(self, attach: m.Attach) -> Ring:
        """Memory of our own for the slots of a remote worker."""
        wanted, free = attach.n_slots * attach.slot_nbytes, available_bytes()
        try:
            if wanted > free:  # asking the kernel would not fail, see `zrl.data.memory`
                raise SharedMemoryError(f"{free:,} bytes are available")
            ring = Ring.create(
                attach.slot_nbytes,
                attach.n_slots,
                run_id=attach.run_id,
                incarnation=attach.incarnation,
                digest=attach.digest,
                shared=False,
            )
            # Every page exists from now on: else what is promised here would still count as available for the next one.
            ring.memory.data[mmap.PAGESIZE :: mmap.PAGESIZE] = 0
            return ring
        except SharedMemoryError as error:
            text = f"the learner has no {wanted:,} bytes for the {attach.n_slots} slots of a remote worker: {error}"
            raise Refusal("full", text) from None

    def _spec_of(self, attach: m.Attach) -> FragmentSpec:
        """The specification of this Attach, if it is that of the run; the first one makes it."""
        try:
            spec = FragmentSpec.from_plain(attach.spec, most_nbytes=self._most)
        except RecordError as error:
            raise Refusal("spec", str(error)) from None
        if (spec.n_steps, spec.n_columns) != self._sizes:
            expected, found = self._sizes, (spec.n_steps, spec.n_columns)
            raise Refusal("spec", f"steps and columns: expected {expected}, found {found}")
        if spec.digest != attach.digest:
            raise Refusal("spec", "the digest is that of another specification")
        if self.spec is not None and self.spec.digest != spec.digest:
            lines = self.spec.differences(spec)
            more = f"; and {len(lines) - MOST_LINES} leaves more" if len(lines) > MOST_LINES else ""
            raise Refusal(
                "spec",
                f"its fragments are not those of this run's first worker, so its environments or its actor are others: "
                f"{'; '.join(lines[:MOST_LINES])}{more}",
            )
        return spec
