"""Every exception that zrl raises on purpose, from the most general to the most particular.

    ZrlError
    ├── ConfigError          a setting, an argument or a combination of them makes no sense (also a ValueError)
    │   └── MissingExtraError  it needs a package that is not installed
    ├── RecordError          what an environment or an actor gives cannot be recorded
    │   ├── EnvError         an environment: its factory, its spaces, `reset` or `step`
    │   └── ActorError       an actor: its outputs, its state, its manners
    ├── SharedMemoryError    a mapping could not be made, attached or trusted
    ├── WeightsError         weights that do not fit the module they are meant for
    ├── CheckpointError      no valid checkpoint where one was asked for
    ├── ProtocolError        bytes from a peer, or a value for one, that are no message
    ├── WorkerError          a worker process failed, and is not replaced
    ├── StarvationError      too few slots are alive to form a batch, for too long
    ├── ProcessError         the process that starts workers cannot be started, or has ended
    ├── ClosedError          the collector was closed before this call
    ├── StaleBatchError      a batch was used past its time, which `debug=True` notices
    └── PreflightError       environment, actor or machine were refused before the first step of a training

A message names the field, what was expected and what came, and the next step where there is one.
"""

from __future__ import annotations


class ZrlError(Exception):
    """Base of every exception that zrl raises on purpose."""


class ConfigError(ZrlError, ValueError):
    """A setting, an argument or a combination of them makes no sense."""


class MissingExtraError(ConfigError):
    """What was asked for needs a package that is not installed; the message says how to install it."""


class RecordError(ZrlError):
    """What an environment or an actor gives cannot be recorded.

    Attributes:
        leaf: path of the offending leaf, such as ``state.obs['pos']``; empty where no single leaf is at fault.
        expected: what the record's specification calls for; empty where that makes no sense.
        found: what came instead; empty likewise.
    """

    def __init__(self, what: str, *, leaf: str = "", expected: str = "", found: str = "") -> None:
        parts = [what]
        if leaf:
            parts.append(f"leaf {leaf}")
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        super().__init__("; ".join(parts))
        self.leaf = leaf
        self.expected = expected
        self.found = found


EVERY = -2  # instead of the index of a column: all of a vector environment


class EnvError(RecordError):
    """An environment broke its contract, or raised.

    An exception raised inside the environment is kept as ``__cause__``.

    Attributes:
        env_index: column of the environment within its collector; -1 for the scratch environment that is probed at the
            start and for the factory itself; `EVERY` for a vector environment as a whole.
        phase: ``"factory"``, ``"spaces"``, ``"reset"`` or ``"step"``.
    """

    def __init__(
        self, what: str, *, env_index: int, phase: str, leaf: str = "", expected: str = "", found: str = ""
    ) -> None:
        others = {EVERY: "vector environment"}
        who = f"environment {env_index}" if env_index >= 0 else others.get(env_index, "environment (scratch instance)")
        super().__init__(f"{who}, {phase}: {what}", leaf=leaf, expected=expected, found=found)
        self.env_index = env_index
        self.phase = phase


class ActorError(RecordError):
    """An actor broke the contract of `zrl.BaseActorModule`, or raised."""


class SharedMemoryError(ZrlError):
    """A mapping could not be made, attached or trusted."""


class WeightsError(ZrlError):
    """Weights do not fit the module that they are meant for."""


class CheckpointError(ZrlError):
    """No valid checkpoint where one was asked for, or a checkpoint that cannot be read or written."""


class ProtocolError(ZrlError):
    """Bytes from a peer, or a value for one, that are no message of the protocol."""


class WorkerError(ZrlError):
    """A worker process failed before its first fragment, or more often than its budget of restarts allows.

    Attributes:
        worker: index of the worker.
        env_index: column of the environment that is to blame; -1 where none is.
        remote_traceback: of the exception in the worker, as text; empty where there was none.
        at_start: whether it failed before its first fragment.
    """

    def __init__(
        self, what: str, *, worker: int, env_index: int = -1, remote_traceback: str = "", at_start: bool = False
    ) -> None:
        where = f"worker {worker}" + (f", environment {env_index}" if env_index >= 0 else "")
        trace = f"\n\nin the worker:\n{remote_traceback.rstrip()}" if remote_traceback else ""
        super().__init__(f"{where}: {what}{trace}")
        self.worker = worker
        self.env_index = env_index
        self.remote_traceback = remote_traceback
        self.at_start = at_start


class StarvationError(ZrlError):
    """Too few slots are alive to form a batch, or none at all, for longer than ``starve_timeout``."""


class ProcessError(ZrlError):
    """The process that starts workers cannot be started, or has ended."""


class ClosedError(ZrlError):
    """The collector was closed before this call."""


class StaleBatchError(ZrlError):
    """A batch was used past its time. Only ``debug=True`` notices; else its numbers are those of another batch."""


class PreflightError(ZrlError):
    """Environment, actor, device or folder were refused before the first step; the reason is ``__cause__``."""
