"""Checks that are too dear for every run: what ``debug=True`` adds around the actor."""

from __future__ import annotations

import contextlib
import copy
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zrl.collect.actor import BaseActorModule
from zrl.collect.collect import Context
from zrl.collect.probe import own_state, same_values, untouched
from zrl.collect.spaces import describe
from zrl.collect.streams import undrawn
from zrl.data.fragment import Inputs, Slot, map_leaves
from zrl.data.spec import flatten, tree_paths
from zrl.errors import ActorError

TOLERANCE = 1e-4  # of values and logits between one T-row forward and T one-row steps
COMPARED = ("value", "logits", "mean", "log_std")  # functions of the inputs alone; samples are not


class CheckedStep:
    """``actor.step`` and ``actor.value`` that refuse inputs written to, values that are not finite and dtypes that
    change, and warn of buffers changed."""

    def __init__(self, actor: BaseActorModule) -> None:
        self._actor = actor
        self._warned: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}

    def __call__(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> tuple[Any, Any, Any]:
        """As ``actor.step``.

        Raises:
            ActorError: naming the leaf.
        """
        inputs, hx = (obs, act, rew, fin), own_state(hx)
        with untouched(inputs, hx), self._watching_buffers():
            actions, new_hx, info = self._actor.step(*inputs, hx)
        self._check_dtypes(actions, "state.act")
        self._check_dtypes(info, "info")
        _check_finite(info.get("value") if isinstance(info, dict) else None, "info['value']")
        return actions, new_hx, info

    def value(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, hx: Any) -> Tensor:
        """As ``actor.value``.

        Raises:
            ActorError: it wrote into its inputs, or is not finite.
        """
        inputs, hx = (obs, act, rew, fin), own_state(hx)
        with untouched(inputs, hx), self._watching_buffers():
            value = self._actor.value(*inputs, hx)
        _check_finite(value, "value()")
        return value

    @contextlib.contextmanager
    def _watching_buffers(self) -> Iterator[None]:
        """Of whatever dtype: those of the learner will take their place."""
        buffers = {name: b.clone() for name, b in self._actor.named_buffers()}
        yield
        for name, b in self._actor.named_buffers():
            if not same_values(b, buffers[name]):
                self.warn_once(
                    f"the actor changed its buffer {name!r} while collecting; that is lost at the next publish"
                )

    def warn_once(self, text: str) -> None:
        """Warn, but never twice of the same."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=3)

    def _check_dtypes(self, tree: Any, name: str) -> None:
        """The dtypes of the first call hold for all: the record would cast others silently."""
        leaves, structure = flatten(tree)
        for path, x in zip(tree_paths(structure, name), leaves, strict=True):
            if not isinstance(x, Tensor):  # refused by whoever writes it
                continue
            dtype = self._dtypes.setdefault(path, x.dtype)
            if x.dtype != dtype:
                raise ActorError(
                    "the actor's output changed its dtype", leaf=path, expected=str(dtype), found=str(x.dtype)
                )


def _check_finite(value: Any, leaf: str) -> None:
    if isinstance(value, Tensor) and not torch.isfinite(value).all():
        raise ActorError("the value is not finite", leaf=leaf, expected="numbers", found="NaN or inf")


def check_forward(ctx: Context, slot: Slot) -> None:
    """Compare one forward over the T rows of a fragment with T one-row steps over the same rows.

    They differ when ``forward`` does not reset its state before row t where ``fin[t]``, or looks at other rows. Both
    run on a copy of the actor in eval mode, for dropout and batch normalisation differ from one call to the next by
    nature. An actor whose forward differs even from itself cannot be compared: one warning.

    Raises:
        ActorError: naming the leaf, row and column; or ``forward`` or ``step`` raised.
    """
    actor, n = copy.deepcopy(ctx.actor).eval(), ctx.n_steps  # a copy, because a forward may change buffers
    s = slot.pt.state.rows(0, n)
    inputs, hx = map_leaves(lambda x: x.to(ctx.device), ((s.obs, s.act, s.rew, s.fin), slot.pt.hx))
    with ctx.streams.active(), undrawn(ctx.device), torch.inference_mode():
        try:
            once, again = (_comparable(actor(*inputs, hx=own_state(hx))) for _ in range(2))
        except Exception as e:
            raise ActorError(f"a forward over {n} rows raised {describe(e)}") from e
        if once.keys() != again.keys() or not all(bool(_close(x, again[path]).all()) for path, x in once.items()):
            if isinstance(ctx.step, CheckedStep):
                ctx.step.warn_once(
                    "two forwards of the actor over the same rows differ, also in eval mode; whether they agree with "
                    "its steps cannot be checked"
                )
            return
        try:
            by_step = _one_by_one(actor, inputs, hx, n)
        except Exception as e:
            raise ActorError(f"a step over a row of the last fragment raised {describe(e)}") from e
    advice = "reset the state before row t where fin[t], as zrl.algo.unroll does"
    _compare(once, by_step, slot, advice if flatten(hx)[0] else "a row must be computed from that row alone")


def _comparable(result: Any) -> dict[str, Tensor]:
    """Of what an actor returns, the leaves that are functions of its inputs alone, by path."""
    _, _, info = result
    pairs = []
    for key in COMPARED:
        leaves, tree = flatten(info.get(key, ()))
        pairs += list(zip(tree_paths(tree, f"info[{key!r}]"), leaves, strict=True))
    return {path: x.cpu() for path, x in pairs if isinstance(x, Tensor)}


def _one_by_one(actor: BaseActorModule, inputs: Inputs, hx: Any, n: int) -> dict[str, Tensor]:
    """The same of `n` one-row steps, each column of ``hx`` reset where an episode has ended."""
    rows: list[dict[str, Tensor]] = []
    hx = own_state(hx)
    for t in range(n):
        if t:
            for j in inputs[3][t].nonzero().flatten().tolist():
                hx = actor.reset(j, hx)
        obs, act, rew, fin = map_leaves(operator.itemgetter(slice(t, t + 1)), inputs)
        result = actor.step(obs, act, rew, fin, hx)
        rows.append(_comparable(result))
        hx = result[1]
    return {path: torch.cat([row[path] for row in rows]) for path in rows[0]}


def _close(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        return torch.zeros((), dtype=torch.bool)
    return torch.isclose(x, y, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _compare(once: dict[str, Tensor], by_step: dict[str, Tensor], slot: Slot, advice: str) -> None:
    n, mask = slot.spec.n_steps, slot.pt.mask
    for path in (path for path in by_step if path in once):
        x, y = by_step[path], once[path]
        if x.shape != y.shape:
            raise ActorError(
                f"a forward over {n} rows returns another shape than {n} one-row steps",
                leaf=path,
                expected=str(list(x.shape)),
                found=str(list(y.shape)),
            )
        far = ~_close(x, y).reshape(*mask.shape, -1).all(-1) & mask
        if far.any():
            t, j = map(int, far.nonzero()[0])
            raise ActorError(
                f"a forward over {n} rows differs from {n} one-row steps at row {t}, column {j}; {advice}",
                leaf=path,
                expected=str(x[t, j].tolist()),
                found=str(y[t, j].tolist()),
            )
    for key in COMPARED:
        one, other = ([path for path in paths if path.startswith(f"info[{key!r}]")] for paths in (by_step, once))
        if one and other and one != other:
            raise ActorError(
                f"a forward over {n} rows nests its info in another way than a one-row step",
                leaf=f"info[{key!r}]",
                expected=", ".join(one),
                found=", ".join(other),
            )
