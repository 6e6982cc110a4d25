"""Rollouts collected by one worker process on this machine, double-buffered, while the training loop computes."""

from __future__ import annotations

from pathlib import Path

import torch

from zrl.collect.spaces import Factory
from zrl.nodes.collator import MAX_FRAGMENT_BYTES
from zrl.rollout.inline import InlineRollout
from zrl.rollout.local import InfoKeys, LocalOptions, StartMethod, WorkerMode, check_count, start
from zrl.rollout.pipeline import PipelineRollout

N_SLOTS = 2  # one is filled while the other waits or is copied


def rollout(
    factory: Factory,
    actor: torch.nn.Module,
    n_steps: int,
    n_envs: int,
    *,
    sticky: bool = False,
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
) -> PipelineRollout | InlineRollout:
    """Collect fragments of `n_steps` steps of `n_envs` environments in one other process, without end.

    The worker has two slots: it fills one while the other waits or is copied. A batch is one fragment. All else is as
    in `zrl.rollout.multi.rollout`, where the arguments are explained, except:

    Args:
        n_envs: B.
        device: where the worker's actor acts, and where the batches are; the CPU, if None.

    Raises:
        ConfigError: an argument makes no sense (also a ValueError).
        ActorError, WeightsError: the actor cannot be copied or published.
        ProcessError: no process can be started.
        WorkerError, StarvationError: by ``next()``.
    """
    options = LocalOptions(
        n_steps,
        n_actors=1,
        n_per_actor=check_count("n_envs", n_envs),
        n_buffers=N_SLOTS,
        n_per_batch=1,
        sticky=sticky,
        close=close,
        act_on=device or "cpu",
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
    )
    return start(factory, actor, options)
