"""The workers' loop in this process, one worker after the other: for debuggers, which do not look into processes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.collect.debug import check_forward
from zrl.collect.spaces import Factory, describe
from zrl.data.batch import Batch, FragmentMeta
from zrl.data.fragment import Record, Slot
from zrl.data.weights import WeightsPacker
from zrl.errors import ClosedError
from zrl.metrics import StageTimes
from zrl.nodes.buffers import HostBuffers
from zrl.rollout.aging import Aging
from zrl.rollout.alone import Alone
from zrl.rollout.same import private_copy

if TYPE_CHECKING:
    from zrl.rollout.local import LocalOptions


class InlineRollout:
    """An iterator over batches as worker processes with ``max_lag=0`` make them, number for number, if `n_per_batch` is
    a multiple of the number of workers; and a context manager that closes it. Exceptions come as they are.

    Attributes:
        entropy: the seed of the run.
        version: of the weights that act: 1 at first, one more with each publish.
    """

    def __init__(
        self,
        factory: Factory,
        actor: torch.nn.Module,
        o: LocalOptions,
        *,
        entropy: int,
        act_on: torch.device,
        to: torch.device,
    ) -> None:
        self.entropy = entropy
        self.version = o.first_version
        self._options, self._to = o, to
        self._learner = WeightsPacker(actor)
        self._flat = np.empty(self._learner.manifest.nbytes, np.uint8)
        self._acting: list[WeightsPacker] = []
        self._contexts: list[Context] = []
        self._seqs = [0] * o.n_actors
        self._n_yielded = self._n_made = self._n_lost = 0
        self._interrupted: set[int] = set()  # workers in the middle of a fragment
        self._aging = Aging() if o.debug else None
        self._alone = Alone()
        self._closed = ""
        self._final: dict[str, Any] = {}  # the figures at the end
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for index in range(o.n_actors):
                acting = private_copy(actor, act_on, o.worker_mode)
                self._contexts.append(build(factory, acting, self._collect_options(index, act_on)))
                self._acting.append(WeightsPacker(acting))
            spec = self._contexts[0].spec
            self._slots = [Slot(spec) for _ in range(o.n_per_batch)]
            self._buffers = HostBuffers(spec, o.n_per_batch)
            undo.pop_all()

    def _collect_options(self, index: int, device: torch.device) -> CollectOptions:
        o = self._options
        return CollectOptions(
            n_steps=o.n_steps,
            n_columns=o.n_per_actor,
            sticky=o.sticky,
            keep_final_obs=o.keep_final_obs,
            info_keys=o.info_keys,
            entropy=self.entropy,
            index=index,
            device=device,
            debug=o.debug,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            EnvError, ActorError: collecting failed; the collector is closed then.
            ClosedError: it was closed before.
        """
        self._check_open()
        if self._alone.due():
            self._alone.look(self.stats(), sum(self._seqs), self._n_yielded)
        with self._alone.collecting():
            return self._next()

    def _next(self) -> Batch:
        try:
            if self._n_yielded and self._options.auto_publish:
                self.publish()
            with torch.inference_mode(False):  # the user may be inside of it
                batch = self._batch()
        except Exception as e:
            self.close()
            self._closed = f" after {describe(e)}"
            raise
        self._n_yielded += 1
        return self._aging(batch) if self._aging is not None else batch

    def _batch(self) -> Batch:
        metas = []
        for place, slot in enumerate(self._slots):
            worker = place % len(self._contexts)
            self._collect(worker, slot)
            self._seqs[worker] += 1
            metas.append(FragmentMeta(self.version, worker, self._seqs[worker]))
        k = self._n_made % self._buffers.n_buffers
        self._n_made += 1
        self._buffers.fill(k, self._slots)
        batch = Batch.of_record(Record.of(self._slots[0].spec, self._buffers.leaves(k)), tuple(metas), self.version)
        return batch if self._to.type == "cpu" else batch.to(self._to)

    def _collect(self, worker: int, slot: Slot) -> None:
        ctx = self._contexts[worker]
        if worker in self._interrupted:
            self._n_lost += 1
            ctx.restart()
        self._interrupted.add(worker)
        collect(ctx, slot)
        if self._options.debug:
            check_forward(ctx, slot)
        self._interrupted.remove(worker)

    def publish(self) -> int:
        """Let the weights of the learner act from the next fragment on; returns their version."""
        self._check_open()
        with self._alone.learner.clock.during("publish"):
            self._learner.pack(self._flat)
            for acting in self._acting:
                acting.unpack(self._flat)
        self.version += 1
        return self.version

    def stats(self) -> dict[str, Any]:
        """Counters so far, under the names that `zrl.rollout.pipeline.PipelineRollout.stats` has for them."""
        if self._final:
            return self._final
        total = StageTimes()
        for ctx in self._contexts:
            total += ctx.times
        n = sum(self._seqs)
        consumed = min(n, self._n_yielded * self._options.n_per_batch)  # others were of a batch that was given up
        return {
            "version": self.version,
            "batches": self._n_yielded,
            "fragments": {
                "granted": n + self._n_lost,
                "committed": n,
                "consumed": consumed,
                "dropped": n - consumed,
                "lost": self._n_lost,
                "in_flight": 0,
            },
            "workers": len(self._contexts),
            **total.figures(),
        }

    def status(self) -> dict[str, Any]:
        """`stats` as plain JSON, where the time goes, and what `annotate` was given; the keys are those of
        `zrl.rollout.pipeline.PipelineRollout.status`, as far as they make sense here."""
        return self._alone.status(self.stats(), sum(self._seqs), self._n_yielded)

    def annotate(self, note: Mapping[str, Any]) -> None:
        """Say something about the training, for `status`: see `zrl.rollout.pipeline.PipelineRollout.annotate`.

        Raises:
            ConfigError: it is no plain JSON, or too much.
        """
        self._alone.learner.annotate(note)

    def close(self) -> None:
        """Close the environments, unless ``close=False`` was given. Batches already yielded stay as they are."""
        self._final = self._final or self.stats()
        self._alone.learner.clock.stop()
        self._closed = self._closed or " "
        if self._options.close:
            with contextlib.ExitStack() as every:
                for ctx in self._contexts:
                    every.callback(ctx.columns.close)
        self._contexts.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this collector was closed{self._closed.rstrip()}; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
