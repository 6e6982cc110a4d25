"""Rollouts collected by whoever connects: `zrl worker` processes, started by hand or by something else."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from zrl.errors import ConfigError
from zrl.net.keys import learner_keys
from zrl.nodes.collator import Collator, Plan
from zrl.nodes.publisher import Publisher
from zrl.protocol.redirect import Redirect
from zrl.rollout.interrupts import Uninterrupted
from zrl.rollout.local import WorkerMode, check_count, check_run
from zrl.rollout.pipeline import CLOSE_TIMEOUT, PipelineRollout
from zrl.rollout.same import usable_device

logger = logging.getLogger("zrl")


def rollout(
    env: str,
    actor: torch.nn.Module,
    n_steps: int,
    n_per_actor: int,
    n_slots: int,
    n_per_batch: int,
    *,
    bind: str | Sequence[str],
    keys: str | os.PathLike[str] | None = None,
    insecure: bool = False,
    actor_name: str = "zrl.zoo:default_actor",
    n_actors: int | None = None,
    sticky: bool = False,
    device: torch.device | str | None = None,
    entropy: int | None = None,
    max_lag: int | None = None,
    worker_mode: WorkerMode = "train",
    auto_publish: bool = True,
    keep_final_obs: bool = False,
    info_keys: Iterable[str] = (),
    debug: bool = False,
    starve_timeout: float = 60.0,
    first_version: int = 1,
    indices: range = range(1 << 16),
    redirect: Redirect | None = None,
) -> PipelineRollout:
    """Collect fragments from the workers of every host that connects, without end.

    Hosts may come and go; they make environment and actor from their names. All else is as in
    `zrl.rollout.multi.rollout`, where the arguments are explained, except:

    Args:
        env: name of the environment, for the hosts: a Gymnasium id, or ``module:id`` where importing the module
            registers the id. No function: nothing is sent that would run there.
        actor: the learner's actor.
        n_slots: K, slots of each worker.
        bind: URL or URLs to listen at: ``tcp://127.0.0.1:5555``, ``ipc:///path/to.sock``.
        keys: folder with the learner's keys and those of the hosts and observers that may connect, see ``zrl keys``.
            With it tcp is encrypted; ipc is plain.
        insecure: whether to listen without keys where other machines can connect, too. Anybody there can then feed this
            learner and read its weights.
        actor_name: what makes the actor, for the hosts: ``module:function``, called with the spaces of observations and
            actions.
        n_actors: workers of the run; needed for ``max_lag=0``.
        info_keys: names of keys of the step's info.
        debug: refuse batches past their time, see `zrl.StaleBatchError`.
        starve_timeout: seconds with too few workers, after some were there. For the first one it waits for ever.
        indices: that its workers may have. Several learners with the same `entropy` and disjoint indices have no two
            environments with one seed.
        redirect: sends new hosts to other learners, see `zrl.protocol.redirect`.

    Raises:
        ConfigError: an argument makes no sense, or an address cannot be bound, or a key file cannot be used.
        ZrlError: a stranger's key was not refused.
        WeightsError: the actor cannot be published.
        StarvationError: by ``next()``.
    """
    for name, value in (("n_steps", n_steps), ("n_per_actor", n_per_actor), ("n_slots", n_slots)):
        check_count(name, value)
    check_count("n_per_batch", n_per_batch)
    check_count("first_version", first_version)
    if max_lag is not None:
        check_count("max_lag", max_lag, 0)
    if max_lag == 0 and (n_actors is None or n_per_batch % n_actors or n_slots * n_actors < n_per_batch):
        raise ConfigError(
            f"n_actors: with max_lag=0 it must be given, n_per_batch={n_per_batch} be a multiple of it, and its slots "
            f"be enough for a batch; not {n_actors} with {n_slots} slots each"
        )
    _check_names(env, actor_name)
    check_run(worker_mode, entropy, info_keys, starve_timeout)
    if insecure and keys is not None:
        raise ConfigError("insecure: makes no sense with keys; leave one of them out")
    if insecure:
        logger.warning("insecure: whoever can reach %s can feed this learner and read its weights", bind)
    to = usable_device(device or "cpu")
    seed = secrets.randbits(64) if entropy is None else entropy
    plan = Plan(
        n_steps=n_steps,
        n_columns=n_per_actor,
        n_per_batch=n_per_batch,
        slots_of=lambda index: n_slots,
        n_workers=n_actors or 0,
        max_lag=max_lag,
        entropy=seed,
        sticky=sticky,
        keep_final_obs=keep_final_obs,
        info_keys=tuple(info_keys),
        worker_mode=worker_mode,
        env=env,
        actor=actor_name,
        bind=(bind,) if isinstance(bind, str) else tuple(bind),
        keys=None if keys is None else learner_keys(Path(keys)),
        insecure=insecure,
        starve_timeout=starve_timeout,
        indices=indices,
        redirect=redirect,
    )
    with Uninterrupted():
        publisher = Publisher(actor, run_id=os.urandom(16), version=first_version)
        try:
            collator = _started(Collator(plan, publisher, None, to, None))
        except BaseException:
            publisher.close()
            raise
        return PipelineRollout(collator, publisher, entropy=seed, auto_publish=auto_publish, debug=debug)


def _check_names(env: object, actor_name: object) -> None:
    for name, value, kind, instead in (
        (
            "env",
            env,
            "a Gymnasium id, or module:id",
            "register it with gymnasium.register(id, entry_point) in a module that the hosts have, and start them with "
            "zrl worker --import MODULE",
        ),
        ("actor_name", actor_name, "module:function", "let a function in a module that the hosts have make it"),
    ):
        if not isinstance(value, str) or not value:
            raise ConfigError(
                f"{name}: hosts know environment and actor by their names, for no code travels to them: "
                f"expected {kind}, not {value!r:.100}; {instead}"
            )


def _started(collator: Collator) -> Collator:
    try:
        collator.start()
    except BaseException:
        collator.close(time.monotonic() + CLOSE_TIMEOUT)
        raise
    return collator
