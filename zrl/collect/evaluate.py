"""Playing episodes for their reward alone, in this process."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.collect import OutputWriter, episode_statistics, first_row
from zrl.collect.envs import PlainColumns, check_rewards
from zrl.collect.probe import first_actions, fragment_spec, probe_actor
from zrl.collect.spaces import probe_env
from zrl.data.fragment import Array, Inputs, Slot, map_leaves
from zrl.data.weights import unwrap
from zrl.errors import ActorError, ConfigError
from zrl.metrics import StageTimes


def evaluate(
    envs: Sequence[Any],
    actor: torch.nn.Module,
    n_steps: int | None = None,
    render: bool = False,
    device: torch.device | str | None = None,
    *,
    seed: int | None = None,
) -> list[Array]:
    """Play one episode in every environment, and stop when all have ended or after `n_steps` steps.

    The actor acts as it is: call ``actor.eval()`` before for a greedy policy. Random numbers come from torch's default
    generators. Blocks until done; the environments stay open.

    Args:
        envs: environments, each a column of its own.
        actor: on `device` already.
        n_steps: greatest number of steps, without bound if None.
        render: call ``render()`` of every running environment after each step; they need a render mode.
        device: of the actor; the CPU, if None.
        seed: of the first environment's reset, the next one for each further; unseeded, if None.

    Returns:
        The rewards of each step, float64 ``[len(envs)]``, 0 for environments whose episode is over; so
        ``sum(...)`` are the undiscounted returns.

    Raises:
        ConfigError: no environments, one of them twice, `n_steps` is no integer of at least 1, or there is nothing to
            render.
        EnvError, ActorError: as in a rollout.
    """
    if not isinstance(envs, (list, tuple)) or not envs:
        raise ConfigError(f"evaluate: expected a list of at least one environment, not {envs!r}")
    if n_steps is not None and (not isinstance(n_steps, int) or isinstance(n_steps, bool) or n_steps < 1):
        raise ConfigError(f"evaluate: n_steps must be an integer of at least 1 or None, not {n_steps!r}")
    module = unwrap(actor)
    if not isinstance(module, BaseActorModule):
        raise ActorError("not an actor", expected="a zrl.BaseActorModule", found=type(module).__name__)
    if render:
        _check_render(envs)
    stage = Stage(envs, module, torch.device(device or "cpu"), seed=seed)
    stage.begin([] if seed is None else [seed + j for j in range(len(envs))])
    rewards: list[Array] = []
    live = list(range(len(envs)))
    with torch.inference_mode():
        while live and (n_steps is None or len(rewards) < n_steps):
            ended = stage.step(live)
            rewards.append(stage.rewards.copy())
            if render:
                for j in live:
                    envs[j].render()
            live = [j for j in live if j not in ended]
    return rewards


def _check_render(envs: Sequence[Any]) -> None:
    """Gymnasium's environments draw nothing without a render mode, which they get as they are made. One that has
    ``render()`` and says nothing of modes may draw all the same."""
    for j, env in enumerate(envs):
        if not callable(getattr(env, "render", None)):
            found = f"{type(env).__name__} has no render()"
        elif getattr(env, "render_mode", "unknown") is None:
            found = f"{type(env).__name__} was made without a render mode"
        else:
            continue
        raise ConfigError(
            f'evaluate: render: environment {j}: {found}; make it with one, as in gym.make(..., render_mode="human")'
        )


class Played(NamedTuple):
    """Whole episodes: all of the first environment, in the order of playing, then those of the next.

    Attributes:
        returns: undiscounted.
        lengths: in steps.
        n_cut: how many were cut before their end.
    """

    returns: list[float]
    lengths: list[int]
    n_cut: int


def play(stage: Stage, quotas: Sequence[int], longest: int) -> Played:
    """Play ``quotas[j]`` episodes in environment j, on a stage that has just begun.

    How many each environment plays is fixed beforehand: were the first n to end taken, wherever they are played, short
    episodes would be over-represented. Return and length are those of ``info["episode"]`` where an episode ended with
    one, because wrappers change rewards.

    Args:
        stage: with as many environments as there are quotas.
        quotas: episodes by environment.
        longest: steps after which an episode is cut.

    Raises:
        EnvError, ActorError: as in a rollout; and whatever the actor raises.
    """
    returns: list[list[float]] = [[] for _ in quotas]
    lengths: list[list[int]] = [[] for _ in quotas]
    total, length, n_cut = np.zeros(len(quotas)), np.zeros(len(quotas), int), 0

    def unfinished(columns: Sequence[int]) -> list[int]:
        return [j for j in columns if len(returns[j]) < quotas[j]]

    live = unfinished(range(len(quotas)))
    with torch.inference_mode():
        while live:
            ended = stage.step(live)
            total += stage.rewards
            length[live] += 1
            over = [j for j in live if j in ended or length[j] >= longest]
            for j in over:
                ret, steps = float(total[j]), int(length[j])
                if "episode" in ended.get(j, ()):
                    ret, steps = episode_statistics(j, ended[j]["episode"], ret, steps)
                returns[j].append(ret)
                lengths[j].append(steps)
                n_cut += j not in ended
            if over:
                total[over], length[over] = 0.0, 0
                stage.begin_again(unfinished(over))
                live = unfinished(live)
    return Played([x for each in returns for x in each], [x for each in lengths for x in each], n_cut)


class Stage:
    """Plain environments and the actor that plays in them. Nothing is kept but the row in hand.

    Args:
        envs: environments, each a column of its own; the first one is reset here, to be looked at.
        actor: acts as it is, on `device`.
        device: of the actor.
        seed: for that look; the environment's random state is left alone, if None.

    Attributes:
        calls: as in `Columns`.

    Raises:
        ConfigError: one environment twice.
        EnvError, ActorError: as in a rollout.
    """

    def __init__(
        self, envs: Sequence[Any], actor: BaseActorModule, device: torch.device, *, seed: int | None = None
    ) -> None:
        if len({id(env) for env in envs}) != len(envs):
            raise ConfigError("evaluate: the same environment was given twice; every column needs its own")
        self.calls: MutableSequence[int] | memoryview = [0]
        self._envs, self._actor, self._device = list(envs), actor, device
        # before the first seeded reset: this one would use up one of the seeds
        self._layout = probe_env(envs[0], None, seed=seed, may_step=False)
        actor_layout = probe_actor(actor, self._layout, len(envs), device)
        self._initial_hx = actor_layout.initial_hx
        self._first_actions = first_actions(self._layout.act, actor_layout.act)
        slot = Slot(fragment_spec(self._layout, actor_layout, 1, len(envs)))
        self._row, self._next = slot.rows
        self._write = OutputWriter(slot.spec)

    def begin(self, seeds: Sequence[int] = ()) -> None:
        """Begin an episode everywhere, as if it were the first one: with these seeds, one a column; or unseeded."""
        self._columns = PlainColumns(self._envs, self._layout, seeds, StageTimes())
        self._columns.calls = self.calls
        self._n_steps = 0
        first_row(self._row, self._first_actions)
        self._columns.reset(self._row)
        self._hx = map_leaves(torch.clone, self._initial_hx)
        self._reset_state(range(len(self._envs)))  # a learnt one may have changed since the actor was looked at

    @property
    def rewards(self) -> Array:
        """Of the last step, float64 ``[B]``; 0 where none was taken."""
        return self._columns.rewards

    def step(self, live: Sequence[int]) -> dict[int, dict[str, Any]]:
        """One step of the columns `live`; returns those that ended, which must begin again before they are live again,
        each with the info of its final step.

        To be called in inference mode.
        """
        row, nxt = self._row, self._next
        inputs: Inputs = map_leaves(lambda x: x.to(self._device), row.inputs)
        actions, self._hx, info = self._actor.step(*inputs, self._hx)
        self._write(actions, info, row)
        ends = self._columns.step_some(row, nxt, live)
        ended = {} if ends is None else dict(zip(map(int, ends.columns), ends.infos, strict=True))
        self._n_steps += 1
        check_rewards(nxt.rew[None], self._n_steps)
        nxt.fin[:] = True
        nxt.fin[live] = False
        nxt.fin[list(ended)] = True
        for a, b in zip(row.carried, nxt.carried, strict=True):
            a[:] = b
        return ended

    def begin_again(self, columns: Sequence[int]) -> None:
        """Begin the next episode of these columns, wherever they are in the one before."""
        self._columns.begin(columns, self._row)
        self._row.fin[columns] = True
        self._reset_state(columns)

    def _reset_state(self, columns: Sequence[int]) -> None:
        with torch.inference_mode():
            for j in columns:
                self._hx = self._actor.reset(j, self._hx)
