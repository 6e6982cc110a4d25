"""Example actors and environments; the latter registered as ``zrl/NarrowPath-v0`` and ``zrl/ChainMDP-v0``."""

import gymnasium as _gym

from zrl.zoo.actors import CNNActor, GRUActor, MLPActor, default_actor
from zrl.zoo.envs import ChainMDP, NarrowPath

__all__ = ["CNNActor", "ChainMDP", "GRUActor", "MLPActor", "NarrowPath", "default_actor"]

for _id, _entry, _limit in (
    ("zrl/NarrowPath-v0", "zrl.zoo.envs:NarrowPath", 200),
    ("zrl/ChainMDP-v0", "zrl.zoo.envs:ChainMDP", 100),
):
    if _id not in _gym.registry:
        _gym.register(_id, entry_point=_entry, max_episode_steps=_limit)
