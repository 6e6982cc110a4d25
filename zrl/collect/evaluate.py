"""Playing episodes for their reward alone, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.collect import OutputWriter, first_row
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
        render: call ``render()`` of every running environment after each step.
        device: of the actor; the CPU, if None.
        seed: of the first environment's reset, the next one for each further; unseeded, if None.

    Returns:
        The rewards of each step, float64 ``[len(envs)]``, 0 for environments whose episode is over; so
        ``sum(...)`` are the undiscounted returns.

    Raises:
        ConfigError: no environments, one of them twice, or `n_steps` is no integer of at least 1.
        EnvError, ActorError: as in a rollout.
    """
    if not isinstance(envs, (list, tuple)) or not envs:
        raise ConfigError(f"evaluate: expected a list of at least one environment, not {envs!r}")
    if len({id(env) for env in envs}) != len(envs):
        raise ConfigError("evaluate: the same environment was given twice; every column needs its own")
    if n_steps is not None and (not isinstance(n_steps, int) or isinstance(n_steps, bool) or n_steps < 1):
        raise ConfigError(f"evaluate: n_steps must be an integer of at least 1 or None, not {n_steps!r}")
    module = unwrap(actor)
    if not isinstance(module, BaseActorModule):
        raise ActorError("not an actor", expected="a zrl.BaseActorModule", found=type(module).__name__)
    n, dev = len(envs), torch.device(device or "cpu")
    # the probe resets the first environment, and so would use up one of its seeds
    layout = probe_env(envs[0], None, seed=seed, may_step=False)
    actor_layout = probe_actor(module, layout, n, dev)
    slot = Slot(fragment_spec(layout, actor_layout, 1, n))
    seeds = [] if seed is None else [seed + j for j in range(n)]
    columns = PlainColumns(envs, layout, seeds, StageTimes())
    first_row(slot.rows[0], first_actions(layout.act, actor_layout.act))
    columns.reset(slot.rows[0])
    rewards: list[Array] = []
    live, hx = list(range(n)), map_leaves(torch.clone, actor_layout.initial_hx)
    row, nxt = slot.rows
    write = OutputWriter(slot.spec)
    with torch.inference_mode():
        while live and (n_steps is None or len(rewards) < n_steps):
            inputs: Inputs = map_leaves(lambda x: x.to(dev), row.inputs)
            actions, hx, info = module.step(*inputs, hx)
            write(actions, info, row)
            ends = columns.step_some(row, nxt, live)
            rewards.append(columns.rewards.copy())
            check_rewards(nxt.rew[None], len(rewards))
            if render:
                for j in live:
                    envs[j].render()
            live = [j for j in live if all(j != ended for ended, _, _ in ends)]
            nxt.fin[:] = True
            nxt.fin[live] = False
            for a, b in zip(row.carried, nxt.carried, strict=True):
                a[:] = b
    return rewards
