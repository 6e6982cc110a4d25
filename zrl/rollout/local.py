"""Starting the workers of this machine: what `single` and `multi` have in common."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from zrl.collect.spaces import Factory
from zrl.errors import ConfigError
from zrl.net.addresses import run_directory
from zrl.nodes.children import Spawner, Zygote
from zrl.nodes.collator import MAX_FRAGMENT_BYTES, Collator, OwnHost, Plan
from zrl.nodes.host import Patience
from zrl.nodes.limits import cores_to_pin_to
from zrl.nodes.logs import Logs
from zrl.nodes.publisher import Publisher
from zrl.nodes.worker import Recipe
from zrl.rollout.inline import InlineRollout
from zrl.rollout.interrupts import Uninterrupted
from zrl.rollout.pipeline import CLOSE_TIMEOUT, PipelineRollout
from zrl.rollout.same import private_copy, usable_device

logger = logging.getLogger("zrl")

StartMethod = Literal["fork", "spawn", "inline"]
WorkerMode = Literal["train", "eval"]
InfoKeys = Mapping[str, Any] | Iterable[str] | None


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """The arguments of `zrl.rollout.multi.rollout`, checked.

    Attributes:
        act_on: device of the workers' actors.
        to: device of the batches.

    Raises:
        ConfigError: an argument makes no sense; names it.
    """

    n_steps: int
    n_actors: int
    n_per_actor: int
    n_buffers: int
    n_per_batch: int
    sticky: bool = False
    close: bool = True
    act_on: torch.device | str = "cpu"
    to: torch.device | str = "cpu"
    start_method: StartMethod = "fork"
    entropy: int | None = None
    max_lag: int | None = None
    worker_mode: WorkerMode = "train"
    auto_publish: bool = True
    keep_final_obs: bool = False
    info_keys: InfoKeys = None
    debug: bool = False
    log_dir: str | Path | None = None
    start_timeout: float = 300.0
    stall_timeout: float = 60.0
    starve_timeout: float = 60.0
    max_fragment_bytes: int = MAX_FRAGMENT_BYTES
    first_version: int = 1
    affinity: bool = False

    def __post_init__(self) -> None:
        for name in (
            "n_steps",
            "n_actors",
            "n_per_actor",
            "n_buffers",
            "n_per_batch",
            "max_fragment_bytes",
            "first_version",
        ):
            check_count(name, getattr(self, name))
        if self.n_buffers < self.n_actors:
            raise ConfigError(f"n_buffers: expected at least one a worker, {self.n_actors}, not {self.n_buffers}")
        if self.n_per_batch > self.n_buffers:
            raise ConfigError(f"n_per_batch: {self.n_per_batch} fragments never fit into n_buffers={self.n_buffers}")
        if self.max_lag is not None:
            check_count("max_lag", self.max_lag, 0)
        if self.max_lag == 0 and self.n_per_batch % self.n_actors:
            raise ConfigError(
                f"n_per_batch: with max_lag=0 every worker delivers as much as the others: expected a multiple of "
                f"n_actors={self.n_actors}, not {self.n_per_batch}"
            )
        if self.start_method not in ("fork", "spawn", "inline"):
            raise ConfigError(f"start_method: expected one of fork, spawn, inline, not {self.start_method!r}")
        for name in ("start_timeout", "stall_timeout"):
            check_seconds(name, getattr(self, name))
        check_run(self.worker_mode, self.entropy, self.info_keys, self.starve_timeout)
        if self.info_keys is not None and not isinstance(self.info_keys, Mapping):
            object.__setattr__(self, "info_keys", tuple(self.info_keys))  # may be an iterator


def check_run(worker_mode: str, entropy: int | None, info_keys: InfoKeys, starve_timeout: float) -> None:
    """What every run has, wherever its workers are.

    Raises:
        ConfigError: names the argument.
    """
    if worker_mode not in ("train", "eval"):
        raise ConfigError(f"worker_mode: expected one of train, eval, not {worker_mode!r}")
    if entropy is not None and check_count("entropy", entropy, 0) >= 1 << 128:
        raise ConfigError(f"entropy: expected less than 2**128, not {entropy}")
    if isinstance(info_keys, str):
        raise ConfigError(f"info_keys: expected names or a mapping, not the text {info_keys!r}")
    check_seconds("starve_timeout", starve_timeout)


def check_seconds(name: str, value: Any) -> None:
    """Raise a ConfigError unless `value` is a number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name}: expected seconds, more than 0, not {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value`, if it is a whole number of at least `least`.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, not {value!r}")
    return value


def start(factory: Factory, actor: torch.nn.Module, o: LocalOptions) -> PipelineRollout | InlineRollout:
    """Start the workers and all that is between them and the iterator.

    Raises:
        ConfigError, ActorError, WeightsError, SharedMemoryError, ProcessError: see `zrl.rollout.multi.rollout`.
    """
    if not callable(factory):
        raise ConfigError(f"factory: expected a callable that makes one environment, not {factory!r:.100}")
    act_on, to = usable_device(o.act_on), usable_device(o.to)
    entropy = secrets.randbits(64) if o.entropy is None else o.entropy
    if o.start_method == "inline":
        return InlineRollout(factory, actor, o, entropy=entropy, act_on=act_on, to=to)
    recipe = Recipe(
        factory,
        private_copy(actor, torch.device("cpu"), o.worker_mode),
        o.info_keys,
        device=str(act_on),
        debug=o.debug,
        close=o.close,
    )
    if o.n_buffers < 2 * o.n_actors:
        logger.info("n_buffers: with two for each of the %d workers, they would not wait for copies", o.n_actors)
    with Uninterrupted():
        publisher = Publisher(actor, run_id=os.urandom(16), version=o.first_version)
        try:
            collator = _collator(recipe, publisher, o, entropy, to)
        except BaseException:
            publisher.close()
            raise
        return PipelineRollout(collator, publisher, entropy=entropy, auto_publish=o.auto_publish, debug=o.debug)


def _collator(recipe: Recipe, publisher: Publisher, o: LocalOptions, entropy: int, to: torch.device) -> Collator:
    """A started collator with its workers under way."""
    run_dir = run_directory()
    log_dir = None if o.log_dir is None else Path(o.log_dir)
    keep_log = Logs(log_dir).keep
    kind = Spawner if o.start_method == "spawn" else Zygote
    try:
        zygote = kind.start(
            "zrl.nodes.worker:main",
            recipe,
            run_dir=run_dir,
            log_dir=log_dir or run_dir / "logs",
            preload=["zrl.nodes.worker"],
            keep_log=keep_log,
        )
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
    patience = Patience(stall=o.stall_timeout, start=o.start_timeout)
    try:
        collator = Collator(
            Plan(
                n_steps=o.n_steps,
                n_columns=o.n_per_actor,
                n_per_batch=o.n_per_batch,
                slots_of=dealt(o.n_buffers, o.n_actors),
                n_workers=o.n_actors,
                max_lag=o.max_lag,
                entropy=entropy,
                sticky=o.sticky,
                keep_final_obs=o.keep_final_obs,
                worker_mode=o.worker_mode,
                starve_timeout=o.starve_timeout,
                max_fragment_bytes=o.max_fragment_bytes,
            ),
            publisher,
            run_dir,
            to,
            OwnHost(zygote, o.n_actors, patience, keep_log, cores_to_pin_to(o.affinity)),
        )
    except BaseException:
        zygote.close(time.monotonic() + CLOSE_TIMEOUT)
        raise
    try:
        collator.start()
    except BaseException:
        collator.close(time.monotonic() + CLOSE_TIMEOUT)
        raise
    return collator


def dealt(n_buffers: int, n_workers: int) -> Callable[[int], int]:
    """K of each worker by index: as evenly as it goes, the first ones get the rest."""
    each, rest = divmod(n_buffers, n_workers)
    return lambda index: each + (index < rest)
