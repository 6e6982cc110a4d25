"""Checks that are too dear for every run: what ``debug=True`` adds around the actor."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from zrl.collect.actor import BaseActorModule
from zrl.collect.collect import Context
from zrl.collect.probe import check_untouched
from zrl.collect.streams import undrawn
from zrl.data.fragment import Slot, map_leaves
from zrl.errors import ActorError

TOLERANCE = 1e-4  # of values and logits between one T-row forward and T one-row steps
COMPARED = ("value", "logits", "mean", "log_std")  # functions of the inputs alone; samples are not


class CheckedStep:
    """``actor.step`` that refuses inputs written to, values that are not finite, and warns of buffers changed."""

    def __init__(self, actor: BaseActorModule) -> None:
        self._actor = actor
        self._warned: set[str] = set()

    def __call__(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> tuple[Any, Any, Any]:
        inputs = (obs, act, rew, fin)
        kept, kept_hx = map_leaves(torch.clone, inputs), map_leaves(torch.clone, hx)
        buffers = {name: b.clone() for name, b in self._actor.named_buffers()}
        actions, new_hx, info = self._actor.step(*inputs, hx)
        check_untouched(inputs, kept)
        check_untouched((hx, (), rew, fin), (kept_hx, (), kept[2], kept[3]), names=("hx", "act", "rew", "fin"))
        if not torch.isfinite(info["value"]).all():
            raise ActorError("the value is not finite", leaf="info['value']", expected="numbers", found="NaN or inf")
        for name, b in self._actor.named_buffers():
            if name not in self._warned and not torch.equal(b, buffers[name]):
                self._warned.add(name)
                warnings.warn(
                    f"the actor changed its buffer {name!r} while collecting; that is lost at the next publish",
                    stacklevel=2,
                )
        return actions, new_hx, info


def check_forward(ctx: Context, slot: Slot) -> None:
    """Compare one forward over the T rows of a fragment with the T one-row steps that made it.

    They differ when ``forward`` does not reset its state before row t where ``fin[t]``, or looks at other rows.

    Raises:
        ActorError: naming the leaf and the row.
    """
    record, n = slot.pt, ctx.n_steps
    s = record.state.rows(0, n)
    with ctx.streams.active(), undrawn(ctx.device), torch.inference_mode():
        inputs, hx = map_leaves(lambda x: x.to(ctx.device), ((s.obs, s.act, s.rew, s.fin), record.hx))
        # a copy, because a forward may change buffers
        _, _, info = copy.deepcopy(ctx.actor)(*inputs, hx=hx)
    for key in COMPARED:
        leaf, once = record.actor.get(key), info.get(key)
        if not isinstance(leaf, Tensor) or not isinstance(once, Tensor):
            continue
        far = ~torch.isclose(once.cpu(), leaf, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        rows = (far.reshape(n, leaf.shape[1], -1).any(-1) & record.mask).nonzero()
        if len(rows):
            t, j = map(int, rows[0])
            raise ActorError(
                f"a forward over {n} rows differs from {n} one-row steps at row {t}, column {j}; "
                "reset the state before row t where fin[t], as zrl.algo.unroll does",
                leaf=f"info[{key!r}]",
                expected=str(leaf[t, j].tolist()),
                found=str(once[t, j].tolist()),
            )
