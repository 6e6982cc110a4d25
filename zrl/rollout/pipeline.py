"""The iterator over batches that worker processes make: what `single`, `multi` and the command line have in common."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch

from zrl.collect.spaces import describe
from zrl.data.batch import Batch
from zrl.errors import ClosedError
from zrl.nodes.collator import Collator
from zrl.nodes.publisher import Publisher
from zrl.protocol.schedule import too_old
from zrl.rollout.aging import Aging
from zrl.rollout.interrupts import Uninterrupted

CLOSE_TIMEOUT = 5.0  # seconds
FIRST_COMPLAINT, NEXT_COMPLAINTS = 5.0, 30.0  # seconds without a batch before we say why
LOOK = 0.1  # seconds between two looks at how many workers there are

logger = logging.getLogger("zrl")


class PipelineRollout:
    """An iterator over batches, and a context manager that closes it.

    One thread at a time may call ``next()``; `publish`, `stats`, `status`, `annotate` and `close` may be called from
    any thread.

    Attributes:
        entropy: the seed of the run.
    """

    def __init__(
        self, collator: Collator, publisher: Publisher, *, entropy: int, auto_publish: bool, debug: bool
    ) -> None:
        self.entropy = entropy
        self._collator, self._publisher = collator, publisher
        self._max_lag = collator.plan.max_lag
        self._auto_publish = auto_publish
        self._aging = Aging() if debug else None
        self._learner = collator.learner
        self._publish_due = False  # a batch was yielded since; a call that was interrupted is not followed by another
        self._why_closed = ""
        self._requested = False  # a batch is wanted and was not taken yet
        self._wanted_since: float | None = None  # by a `next_within` that has not had it yet
        self._complain_at = 0.0
        self._publishing = threading.Lock()
        self._pid = os.getpid()
        self._closer = weakref.finalize(self, _close, collator, publisher, self._pid)  # also at interpreter exit
        if self._max_lag != 0:
            self._request()

    @property
    def version(self) -> int:
        """Of the weights: 1 at first, one more with each publish."""
        return self._publisher.version

    @property
    def urls(self) -> list[str]:
        """Where workers and hosts connect to."""
        return list(self._collator.urls)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; waits for it, and says so in the log after 5 s.

        Raises:
            WorkerError: a worker failed at its start, or more often than it may.
            StarvationError: too few workers are left, for too long.
            ClosedError: it was closed before.
        """
        self._wanted_since = None
        batch = self.next_within(math.inf)
        assert batch is not None
        return batch

    def next_within(self, timeout: float) -> Batch | None:
        """`next`, for at most `timeout` seconds: None, if there is no batch by then. What was published by then stays
        published, and the next call goes on with the same wait.

        Raises:
            as `next`.
        """
        self._check_open()
        self._learner.clock.enter("wait")
        try:
            with torch.inference_mode(False):  # the user may be inside of it
                return self._next(timeout)
        except ClosedError:
            self._check_open()
            raise
        except Exception as e:
            self._why_closed = f" after {describe(e)}"
            self.close()
            raise
        finally:
            self._learner.clock.enter("train")

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """What is done in it counts as waiting for a batch, in `stats` and in the verdict."""
        return self._learner.clock.during("wait")

    def _next(self, timeout: float) -> Batch | None:
        if self._publish_due and self._auto_publish:
            self._learner.clock.enter("publish")
            with Uninterrupted():
                self._publish()
                self._publish_due = False
            self._learner.clock.enter("wait")
        started = time.monotonic()
        if self._wanted_since is None:
            self._wanted_since, self._complain_at = started, started + FIRST_COMPLAINT
        while (batch := self._commit()) is None:
            now = time.monotonic()
            if now >= started + timeout:
                return None
            if now < self._complain_at:
                self._collator.feed.wait(min(self._complain_at, started + timeout) - now)
                continue
            self._complain_at = now + NEXT_COMPLAINTS
            why = self._collator.stats().get("waiting_for", "the collator does not answer")
            logger.warning("starved: no batch for %.0f s: %s", now - self._wanted_since, why)
        self._wanted_since = None
        return self._aging(batch) if self._aging is not None else batch

    def _commit(self) -> Batch | None:
        """The batch that is ready, in the books also: both or neither. None if there is none, or it is too old."""
        with Uninterrupted():
            if not self._requested:
                self._request()
            filled = self._collator.feed.take(0.0)
            if filled is None:
                return None
            with self._publishing:
                version = self._publisher.version
                self._requested = self._max_lag != 0  # while the user computes, the next batch is made
                self._collator.advance(yielded=(filled.batch_id, version), request=self._requested)
            if too_old([meta.version for meta in filled.metas], version, self._max_lag):
                self._collator.feed.recycle(filled)
                if not self._requested:
                    self._request()
                return None
            self._learner.batches += 1
            self._publish_due = True
            batch = filled.batch(version)
            self._learner.lags.update(batch.lag)
            return batch

    def wait_for_workers(
        self, n: int, timeout: float | None = None, told: Callable[[int], None] = lambda there: None
    ) -> int:
        """Wait until `n` workers have their environments ready; how many there are then.

        Not needed before `next`, which waits for a batch from whoever is there.

        Args:
            n: how many.
            timeout: seconds; None: as long as it takes.
            told: gets the number at once, and whenever it has changed.

        Raises:
            TimeoutError: there are fewer after `timeout` seconds; says how many.
            WorkerError, StarvationError, ClosedError: as by ``next()``.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        before = None
        while True:
            self._check_open()
            if (error := self._collator.feed.error) is not None:
                raise error
            there = int(self._collator.stats().get("workers", 0))
            if there != before:
                told(there)
            if there >= n:
                return there
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{there} of {n} workers are there after {timeout:g} s")
            before = there
            time.sleep(LOOK)

    def _request(self) -> None:
        self._requested = True
        self._collator.advance(request=True)

    def publish(self) -> int:
        """Let the workers go on with the learner's weights as they are now; returns their version.

        Raises:
            WeightsError: the actor is not what it was.
            ClosedError: it was closed before.
        """
        with self._learner.clock.during("publish"):
            return self._publish()

    def _publish(self) -> int:
        with Uninterrupted(), self._publishing:
            self._check_open()
            version = self._publisher.publish(self._announce)
            self._collator.advance(published=version)
        return version

    def _announce(self, version: int) -> None:
        self._collator.slots.newest = version

    def hosts(self) -> dict[str, int]:
        """The hosts that are connected, the learner's own included: how many workers each keeps, by name."""
        return self._collator.hosts()

    def stats(self) -> dict[str, Any]:
        """Where everything is, and what happened so far.

        ``version``; ``batches`` yielded; ``slots`` by state; ``fragments`` granted, committed, consumed, dropped, lost
        and in flight (committed = consumed + dropped + in flight); ``dropped`` and ``refused`` by reason; ``workers``
        alive, ``hosts``, ``replaced``, ``losses`` by cause; environments ``rebuilt``; ``stale``: dropped as too old, by
        worker; ``lag``: how many fragments had each; ``env_steps``, and ``masked_steps``, rows of columns without one;
        ``seconds`` by stage, over all workers, with ``wait`` for slots, and of the learner ``copy``, ``learner_wait``
        for batches, ``publish`` and ``train``; ``waiting_for``: in words; ``peers``: each worker; ``shares`` and
        ``rates`` of the last seconds, and ``verdict``: what the run waits for, in words.
        docs/collecting.md explains every key.
        """
        stats = self._collator.stats()
        stats.update(self._learner.figures())
        stats.setdefault("seconds", {}).update(self._learner.seconds())
        return stats

    def status(self) -> dict[str, Any]:
        """The document that the learner publishes every second: `stats` as plain JSON, and what `annotate` was given.
        docs/protocol.md has its keys; empty, where the collator does not answer."""
        return self._collator.status()

    def annotate(self, note: Mapping[str, Any]) -> None:
        """Say something about the training, for `status` and whoever looks at it: the key ``training``. Plain JSON of
        at most 16 KiB, replaced by the next call.

        Raises:
            ConfigError: it is not; names the place.
        """
        self._learner.annotate(note)

    def close(self) -> None:
        """End the workers and everything that belongs to them, within 5 s. Idempotent, and when it returns, it is done,
        whoever began with it; batches already yielded stay as they are."""
        self._closer()
        # once more: waits for another thread that closes, and goes on where one was interrupted
        _close(self._collator, self._publisher, self._pid)
        self._learner.clock.stop()

    def _check_open(self) -> None:
        if not self._closer.alive:
            raise ClosedError(f"this collector was closed{self._why_closed}; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _close(collator: Collator, publisher: Publisher, pid: int) -> None:
    if os.getpid() != pid:
        return  # a fork of the learner: nothing of this is its own
    if collator.is_own_thread():  # where the garbage collector happened to run: it cannot wait for its own end
        threading.Thread(target=_close, args=(collator, publisher, pid), name="zrl-close").start()
        return
    collator.close(time.monotonic() + CLOSE_TIMEOUT)
    publisher.close()
