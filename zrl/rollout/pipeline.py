"""The iterator over batches that worker processes make: what `single`, `multi` and the command line have in common."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter
from types import TracebackType
from typing import Any, Self

import torch

from zrl.collect.spaces import describe
from zrl.data.batch import Batch
from zrl.errors import ClosedError
from zrl.nodes.collator import Collator
from zrl.nodes.feed import Filled
from zrl.nodes.publisher import Publisher
from zrl.protocol.schedule import too_old
from zrl.rollout.aging import Aging

CLOSE_TIMEOUT = 5.0  # seconds
FIRST_COMPLAINT, NEXT_COMPLAINTS = 5.0, 30.0  # seconds without a batch before we say why

logger = logging.getLogger("zrl")


class PipelineRollout:
    """An iterator over batches, and a context manager that closes it.

    One thread at a time may call ``next()``; `publish`, `stats` and `close` may be called from any thread.

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
        self._lags: Counter[int] = Counter()
        self._n_yielded = self._n_stale = 0
        self._wait_seconds = 0.0
        self._why_closed = ""
        self._requested = False  # a batch is wanted and was not taken yet
        self._taken: Filled | None = None  # from the feed, and the collator does not know it yet
        self._publishing = threading.Lock()
        self._closer = weakref.finalize(self, _close, collator, publisher, os.getpid())  # also at interpreter exit
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
        self._check_open()
        try:
            with torch.inference_mode(False):  # the user may be inside of it
                return self._next()
        except ClosedError:
            self._check_open()
            raise
        except Exception as e:
            self._why_closed = f" after {describe(e)}"
            self.close()
            raise

    def _next(self) -> Batch:
        if self._n_yielded and self._auto_publish and not (self._max_lag == 0 and self._requested):
            self.publish()
        while True:
            if not self._requested:
                self._request()
            filled = self._taken = self._taken or self._take()  # an interrupt may come before it is accounted for
            with self._publishing:
                version = self._publisher.version
                ahead = self._max_lag != 0  # while the user computes, the next batch is made
                self._collator.advance(yielded=(filled.batch_id, version), request=ahead)
                self._taken, self._requested = None, ahead
            batch = filled.batch(version)
            if not too_old([meta.version for meta in filled.metas], version, self._max_lag):
                break
            self._n_stale += 1
            self._collator.feed.recycle(filled)
        self._n_yielded += 1
        self._lags.update(batch.lag)
        return self._aging(batch) if self._aging is not None else batch

    def _take(self) -> Filled:
        started = time.monotonic()
        patience = FIRST_COMPLAINT
        while (filled := self._collator.feed.take(patience)) is None:
            waited = time.monotonic() - started
            patience = NEXT_COMPLAINTS
            why = self._collator.stats().get("waiting_for", "the collator does not answer")
            logger.warning("starved: no batch for %.0f s: %s", waited, why)
        self._wait_seconds += time.monotonic() - started
        return filled

    def _request(self) -> None:
        self._requested = True
        self._collator.advance(request=True)

    def publish(self) -> int:
        """Let the workers go on with the learner's weights as they are now; returns their version.

        Raises:
            WeightsError: the actor is not what it was.
            ClosedError: it was closed before.
        """
        with self._publishing:
            self._check_open()
            version = self._publisher.publish(self._announce)
            self._collator.advance(published=version)
        return version

    def _announce(self, version: int) -> None:
        self._collator.slots.newest = version

    def stats(self) -> dict[str, Any]:
        """Where everything is, and what happened so far.

        ``version``; ``batches`` yielded; ``slots`` by state; ``fragments`` granted, committed, consumed, dropped, lost
        and in flight (committed = consumed + dropped + in flight); ``dropped`` and ``refused`` by reason; ``workers``
        alive, ``hosts``, ``replaced``, ``losses`` by cause; ``lag``: fragments by lag; ``env_steps``; ``seconds`` by
        stage, over all workers, with ``wait`` for slots, and of the learner ``copy`` and ``learner_wait``, for batches;
        ``waiting_for``: in words. docs/collecting.md explains every key.
        """
        stats = self._collator.stats()
        stats["batches"] = self._n_yielded
        stats["lag"] = dict(sorted(self._lags.items()))
        stats.setdefault("seconds", {})["learner_wait"] = self._wait_seconds
        return stats

    def close(self) -> None:
        """End the workers and everything that belongs to them, within 5 s. Idempotent; batches already yielded stay as
        they are."""
        self._closer()

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
    collator.close(time.monotonic() + CLOSE_TIMEOUT)
    publisher.close()
