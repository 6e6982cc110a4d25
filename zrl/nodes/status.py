"""The status of a run: what its figures are, as one document of plain JSON.

The learner publishes it every second, for hosts as a sign of life and for people to look at (`zrl.net.observer`);
`status()` of every collector gives the same. docs/protocol.md has its keys.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from zrl.errors import ConfigError
from zrl.metrics import LearnerClock
from zrl.protocol.messages import LARGE_HEADER
from zrl.protocol.peers import Peers
from zrl.protocol.slots import Slot, SlotTable

ROOM = 48 << 10  # bytes of a document; beyond it rows of workers are left out. A larger frame cuts connections
LEAST_ROW = 160  # bytes of a worker's row, at least
MOST_NOTE = 16 << 10  # bytes of what the training loop may add
MOST_DEPTH = 8  # of it
VERSION = version("zrl")

#: What is left of a document that would be too long even without its rows of workers.
_ESSENTIAL = ("run_id", "version", "time", "zrl", "uptime", "url", "ending", "verdict", "peers_omitted")


@dataclass
class Learner:
    """What the user's thread has done. It writes, others read: every value is replaced as a whole, or only counted up.

    Attributes:
        clock: its seconds by phase.
        batches: yielded.
        lags: fragments of these, by lag.
        training: what the training loop says of itself.
    """

    clock: LearnerClock = field(default_factory=LearnerClock)
    batches: int = 0
    lags: Counter[int] = field(default_factory=Counter)
    training: dict[str, Any] | None = None

    def annotate(self, note: Mapping[str, Any]) -> None:
        """Replace what the training loop says of itself: a copy of `note`, with None for what is not finite.

        Raises:
            ConfigError: something that is not plain JSON, or more than 16 KiB of it.
        """
        if not isinstance(note, Mapping):
            raise ConfigError(f"annotate: expected a mapping, not {note!r:.100}")
        training = plain(note, "annotate")
        if (size := len(json.dumps(training))) > MOST_NOTE:
            raise ConfigError(f"annotate: {size} bytes of JSON, at most {MOST_NOTE}: say less")
        self.training = training

    def figures(self) -> dict[str, Any]:
        """Its part of `stats`: batches, and how many of their fragments had which lag."""
        return {"batches": self.batches, "lag": dict(sorted(dict(self.lags).items()))}

    def seconds(self) -> dict[str, float]:
        """Its part of the seconds in `stats`."""
        spent = self.clock.read()
        return {"learner_wait": spent["wait"], "train": spent["train"], "publish": spent["publish"]}


def document(stats: Mapping[str, Any], learner: Learner, **more: Any) -> dict[str, Any]:
    """Figures as a status: plain JSON. The histogram of lags is called ``lags`` there.

    Args:
        stats: those of the collector.
        learner: adds what the training loop says.
        more: ``lag`` (min, mean, max), ``time``, ``uptime``, ``url`` and whatever else there is to say.
    """
    rest = {name: x for name, x in stats.items() if name != "lag"}
    note = {} if learner.training is None else {"training": learner.training}
    found: dict[str, Any] = plain(
        {**rest, "lags": stats.get("lag", {}), "zrl": VERSION, "ending": False, **more, **note},
        "status",
        depth=MOST_DEPTH + 2,
    )
    return found


def has_room(n_workers: int) -> bool:
    """Whether the rows of so many workers may fit into a frame. Those of a thousand, made only to be left out, would
    keep the collator for 20 ms a second."""
    return n_workers * LEAST_ROW <= ROOM


def frame(status: Mapping[str, Any]) -> bytes:
    """A status as JSON of less than 64 KiB, whatever is in it: without the rows of workers above 48 KiB."""
    data = json.dumps(status, allow_nan=False).encode()
    if len(data) > ROOM:
        short = {name: x for name, x in status.items() if name not in ("peers", "by_host")}
        short.setdefault("peers_omitted", len(status.get("peers", ())))
        data = json.dumps(short, allow_nan=False).encode()
        if len(data) > ROOM:
            data = json.dumps({name: short[name] for name in _ESSENTIAL if name in short}, allow_nan=False).encode()
    assert len(data) < LARGE_HEADER
    return data


def plain(value: Any, where: str, depth: int = MOST_DEPTH) -> Any:
    """`value` as JSON has it: texts for keys, lists for tuples, None for numbers that are not finite.

    Raises:
        ConfigError: names the place of what is something else, or too deep.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (Mapping, list, tuple)):
        if not depth:
            raise ConfigError(f"{where}: nested too deeply")
        if isinstance(value, Mapping):
            return {str(key): plain(x, f"{where}: {key}", depth - 1) for key, x in value.items()}
        return [plain(x, f"{where}[{k}]", depth - 1) for k, x in enumerate(value)]
    raise ConfigError(
        f"{where}: expected numbers, texts, None, and lists and mappings of them, not {type(value).__name__}; "
        "call float() or str() on it"
    )


def rows_of(peers: Peers, slots: SlotTable, now: float) -> list[dict[str, Any]]:
    """One row a worker, by index. free + worker + ready + held = n_slots, which is 0 before its ring is attached."""
    rows = []
    for worker in sorted(peers.workers.values(), key=lambda w: w.index):
        ring = slots.rings.get(worker.incarnation)
        counts = ring.counts if ring is not None and ring.live else [0] * len(Slot)
        rows.append(
            {
                "index": worker.index,
                "host": worker.host.name,
                "generation": worker.generation,
                "phase": worker.phase,
                "slots": {state.name.lower(): counts[state] for state in Slot if state is not Slot.ENDED},
                "n_slots": sum(counts),
                "calls": worker.beat.calls if worker.beat is not None else 0,
                "sent": worker.beat.sent if worker.beat is not None else 0,
                "age": max(0.0, now - worker.moved),
            }
        )
    return rows


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
