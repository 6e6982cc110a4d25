"""Where a learner listens. Apart from what does, because that imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zrl.protocol.redirect import Redirect


@dataclass(frozen=True)
class Listen:
    """Where workers of other hosts connect to, with which keys; see `zrl.rollout.cluster.rollout`. Training begins when
    `expect` of them are there. One of several learners has `indices` of its own, and the first of them sends hosts to
    the others (`redirect`)."""

    url: str
    keys: Path | None = None
    insecure: bool = False
    expect: int = 0
    indices: range = range(1 << 16)
    redirect: Redirect | None = None
