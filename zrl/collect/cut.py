"""Values of the true final observations of truncated episodes, asked for by the row, not by the step."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zrl.collect.actor import BaseActorModule
from zrl.collect.streams import undrawn
from zrl.data.fragment import Array, Inputs, Slot
from zrl.data.spec import flatten
from zrl.errors import ActorError

if TYPE_CHECKING:
    from zrl.collect.collect import Context
    from zrl.collect.envs import Ends


class CutEpisodes:
    """What ``value`` is to be asked of the episodes that were truncated within the fragment in hand.

    The weights do not change within a fragment, so it may be asked at its end, or once B of them have come together:
    with many columns something is truncated at nearly every step, and a call each would double what the actor costs.
    An actor with a ``setup`` knows which column is which; it is asked at once, of all columns of the step.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        fields = ctx.spec.fields
        self._obs, self._act = fields["state.obs"], fields["state.act"]
        self._has_state = bool(flatten(ctx.initial_hx)[0])
        self._at_once = not is_default(ctx.actor.setup, BaseActorModule.setup)
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new fragment begins."""
        self._n = 0
        self._rows: list[int] = []
        self._columns: list[Array] = []
        self._leaves: list[list[Array]] = []  # obs, act, rew, each [k, ...]
        self._hx: list[list[Tensor]] = []

    def keep(self, slot: Slot, t: int, ends: Ends, hx: Any) -> None:
        """Keep what is known at row `t`: it holds the true final observations still, `hx` is h_t before the resets.

        To be called in inference mode. Never more than two rows' worth is kept.
        """
        row = slot.rows[t]
        columns, terminated = np.asarray(ends.columns), np.asarray(ends.terminated)
        if terminated.any():
            columns = columns[~terminated]
        if self._at_once:
            row.final_value[columns] = value_of(self._ctx, self._ctx.read(row), hx).numpy()[columns]
            return
        self._rows.append(t)
        self._columns.append(columns)
        self._n += len(columns)
        self._leaves.append([a.take(columns, 0) for a in (*row.obs, *row.act, row.rew)])
        if self._has_state:
            states = flatten(hx)[0]
            index = torch.from_numpy(columns).to(states[0].device)
            self._hx.append([h.index_select(1, index) for h in states])
        if self._n >= self._ctx.spec.n_columns:
            self.write(slot)

    def write(self, slot: Slot) -> None:
        """Ask for the values, of at most B episodes at a time, write them into ``final_value``, and forget the rest.

        To be called in inference mode.
        """
        if not self._rows:
            return
        leaves = [torch.from_numpy(np.concatenate(parts)).unsqueeze(0) for parts in zip(*self._leaves, strict=True)]
        states = [torch.cat(parts, 1) for parts in zip(*self._hx, strict=True)]
        n, most = self._n, self._ctx.spec.n_columns
        if n % most == 1 < most:  # the last one twice: batch normalisation in training mode refuses a single column
            leaves, states = ([torch.cat([x, x[:, -1:]], 1) for x in each] for each in (leaves, states))
        values = [self._values(leaves, states, k, k + most) for k in range(0, n, most)]
        rows = np.repeat(self._rows, [len(columns) for columns in self._columns])
        slot.np.final_value[rows, np.concatenate(self._columns)] = torch.cat(values)[:n].numpy()
        self.clear()

    def _values(self, leaves: Sequence[Tensor], states: Sequence[Tensor], start: int, stop: int) -> Tensor:
        *inputs, rew = (x[:, start:stop].to(self._ctx.device) for x in leaves)
        n_obs = len(self._obs.leaves)
        obs, act = self._obs.unflatten(inputs[:n_obs]), self._act.unflatten(inputs[n_obs:])
        hx = flatten(self._ctx.initial_hx)[1].unflatten([h[:, start:stop] for h in states])
        return value_of(self._ctx, (obs, act, rew, torch.zeros_like(rew, dtype=torch.bool)), hx)


def is_default(method: Any, default: Any) -> bool:
    """Whether a bound method is the one that `BaseActorModule` has: neither its class nor the actor itself has
    another."""
    return getattr(method, "__func__", None) is default


def value_of(ctx: Context, inputs: Inputs, hx: Any) -> Tensor:
    """v of all columns of `inputs`, on the host, with the actor's random stream left as it was.

    Raises:
        ActorError: ``value`` returned another shape.
    """
    started = perf_counter()
    with undrawn(ctx.device):
        value = ctx.value(*inputs, hx)
    n = inputs[2].shape[1]
    if tuple(value.shape) != (1, n):
        raise ActorError("value() is misshapen", leaf="value()", expected=f"[1, {n}]", found=str(list(value.shape)))
    host = value[0].cpu()
    ctx.times.actor += perf_counter() - started
    return host
