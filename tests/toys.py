"""Environments and actors that count, so that every number in a record can be worked out by hand.

`CountingEnv` shows where it is: its observation is (column, episode, step). `CountingActor` counts its steps in the
recurrent state, and its value is a sum in which every input has bits of its own (`value_of`). `simulate` makes the
whole record of the two from the design's sentences, one column and one row at a time, in plain Python.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zrl.collect.actor import BaseActorModule

Array = npt.NDArray[Any]
Script = Mapping[int, str]  # number of a step of an environment, from 1 → "term", "trunc" or "both"
StepResult = tuple[Any, Any, Any, Any, dict[str, Any]]
N_ACTIONS = 5
MANY = 10_000.0  # the upper bound of counters in observation spaces


class Pair(NamedTuple):
    """A namedtuple for nested observations."""

    here: Any
    there: Any


def reward_of(episode: int, step: int) -> float:
    """The reward of the step that leads to `step` (from 1) of `episode` (from 0)."""
    return 10.0 * episode + step


class CountingEnv(gym.Env[Any, Any]):
    """Counts: the observation is float32 ``[column, episode, step]``.

    Args:
        ends: after which of its steps, counted over all episodes from 1, an episode ends, and how.
        nested: the same numbers as ``{"at": Pair(here=[column, episode], there=step), "seen": uint8 [step % 256]}``.
        one_buffer: every observation is the same array, overwritten at each step and reset.
        limit: length at which an episode is truncated, whatever `ends` says.

    Attributes:
        actions: all actions that it was stepped with.
        seeds: the seeds of its resets.
        n_closed: how often it was closed.
    """

    def __init__(
        self,
        ends: Script | None = None,
        *,
        column: int = 0,
        nested: bool = False,
        one_buffer: bool = False,
        limit: int | None = None,
    ) -> None:
        self.ends = dict(ends or {})
        self.column, self.nested, self.one_buffer, self.limit = column, nested, one_buffer, limit
        self.n = self.episode = self.at = 0
        self.actions: list[Any] = []
        self.seeds: list[int | None] = []
        self.n_closed = 0
        self._buffer = np.zeros(3, np.float32)
        box = gym.spaces.Box
        self.action_space: gym.Space[Any] = gym.spaces.Discrete(N_ACTIONS)
        self.observation_space: gym.Space[Any] = box(0.0, MANY, (3,), np.float32)
        if nested:
            at = gym.spaces.Tuple([box(0.0, MANY, (2,), np.float32), gym.spaces.Discrete(int(MANY))])
            self.observation_space = gym.spaces.Dict({"at": at, "seen": box(0, 255, (1,), np.uint8)})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        if self.at:  # a reset of an episode without a step begins the same one again
            self.episode, self.at = self.episode + 1, 0
        return self.observe(), {"reset": True}

    def step(self, action: Any) -> StepResult:
        self.actions.append(action)
        self.n, self.at = self.n + 1, self.at + 1
        how = self.ends.get(self.n, "trunc" if self.at == self.limit else "")
        info = {"n": self.n, "end": how} if how else {"n": self.n}
        reward = reward_of(self.episode, self.at)
        return self.observe(), reward, how in ("term", "both"), how in ("trunc", "both"), info

    def observe(self) -> Any:
        if self.nested:
            at = Pair(np.array([self.column, self.episode], np.float32), self.at)
            return {"at": at, "seen": np.array([self.at % 256], np.uint8)}
        buffer = self._buffer if self.one_buffer else np.empty(3, np.float32)
        buffer[:] = self.column, self.episode, self.at
        return buffer

    def close(self) -> None:
        self.n_closed += 1


class SpoiltEnv(CountingEnv):
    """`CountingEnv` whose step number `at` (from 1) gives ``spoil(result)`` instead; `spoil` may also raise."""

    def __init__(self, at: int, spoil: Callable[[StepResult], Any], **options: Any) -> None:
        super().__init__(**options)
        self.spoil_at, self.spoil = at, spoil

    def step(self, action: Any) -> Any:
        result = super().step(action)
        return self.spoil(result) if self.n == self.spoil_at else result


class DrawingEnv(gym.Env[Any, Any]):
    """Everything is random, and drawn from wherever an environment may draw: its own generator (observations, ends with
    probability 0.1, always truncations), its action space, and the global states of NumPy and `random` (rewards)."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(N_ACTIONS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: Any) -> StepResult:
        reward = float(np.random.random() + random.random() + self.action_space.sample())
        return self.observe(), reward, False, bool(self.np_random.random() < 0.1), {}

    def observe(self) -> Any:
        return self.np_random.normal(size=2).astype(np.float32)


class SpaceEnv(gym.Env[Any, Any]):
    """Random observations and actions of any two spaces; an episode has `limit` steps.

    Args:
        shown: what of a sample of the space is really returned.

    Attributes:
        given: all observations that it returned.
        actions: all actions that it was stepped with; each must be in the space.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        limit: int = 3,
        shown: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        self.observation_space, self.action_space, self.limit, self.shown = (
            observation_space,
            action_space,
            limit,
            shown,
        )
        self.given: list[Any] = []
        self.actions: list[Any] = []
        self.at = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.at = 0
        return self.observe(), {}

    def step(self, action: Any) -> StepResult:
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.at += 1
        return self.observe(), 1.0, False, self.at == self.limit, {}

    def observe(self) -> Any:
        self.given.append(self.shown(self.observation_space.sample()))
        return self.given[-1]


# -- actors ----------------------------------------------------------------------------------------------------------


def value_of(obs: Any, act: Any, rew: Any, fin: Any, count: Any) -> Any:
    """rew + 2^7·count + 2^12·fin + 2^13·act + 2^16·step + 2^21·episode; works for numbers, arrays and tensors.

    Exact in float32, and every part can be told from the others, for rewards < 128, counts < 32, actions < 8,
    steps < 32 and episodes < 8.
    """
    return rew + 2**7 * count + 2**12 * fin + 2**13 * act + 2**16 * obs[..., 2] + 2**21 * obs[..., 1]


def action_of(obs: Any, count: Any) -> Any:
    """What `CountingActor` does: it depends on all that it should see."""
    return (obs[..., 0] + 2 * obs[..., 2] + count) % N_ACTIONS


class CountingActor(BaseActorModule):
    """Deterministic and recurrent: ``hx`` ``[1, B, 1]`` counts the steps since the last reset.

    The info dict says what was seen: ``value``, ``count`` (hx as it came in), ``obs``, ``act``, ``rew``, ``fin``.
    `weight` multiplies the value, so that there is something to train; at 1 it changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(
        self, obs: Tensor, act: Tensor, rew: Tensor, fin: Tensor, *, hx: Any = None
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        h = obs.new_zeros(1, fin.shape[1], 1) if hx is None else hx
        counts = []
        for ended in fin:
            h = h.masked_fill(ended.view(1, -1, 1), 0.0)
            counts.append(h[0, :, 0])
            h = h + 1
        count = torch.stack(counts)
        value = self.weight * value_of(obs, act, rew, fin, count)
        info = {"value": value, "count": count, "obs": obs, "act": act, "rew": rew, "fin": fin}
        return action_of(obs, count).long(), h, info


class RandomActor(BaseActorModule):
    """Uniform over `n` actions plus `start`, with torch's default generator; the value is the last reward."""

    def __init__(self, n: int = N_ACTIONS, start: int = 0) -> None:
        super().__init__()
        self.n, self.start = n, start
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(
        self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        actions = torch.randint(self.start, self.start + self.n, fin.shape)
        return actions, (), {"value": rew + self.weight, "logits": rew.new_zeros(*fin.shape, self.n) + self.weight}


class RestlessActor(RandomActor):
    """Draws in ``value`` too, a different amount than in ``step``."""

    def value(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Tensor:
        return torch.rand(3, *fin.shape).sum(0)[:1].reshape(fin.shape) + self.weight


class LambdaActor(BaseActorModule):
    """Does what a function says: ``fn(obs, act, rew, fin, hx) -> (actions, hx, info)``."""

    def __init__(self, fn: Callable[..., tuple[Any, Any, Any]]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> tuple[Any, Any, Any]:
        return self.fn(obs, act, rew, fin, hx)


# -- what the record of CountingEnv and CountingActor must be ---------------------------------------------------------


@dataclasses.dataclass
class Expected:
    """One fragment, as arrays with the names and shapes of the record."""

    obs: Array
    act: Array
    rew: Array
    fin: Array
    term: Array
    final_value: Array
    ep_return: Array
    ep_length: Array
    final_obs: Array
    mask: Array
    seen: Array  # info["count"], and with it hx at every row
    value: Array
    hx: Array
    bootstrap: Array

    @classmethod
    def empty(cls, n_steps: int, n: int) -> Expected:
        shapes = {
            "obs": (n_steps + 1, n, 3),
            "final_obs": (n_steps + 1, n, 3),
            "mask": (n_steps, n),
            "seen": (n_steps, n),
            "value": (n_steps, n),
            "hx": (1, n, 1),
            "bootstrap": (1, n),
        }
        return cls(*(np.zeros(shapes.get(f.name, (n_steps + 1, n))) for f in dataclasses.fields(cls)))


def simulate(scripts: Sequence[Script], n_steps: int, n_fragments: int, *, sticky: bool = False) -> list[Expected]:
    """The fragments that `CountingEnv` (one a script) and `CountingActor` make together."""
    out = [Expected.empty(n_steps, len(scripts)) for _ in range(n_fragments)]
    for j, script in enumerate(scripts):
        _simulate_column(j, script, out, n_steps, sticky)
    return out


def _simulate_column(j: int, script: Script, out: Sequence[Expected], n_steps: int, sticky: bool) -> None:
    assert len(script) < 8, "see value_of"
    assert len(out) * n_steps < 32, "see value_of"
    n = episode = step = count = length = 0
    total = 0.0
    # the very first row: no action, no reward, and not an end of an episode
    row = {"obs": (j, 0, 0), "act": 0, "rew": 0.0, "fin": True, "term": True}

    def write(x: Expected, t: int) -> None:
        for name in ("obs", "act", "rew", "fin", "term", "final_value", "ep_return", "ep_length", "final_obs"):
            getattr(x, name)[t, j] = row.get(name, 0)

    def value(fin: bool) -> float:
        return float(value_of(np.array(row["obs"]), row["act"], row["rew"], fin, count))

    for x in out:
        write(x, 0)
        x.hx[0, j, 0] = count
        frozen = False
        for t in range(n_steps):
            if frozen:
                row = {"obs": row["obs"], "act": row["act"], "rew": 0.0, "fin": True, "term": True}
                write(x, t + 1)
                continue
            x.mask[t, j], x.seen[t, j], x.value[t, j] = True, count, value(bool(row["fin"]))
            act = int(action_of(np.array(row["obs"]), count))
            n, step, count = n + 1, step + 1, count + 1
            rew, how = reward_of(episode, step), script.get(n)
            total, length = total + rew, length + 1
            row = {"obs": (j, episode, step), "act": act, "rew": rew, "fin": False, "term": False}
            if how is not None:
                row |= {"ep_return": total, "ep_length": length, "final_obs": row["obs"]}
                if how == "trunc":
                    row["final_value"] = value(False)  # with h_{t+1} before its reset
                row |= {"obs": (j, episode + 1, 0), "fin": True, "term": how != "trunc"}
                episode, step, count, total, length = episode + 1, 0, 0, 0.0, 0
                frozen = sticky and t + 1 < n_steps
            write(x, t + 1)
        x.bootstrap[0, j] = value(bool(row["fin"]))
