"""zrl: rollout collection for reinforcement learning.

Where to begin: `zrl.rollout.multi.rollout` yields `Batch`es of trajectory fragments for your own training loop, made by
worker processes; `zrl.rollout.same.rollout` makes them in this one. An actor is a `BaseActorModule`; `evaluate` plays
episodes; `zrl.algo` has returns, advantages and losses; `zrl.zoo` examples.
"""

from importlib.metadata import version as _version

from zrl.collect.actor import BaseActorModule
from zrl.collect.evaluate import evaluate
from zrl.data.batch import Batch, Episode, FragmentMeta
from zrl.data.fragment import State
from zrl.errors import (
    ActorError,
    CheckpointError,
    ClosedError,
    ConfigError,
    EnvError,
    ProcessError,
    ProtocolError,
    RecordError,
    SharedMemoryError,
    StarvationError,
    WeightsError,
    WorkerError,
    ZrlError,
)

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
    "ProcessError",
    "ProtocolError",
    "RecordError",
    "SharedMemoryError",
    "StarvationError",
    "State",
    "WeightsError",
    "WorkerError",
    "ZrlError",
    "__version__",
    "evaluate",
]
