"""zrl: rollout collection for reinforcement learning.

Where to begin: `zrl.rollout.multi.rollout` yields `Batch`es of trajectory fragments for your own training loop, made by
worker processes; `zrl.rollout.same.rollout` makes them in this one. An actor is a `BaseActorModule`; `evaluate` plays
episodes; `zrl.algo` has returns, advantages and losses; `zrl.zoo` examples.
"""

from importlib import import_module as _import
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from zrl.errors import (
    ActorError,
    CheckpointError,
    ClosedError,
    ConfigError,
    EnvError,
    MissingExtraError,
    PreflightError,
    ProcessError,
    ProtocolError,
    RecordError,
    SharedMemoryError,
    StaleBatchError,
    StarvationError,
    WeightsError,
    WorkerError,
    ZrlError,
)

if TYPE_CHECKING:
    from zrl.collect.actor import BaseActorModule
    from zrl.collect.evaluate import evaluate
    from zrl.data.batch import Batch, Episode, FragmentMeta
    from zrl.data.fragment import State
    from zrl.nodes.prestart import end_prestarted, prestart

__version__ = _version("zrl")

__all__ = [
    "ActorError",
    "BaseActorModule",
    "Batch",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "EnvError",
    "Episode",
    "FragmentMeta",
    "MissingExtraError",
    "PreflightError",
    "ProcessError",
    "ProtocolError",
    "RecordError",
    "SharedMemoryError",
    "StaleBatchError",
    "StarvationError",
    "State",
    "WeightsError",
    "WorkerError",
    "ZrlError",
    "__version__",
    "end_prestarted",
    "evaluate",
    "prestart",
]

#: Imported when they are asked for: torch takes seconds, and who keeps workers or asks for help does not need it.
_ON_DEMAND = {
    "BaseActorModule": "zrl.collect.actor",
    "Batch": "zrl.data.batch",
    "Episode": "zrl.data.batch",
    "FragmentMeta": "zrl.data.batch",
    "State": "zrl.data.fragment",
    "end_prestarted": "zrl.nodes.prestart",
    "evaluate": "zrl.collect.evaluate",
    "prestart": "zrl.nodes.prestart",
}


def __getattr__(name: str) -> object:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'zrl' has no attribute {name!r}")
    value = globals()[name] = getattr(_import(_ON_DEMAND[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
