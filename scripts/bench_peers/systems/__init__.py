"""Who does the work: the table of systems. One module each; its docstring says how the work was approximated, where it
could not be the same, and always in the system's favour.

A module has ``run(work, window, **options)``, which tells the window of every delivery until that is enough, and, if
it takes part in "solve", ``solve(seed, **options)``, which returns the steps it took (None: given up), and two times
of ``time.perf_counter``: of the first batch, and of the goal; what comes after that is nobody's business. Peers are
imported inside modules that nobody else imports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

#: What the environments need besides; versions are left to what the peer allows.
GAMES = ("ale-py", "opencv-python-headless", "minigrid", "gymnasium[mujoco]")
#: For peers that insist on Gymnasium 0.29, which later versions of ale-py do not know.
OLD_GAMES = ("ale-py==0.10.1", *GAMES[1:])
COLLECT = ("w1", "w2", "w3")
LEARN = ("w1l", "ppo")
ALL = (*COLLECT, *LEARN, "w4")
POOLS = ("w5_cartpole", "w5_wide", "w5_pong")


@dataclasses.dataclass(frozen=True)
class System:
    """One way to do the works.

    Attributes:
        module: in ``bench_peers.systems``.
        venv: its virtual environment; "": that of zrl.
        package: whose version is recorded.
        works: those that it does.
        options: of ``run`` and ``solve``.
        lacks: why it does not do some other works, by name.
    """

    module: str
    venv: str = ""
    package: str = "zrl"
    works: tuple[str, ...] = ALL
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def why_not(self, work: str) -> str | None:
        """Why it does not do this work; None where it does, or where nobody would expect it."""
        return None if work in self.works else self.lacks.get(work)


#: What pip installs into each virtual environment. torch is everywhere the one of constraints.txt.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "sb3": ("stable-baselines3==2.9.2", *GAMES),
    "torchrl": ("torchrl==0.14.1", *GAMES),
    "sample_factory": ("sample-factory==2.1.1", *OLD_GAMES),
    "tianshou": ("tianshou==2.0.1", *GAMES),
    "pufferlib": ("pufferlib==1.0.1", "psutil", "torch", *OLD_GAMES),
    "rllib": ("ray[rllib]==2.60.0", "torch", *GAMES),
}

_REST = dict.fromkeys(("w1", "w2", "w3", "w4", "ppo"), "not configured here")
_NO_GRU = {"w4": "no recurrent policy"}
_SB3 = System("sb3", "sb3", "stable-baselines3", (*COLLECT, *LEARN), lacks=_NO_GRU)
_TORCHRL = System("torchrl", "torchrl", "torchrl", (*COLLECT, *LEARN), lacks={"w4": "not configured here"})
_TIANSHOU = System("tianshou", "tianshou", "tianshou", (*COLLECT, *LEARN), lacks={"w4": "not configured here"})
_PUFFER = System(
    "pufferlib",
    "pufferlib",
    "pufferlib",
    ("w1", "w2", *LEARN),
    lacks={"w3": "no continuous actions", "w4": "not configured here"},
)


def _with(system: System, **changes: Any) -> System:
    return dataclasses.replace(system, **changes)


SYSTEMS: dict[str, System] = {
    "plain": System("plain", package="torch", works=(*COLLECT, "w4", *LEARN)),
    "plain-race": System("plain", package="torch", works=("w1", "w2", "w4"), options={"race": True}),
    "plain-learns": System("plain", package="torch", works=LEARN, options={"learns": True}),
    "zrl": System("zrl", works=(*ALL, *POOLS, "solve")),
    "zrl-numpy": System("zrl", works=("w1", "w3", "w4", *LEARN, *POOLS[:2]), options={"numpy": True}),
    "zrl-pinned": System("zrl", works=POOLS, options={"numpy": True, "affinity": True}),
    "zrl-frames": System("zrl", works=("w2",), options={"frames": True}),
    "envpool": System("envpool", package="envpool", works=(*COLLECT, *LEARN, *POOLS), lacks=_NO_GRU),
    "envpool-pinned": System("envpool", package="envpool", works=("w1", "w1l", *POOLS), options={"pinned": True}),
    "sb3-dummy": _with(_SB3, works=(*_SB3.works, "solve"), options={"processes": False}),
    "sb3-subproc": _with(_SB3, options={"processes": True}),
    "pufferlib": _with(_PUFFER, options={"processes": False}),
    "pufferlib-mp": _with(_PUFFER, options={"processes": True}),
    "sample-factory": System(
        "sample_factory",
        "sample_factory",
        "sample-factory",
        (*COLLECT, "w1l", "w4", "solve"),
        lacks={"ppo": "its update is that of w1l"},
    ),
    "tianshou-dummy": _with(_TIANSHOU, options={"processes": False}),
    "tianshou-subproc": _with(_TIANSHOU, options={"processes": True}),
    "torchrl-sync": _with(_TORCHRL, options={"asynchronous": False}),
    "torchrl-async": _with(_TORCHRL, works=(*COLLECT, "w1l"), options={"asynchronous": True}),
    "rllib": System("rllib", "rllib", "ray", ("w1l",), lacks=_REST),
}
