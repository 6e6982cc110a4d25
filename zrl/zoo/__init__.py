"""Example actors and environments, the latter registered with Gymnasium by the names in parentheses.

NarrowPath and ChainMDP (``zrl/NarrowPath-v0``, ``zrl/ChainMDP-v0``) are small and have known answers. Atari games as
stacks of frames (``zrl/Atari-v0``) need the extra ``atari``, MiniGrid with missions as numbers (``zrl/MiniGrid-v0``)
the extra ``minigrid``.
"""

import gymnasium as _gym

from zrl.zoo.actors import CNNActor, GRUActor, MLPActor, default_actor
from zrl.zoo.atari import AtariFrames, make_atari
from zrl.zoo.envs import ChainMDP, NarrowPath
from zrl.zoo.minigrid import MissionWords, make_minigrid

__all__ = [
    "AtariFrames",
    "CNNActor",
    "ChainMDP",
    "GRUActor",
    "MLPActor",
    "MissionWords",
    "NarrowPath",
    "default_actor",
    "make_atari",
    "make_minigrid",
]

for _id, _entry, _limit in (
    ("zrl/NarrowPath-v0", "zrl.zoo.envs:NarrowPath", 200),
    ("zrl/ChainMDP-v0", "zrl.zoo.envs:ChainMDP", 100),
    ("zrl/Atari-v0", "zrl.zoo.atari:make_atari", None),  # the games have limits of their own
    ("zrl/MiniGrid-v0", "zrl.zoo.minigrid:make_minigrid", None),
):
    if _id not in _gym.registry:
        _gym.register(_id, entry_point=_entry, max_episode_steps=_limit)
