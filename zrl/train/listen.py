"""Where a learner listens. Apart from what does, because that imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listen:
    """Where workers of other hosts connect to, with which keys; see `zrl.rollout.cluster.rollout`. Training begins when
    `expect` of them are there."""

    url: str
    keys: Path | None = None
    insecure: bool = False
    expect: int = 0
