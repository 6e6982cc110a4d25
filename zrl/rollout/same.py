"""Rollouts collected in this process, between the steps of the training loop: synchronous, on-policy, reproducible."""

from __future__ import annotations

import contextlib
import copy
import secrets
import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.build import CollectOptions, build
from zrl.collect.collect import Context, collect
from zrl.collect.debug import check_forward
from zrl.collect.spaces import Environments, describe
from zrl.collect.vector_probe import is_vector
from zrl.data.batch import Batch, FragmentMeta
from zrl.data.fragment import Slot
from zrl.data.weights import WeightsManifest, WeightsPacker, unwrap
from zrl.errors import ActorError, ClosedError, ConfigError
from zrl.rollout.aging import Aging
from zrl.rollout.alone import Alone

N_SLOTS = 2  # the batch in the user's hands, and the one before it, which stays valid until the next-but-one next()


def rollout(
    factory: Environments,
    actor: torch.nn.Module,
    n_steps: int,
    n_envs: int | None = None,
    *,
    sticky: bool = False,
    pinned: bool = False,
    close: bool = True,
    device: torch.device | str | None = None,
    entropy: int | None = None,
    max_lag: int | None = 0,
    worker_mode: Literal["train", "eval"] = "train",
    auto_publish: bool = True,
    keep_final_obs: bool = False,
    info_keys: Mapping[str, Any] | Iterable[str] | None = None,
    debug: bool = False,
    first_version: int = 1,
) -> SameRollout:
    """Collect fragments of `n_steps` steps of `n_envs` environments in this process, without end.

    Each ``next()`` but the first takes over the weights of `actor` and collects one batch with them (see `zrl.Batch`),
    so every batch is on-policy. The batch is valid until the next-but-one ``next()``; ``clone()`` it to keep it longer.

    Args:
        factory: makes one Gymnasium environment, called without arguments or with ``seed=`` if it has such a parameter,
            or one vector of `n_envs` of them; or a list of `n_envs` environments, or their vector.
        actor: the learner's actor, a `BaseActorModule`, wrapped by ``torch.compile`` or DistributedDataParallel or not.
            Acting is done by a private copy.
        n_steps: T.
        n_envs: B; may be left out if a list of environments is given.
        sticky: freeze an environment whose episode ends within a fragment until the fragment's end, so that a
            recurrent core may run over whole columns.
        pinned: collect into page-locked memory; needs CUDA.
        close: close the environments in ``close()``.
        device: where the actor acts and the batches live; the CPU, if None.
        entropy: seed of everything random in the run; drawn, if None. Same entropy, same machine: the same run, bit
            for bit.
        max_lag: greatest lag allowed. Here the lag is 0 by nature, so any value holds.
        worker_mode: ``"train"`` or ``"eval"``: the mode of the private copy, whatever the learner's is.
        auto_publish: take the learner's weights over at each ``next()`` but the first; otherwise call ``publish()``.
        keep_final_obs: record the true final observation of every episode.
        info_keys: keys of the step's info to record in ``batch.env``: names, or a mapping from name to dtype, space or
            example array.
        debug: check at every step what is otherwise checked once or not at all, and refuse batches past their time.
        first_version: of the weights as they are now; a run that goes on with another counts on.

    Raises:
        ConfigError: an argument makes no sense.
        EnvError, ActorError: the environment or the actor cannot be recorded; also raised by ``next()``.
    """
    if not callable(factory) and not isinstance(factory, (list, tuple)) and not is_vector(factory):
        raise ConfigError(f"factory: expected a callable, a list of environments or a vector, not {factory!r:.100}")
    if n_envs is None:
        if callable(factory):
            raise ConfigError("n_envs: needed, unless the environments themselves are given")
        n_envs = factory.num_envs if is_vector(factory) else len(factory)
    if max_lag is not None and (not isinstance(max_lag, int) or isinstance(max_lag, bool) or max_lag < 0):
        raise ConfigError(f"max_lag: expected None or an integer of at least 0, not {max_lag!r}")
    if worker_mode not in ("train", "eval"):
        raise ConfigError(f'worker_mode: expected "train" or "eval", not {worker_mode!r}')
    options = CollectOptions(
        n_steps=n_steps,
        n_columns=n_envs,
        sticky=sticky,
        keep_final_obs=keep_final_obs,
        info_keys=info_keys,
        entropy=secrets.randbits(64) if entropy is None else entropy,
        device=usable_device(device or "cpu"),
        debug=debug,
    )
    with torch.inference_mode(False):
        return SameRollout(
            factory,
            actor,
            options,
            worker_mode=worker_mode,
            auto_publish=auto_publish,
            close=close,
            pinned=pinned,
            first_version=first_version,
        )


class SameRollout:
    """An iterator over batches, and a context manager that closes it. Made by `rollout`.

    Attributes:
        entropy: the seed of the run.
        version: of the weights that act: 1 at first, one more with each publish.
    """

    def __init__(
        self,
        factory: Environments,
        actor: torch.nn.Module,
        options: CollectOptions,
        *,
        worker_mode: str,
        auto_publish: bool,
        close: bool,
        pinned: bool,
        first_version: int,
    ) -> None:
        self.entropy = options.entropy
        self.version = first_version
        acting = private_copy(actor, options.device, worker_mode)
        self._learner = WeightsPacker(actor)
        self._acting = WeightsPacker(acting)
        self._weights = np.empty(WeightsManifest.of(acting).nbytes, np.uint8)
        self._ctx: Context | None = build(factory, acting, options)
        self._debug = options.debug
        try:
            self._slots = [Slot(self._ctx.spec, _memory(self._ctx.spec.nbytes, pinned)) for _ in range(N_SLOTS)]
        except MemoryError as e:
            self._ctx.columns.close()
            nbytes = N_SLOTS * self._ctx.spec.nbytes
            raise ConfigError(f"n_steps, n_envs: {N_SLOTS} fragments need {nbytes:,} bytes, which cannot be had") from e
        self._aging = Aging()
        self._alone = Alone()
        self._auto_publish = auto_publish
        self._close_envs = close
        self._why_closed = ""
        self._interrupted = False
        self._n_fragments = self._n_lost = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            EnvError, ActorError: collecting failed; the collector is closed then.
            ClosedError: it was closed before.
        """
        ctx = self._open()
        if self._alone.due():
            self._alone.look(self.stats(), self._n_fragments, self._n_fragments)
        with self._alone.collecting():
            return self._next(ctx)

    def _next(self, ctx: Context) -> Batch:
        try:
            if self._auto_publish and self._n_fragments + self._n_lost:
                self.publish()
            if self._interrupted:
                ctx.restart()
                self._interrupted = False
            with torch.inference_mode(False):  # the user may be inside of it
                batch = self._collect(ctx)
        except Exception as e:
            self._why_closed = f" after {describe(e)}"
            with contextlib.suppress(Exception):  # a broken environment may not close either: the first error counts
                self.close()
            raise
        except BaseException:  # Ctrl-C: the fragment in hand is lost, the collector is not
            self._interrupted = True
            self._n_lost += 1
            raise
        self._n_fragments += 1
        return batch

    def _collect(self, ctx: Context) -> Batch:
        slot = self._slots[self._n_fragments % N_SLOTS]
        if self._debug:
            slot.poison()
        collect(ctx, slot)
        if self._debug:
            check_forward(ctx, slot)
        meta = (FragmentMeta(self.version, 0, self._n_fragments + 1),)
        batch = Batch.of_record(slot.pt, meta, self.version)
        if ctx.device.type != "cpu":
            batch = batch.to(ctx.device)
        return self._aging(batch) if self._debug else batch

    def publish(self) -> int:
        """Let the weights of the learner act from the next fragment on; returns their version."""
        self._open()
        with self._alone.learner.clock.during("publish"):
            self._learner.pack(self._weights)
            self._acting.unpack(self._weights)
        self.version += 1
        return self.version

    def stats(self) -> dict[str, Any]:
        """Counters so far: fragments yielded and lost, environment steps, rows without one, the version, seconds by
        stage."""
        times = self._ctx.times if self._ctx else self._final_times
        return {
            "version": self.version,
            "fragments": self._n_fragments,
            "lost": self._n_lost,
            **times.figures(),
        }

    def status(self) -> dict[str, Any]:
        """`stats` as plain JSON, where the time goes, and what `annotate` was given; the keys are those of
        `zrl.rollout.pipeline.PipelineRollout.status`, as far as they make sense here."""
        return self._alone.status(self.stats(), self._n_fragments, self._n_fragments)

    def annotate(self, note: Mapping[str, Any]) -> None:
        """Say something about the training, for `status`: see `zrl.rollout.pipeline.PipelineRollout.annotate`.

        Raises:
            ConfigError: it is no plain JSON, or too much.
        """
        self._alone.learner.annotate(note)

    def _open(self) -> Context:
        if self._ctx is None:
            raise ClosedError(f"this collector was closed{self._why_closed}; make a new one")
        return self._ctx

    def close(self) -> None:
        """Close the environments, unless ``close=False`` was given. Batches already yielded stay as they are."""
        ctx, self._ctx = self._ctx, None
        if ctx is None:
            return
        self._final_times = ctx.times
        self._alone.learner.clock.stop()
        if self._close_envs:
            ctx.columns.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if tensors can be made there.

    Raises:
        ConfigError: no such device, or it cannot be used.
    """
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device: {str(device)!r} cannot be used: {str(e).splitlines()[0]}") from e


def private_copy(actor: torch.nn.Module, device: torch.device, worker_mode: str) -> BaseActorModule:
    """A copy of the bare actor that acts: on `device`, in its mode, without gradients.

    Raises:
        ActorError: not a `BaseActorModule`, or it cannot be copied.
    """
    bare = unwrap(actor)
    if not isinstance(bare, BaseActorModule):
        raise ActorError("not an actor", expected="a zrl.BaseActorModule", found=type(bare).__name__)
    try:
        acting = copy.deepcopy(bare)
    except Exception as e:
        raise ActorError(f"the actor cannot be copied ({describe(e)}); keep locks, files and graphs out of it") from e
    return acting.to(device).train(worker_mode == "train").requires_grad_(False)


def _memory(nbytes: int, pinned: bool) -> Any:
    """Memory of a slot: ours if it need not be pinned (None)."""
    if not pinned:
        return None
    if not torch.cuda.is_available():
        warnings.warn("pinned=True has no effect without CUDA", stacklevel=4)
        return None
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
