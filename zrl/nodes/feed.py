"""The feed: the thread that turns formed batches into tensors on the learner's device.

    collator's thread             feed's thread                                   user's thread
    ─────────────────             ─────────────                                   ─────────────
    submit(id, slots, metas) ──►  slots → batch buffer (the only copy)
                             ◄──  on_copied(id): the slots may be written again
                                  ready ────────────────────────────────────────► take(timeout)

The life of a batch buffer. `take` number n is the one that gave batch n to the user:

============  ==========================================  =============================================
state         begins                                      its bytes
============  ==========================================  =============================================
free          at the start; else see below                may be written
filling       the feed's thread takes up batch n          are being written
ready         batch n is whole                            wait for the user
current       `take` n returned it                        are the user's
previous      `take` n+1 returned the next one            are still the user's
free          `take` n+2 returned: the next-but-one       may be written once the user's kernels are done
free          `recycle`, of a batch that was not yielded  may be written
============  ==========================================  =============================================

So three buffers do on the CPU: current, previous, and the next one, which is filled while the user computes. On CUDA
there are four: `take` returns while the user's kernels still read the oldest one, and the next copy need not wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zrl.data.batch import Batch, FragmentMeta
from zrl.data.fragment import Array, Record, Slot
from zrl.data.spec import FragmentSpec
from zrl.errors import ClosedError
from zrl.nodes.buffers import AHEAD, IN_HANDS, Buffers, CudaBuffers, HostBuffers


@dataclass
class FeedStats:
    """What the feed has done: batches and fragments copied, and the seconds that their slots were held by it."""

    batches: int = 0
    fragments: int = 0
    copy_seconds: float = 0.0


@dataclass(frozen=True)
class Filled:
    """A batch on the learner's device: its id, its tensors ``[rows, P*B, ...]``, one meta a fragment.

    The tensors are valid until the next-but-one `Feed.take` returns a batch that is not recycled.
    """

    batch_id: int
    record: Record
    metas: tuple[FragmentMeta, ...]
    buffer: int

    def batch(self, version: int) -> Batch:
        """What the user gets, yielded at weights `version`."""
        return Batch.of_record(self.record, self.metas, version)


Job = tuple[int, Sequence[Slot], tuple[FragmentMeta, ...]]


class Feed:
    """Batches of P fragments for the user's thread. Close it: its thread keeps it alive.

    Every request for a batch is answered by one `submit`, every `submit` by one `take`: ask for one batch at the start
    and one after each `take` that returned one; `capacity_free` tells the same. `begin` comes before the first
    `submit`, as soon as it is known what a fragment looks like; `take` and `fail` need not wait for it.

    Args:
        n_per_batch: P, fragments of a batch.
        device: where the batches shall be.
        on_copied: called from the feed's thread with the id of each batch whose bytes are out of their slots.

    Attributes:
        stats: written by the feed's thread alone.
        thread: the feed's.
    """

    def __init__(
        self,
        n_per_batch: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        *,
        on_copied: Callable[[int], None],
    ) -> None:
        self.stats = FeedStats()
        self._n_per_batch, self._device, self._on_copied = n_per_batch, device, on_copied
        self._spec: FragmentSpec
        self._buffers: Buffers | None = None
        self._changed = threading.Condition()  # guards all that follows
        self._free: deque[int] = deque()
        self._jobs: deque[Job] = deque()
        self._ready: deque[Filled] = deque()
        self._in_hands: deque[int] = deque()  # buffers: previous, current
        self._ahead = 0  # submitted, not taken
        self._error: BaseException | None = None
        self._closed = False
        self._news = threading.Lock()  # free: there is something new for the user's thread
        self.thread = threading.Thread(target=self._run, name="zrl-feed", daemon=True)
        self.thread.start()

    # The collator's thread.

    def begin(self, spec: FragmentSpec) -> None:
        """Make the batch buffers; once. Fragments are laid out as `spec` says."""
        if self._buffers is not None:
            raise RuntimeError("the feed has begun already")
        self._spec = spec
        if self._device.type == "cuda":
            self._buffers = CudaBuffers(spec, self._n_per_batch, self._device)
        else:
            self._buffers = HostBuffers(spec, self._n_per_batch)
        with self._changed:
            self._free.extend(range(self._buffers.n_buffers))

    def submit(self, batch_id: int, sources: Sequence[Slot], metas: Sequence[FragmentMeta]) -> None:
        """Copy these P slots, in this order, when a buffer is free. Never blocks; after `close` nothing happens.

        Raises:
            ValueError: not P sources and P metas.
        """
        if len(sources) != self._n_per_batch or len(metas) != self._n_per_batch:
            raise ValueError(f"a batch has {self._n_per_batch} fragments, not {len(sources)} with {len(metas)} metas")
        with self._changed:
            if not self._closed:
                self._jobs.append((batch_id, sources, tuple(metas)))
                self._ahead += 1
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """From now on `take` raises `error`, also one that waits. The first error counts."""
        with self._changed:
            self._error = self._error or error
            self._tell()

    @property
    def error(self) -> BaseException | None:
        """What `take` would raise."""
        with self._changed:
            return self._error

    def register(self, memory: Array) -> bool:
        """Page-lock a ring's mapping (uint8), so that copies to the device need no staging by the driver.

        Returns:
            Whether `unregister` is due before it is unmapped. False on the CPU; where CUDA refuses: one warning,
            pageable copies.
        """
        return self._begun().register(memory)

    def unregister(self, memory: Array) -> None:
        """Undo a `register` that returned True; after the `on_copied` of the last batch with slots in it."""
        self._begun().unregister(memory)

    # The user's thread.

    def capacity_free(self) -> int:
        """How many batches may be outstanding beyond those submitted, 0 or 1: subtract your open requests."""
        with self._changed:
            return max(0, AHEAD - self._ahead)

    def take(self, timeout: float) -> Filled | None:
        """The next batch, in the order of `submit`; None if there is none within `timeout` seconds.

        Raises:
            ClosedError: the feed is closed.
            BaseException: what `fail` was given, or what went wrong in the feed's thread.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._ready or self._closed or self._error is not None:
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise ClosedError("the feed is closed")
                if (left := deadline - time.monotonic()) <= 0:
                    return None
                self._changed.wait(left)
            filled = self._ready.popleft()
            self._ahead -= 1
            self._in_hands.append(filled.buffer)
            self._begun().take(filled.buffer)
            if len(self._in_hands) > IN_HANDS:
                self._release(self._in_hands.popleft())
        return filled

    def wait(self, timeout: float) -> None:
        """Wait until `take` may have something new to say, for at most `timeout` seconds. Whatever interrupts this has
        changed nothing, unlike a `take` that waits: look with a ``take(0)`` before each call."""
        self._news.acquire(timeout=timeout)

    def recycle(self, filled: Filled) -> None:
        """The batch that the last `take` returned is not given to the user: its buffer is free at once.

        Raises:
            ValueError: it is not the last one, or was recycled before.
        """
        with self._changed:
            if not self._in_hands or self._in_hands[-1] != filled.buffer:
                raise ValueError(f"batch {filled.batch_id} is not the one that was taken last")
            self._release(self._in_hands.pop())

    def close(self, timeout: float = 5.0) -> None:
        """End the thread: at most `timeout` seconds, and idempotent. Batches in hand stay valid; what was submitted and
        not begun is forgotten, without `on_copied`."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._ready.clear()
            self._tell()
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout)

    def _tell(self) -> None:
        self._changed.notify_all()
        if self._news.locked():  # by a `wait`, or nobody has looked since
            self._news.release()

    def _release(self, buffer: int) -> None:
        self._begun().give_back(buffer)
        self._free.append(buffer)
        self._changed.notify_all()

    def _begun(self) -> Buffers:
        if self._buffers is None:
            raise RuntimeError("the feed has not begun")
        return self._buffers

    # The feed's thread.

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except BaseException as error:
            self.fail(error)
        with contextlib.suppress(Exception):  # a device that failed has told so already
            if self._buffers is not None:
                self._buffers.finish()

    def _next(self) -> bool:
        """Wait for a job and a buffer and do it; False at the end. Keeps no reference to the slots afterwards."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._jobs and self._free))
            if self._closed:
                return False
            (batch_id, sources, metas), buffer = self._jobs.popleft(), self._free.popleft()
        started = time.perf_counter()
        buffers = self._begun()
        buffers.fill(buffer, sources)
        self.stats.copy_seconds += time.perf_counter() - started
        self.stats.batches += 1
        self.stats.fragments += len(sources)
        self._on_copied(batch_id)
        filled = Filled(batch_id, Record.of(self._spec, list(buffers.leaves(buffer))), metas, buffer)
        with self._changed:
            self._ready.append(filled)
            self._tell()
        return True
