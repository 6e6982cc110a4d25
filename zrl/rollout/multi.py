"""Rollouts collected by several worker processes on this machine, while the training loop computes."""

from __future__ import annotations

from pathlib import Path

import torch

from zrl.collect.spaces import Factory
from zrl.nodes.collator import MAX_FRAGMENT_BYTES
from zrl.rollout.inline import InlineRollout
from zrl.rollout.local import InfoKeys, LocalOptions, StartMethod, WorkerMode, start
from zrl.rollout.pipeline import PipelineRollout


def rollout(
    factory: Factory,
    actor: torch.nn.Module,
    n_steps: int,
    n_actors: int,
    n_per_actor: int,
    n_buffers: int,
    n_per_batch: int,
    *,
    sticky: bool = False,
    pinned: bool = False,
    close: bool = True,
    device: torch.device | str | None = None,
    start_method: StartMethod = "fork",
    entropy: int | None = None,
    max_lag: int | None = None,
    worker_mode: WorkerMode = "train",
    auto_publish: bool = True,
    keep_final_obs: bool = False,
    info_keys: InfoKeys = None,
    debug: bool = False,
    log_dir: str | Path | None = None,
    start_timeout: float = 300.0,
    stall_timeout: float = 60.0,
    starve_timeout: float = 60.0,
    max_fragment_bytes: int = MAX_FRAGMENT_BYTES,
    first_version: int = 1,
    affinity: bool = False,
) -> PipelineRollout | InlineRollout:
    """Collect fragments of `n_steps` steps of `n_per_actor` environments in each of `n_actors` processes, without end.

    Each ``next()`` but the first publishes the weights of `actor`, then yields a batch of `n_per_batch` fragments (see
    `zrl.Batch`), made by whichever workers were first. A worker takes the newest weights over between two fragments;
    how old those of a batch are says ``batch.lag``. A batch is valid until the next-but-one ``next()``; ``clone()`` it
    to keep it longer. A worker that dies is replaced.

    Args:
        factory: makes one Gymnasium environment, called without arguments or with ``seed=`` if it has such a parameter.
            It may be defined in a notebook or an unguarded script.
        actor: the learner's actor, a `BaseActorModule`, wrapped by ``torch.compile`` or DistributedDataParallel or not.
            The workers act with copies.
        n_steps: T.
        n_actors: worker processes.
        n_per_actor: B, environments of each of them.
        n_buffers: fragments that are made, wait or are copied at a time, dealt out among the workers as evenly as it
            goes. With one each a worker waits while its fragment is copied; two each overlap.
        n_per_batch: P, fragments of a batch, which has ``P * B`` columns.
        sticky: freeze an environment whose episode ends within a fragment until the fragment's end.
        pinned: has no effect: the workers' memory is page-locked where `device` is a GPU.
        close: close the environments when the workers end.
        device: of the batches; the CPU, if None.
        start_method: ``"fork"``: from a process that has imported everything, and nothing else; ``"spawn"``: a fresh
            interpreter for each; ``"inline"``: no processes, one worker after the other in this one, for debuggers.
        entropy: seed of everything random in the workers; drawn, if None.
        max_lag: None: fully asynchronous. k ≥ 1: no fragment of a batch is older than k versions; what is older
            gets dropped and counted. 0: synchronous, on-policy, and reproducible bit for bit; `n_per_batch` must be a
            multiple of `n_actors`.
        worker_mode: ``"train"`` or ``"eval"``: the mode of the workers' copies, whatever the learner's is.
        auto_publish: publish at each ``next()`` but the first; otherwise call ``publish()``.
        keep_final_obs: record the true final observation of every episode.
        info_keys: keys of the step's info to record in ``batch.env``: names, or a mapping from name to dtype, space or
            example array.
        debug: check at every step what is otherwise checked once or not at all, and refuse batches past their time.
        log_dir: folder of the workers' output; a temporary one that goes at the end, if None.
        start_timeout: seconds that a worker may take to build its environments.
        stall_timeout: seconds that one call of an environment may take.
        starve_timeout: seconds with too few workers alive for a batch, after which ``next()`` raises.
        max_fragment_bytes: a larger fragment is refused, rather than filling the machine by mistake.
        first_version: of the weights as they are now; a run that goes on with another counts on.
        affinity: keep each worker on one core, in turn, of those that this process may use; its memory is then near
            that core. Worth a try where there are many cores; Linux only.

    Raises:
        ConfigError: an argument makes no sense (also a ValueError).
        ActorError, WeightsError: the actor cannot be copied or published.
        ProcessError: no process can be started.
        WorkerError, StarvationError: by ``next()``.
    """
    options = LocalOptions(
        n_steps,
        n_actors,
        n_per_actor,
        n_buffers,
        n_per_batch,
        sticky=sticky,
        close=close,
        to=device or "cpu",
        start_method=start_method,
        entropy=entropy,
        max_lag=max_lag,
        worker_mode=worker_mode,
        auto_publish=auto_publish,
        keep_final_obs=keep_final_obs,
        info_keys=info_keys,
        debug=debug,
        log_dir=log_dir,
        start_timeout=start_timeout,
        stall_timeout=stall_timeout,
        starve_timeout=starve_timeout,
        max_fragment_bytes=max_fragment_bytes,
        first_version=first_version,
        affinity=affinity,
    )
    return start(factory, actor, options)
