"""What a host tells a worker that it starts. Apart from `worker`, because hosts need not import torch for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from zrl.data.memory import MemoryAddress
from zrl.protocol.restarts import Restarts


@dataclass(frozen=True)
class WorkerJob:
    """Who a worker is, and where it finds what it shares with its host and with the learner: plain values.

    Attributes:
        url: of the learner's ROUTER.
        board_digest, board_nbytes: of the weights' manifest.
        shm: whether its ring is made such that the learner can open it.
        keys: path of its host's key files, see `zrl.net.keys.HostKeys`; empty: none.
        core: that it is to stay on; None: wherever there is room.
        rebuilds: budget of environments that it may make anew, by column.
    """

    url: str
    name: str
    run_id: bytes
    host: bytes
    incarnation: bytes
    index: int
    generation: int
    page: MemoryAddress
    board: MemoryAddress
    board_digest: bytes
    board_nbytes: int
    keys: str = ""
    shm: bool = True
    core: int | None = None
    rebuilds: Restarts = field(default_factory=Restarts)
