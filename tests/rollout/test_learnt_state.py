"""A learnt initial state, from one end to the other: acted with, recorded, trained, published, and acted with again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.toys import DrawingEnv
from zrl import BaseActorModule, Batch, algo
from zrl.rollout import multi, same, single

T, B, HIDDEN = 5, 3, 4


class Learnt(BaseActorModule):
    """A GRU whose state begins at ``h0``. Episodes do not look alike, so `value` depends on where they began."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.value_head, self.policy = nn.GRU(2, HIDDEN), nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 5)
        self.h0 = nn.Parameter(torch.randn(1, HIDDEN))

    def reset(self, j: int, hx: Tensor) -> Tensor:
        hx = hx.clone()
        hx[:, j] = self.h0
        return hx

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        y, hx = algo.unroll(self.core, obs, hx, fin, h0=self.h0)
        logits = self.policy(y)
        return algo.categorical(logits), hx, {"value": self.value_head(y).squeeze(-1), "logits": logits}


def learnt() -> Learnt:
    torch.manual_seed(2)
    return Learnt()


def loss_of(batch: Batch, value: Tensor, logits: Tensor) -> Tensor:
    """Some function of all of them."""
    log_pi = logits.log_softmax(-1).gather(-1, batch.state.act[1:].unsqueeze(-1)).squeeze(-1)
    weights = torch.linspace(-1.0, 1.0, value.numel()).view_as(value)
    return (weights * (value + 0.5 * log_pi)).sum()


def column_by_column(actor: Learnt, batch: Batch) -> Tensor:
    """The same loss, one column and one row at a time, with a GRU cell on its own."""
    cell = nn.GRUCell(2, HIDDEN)
    names = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0", "bias_ih": "bias_ih_l0", "bias_hh": "bias_hh_l0"}
    values, logits = [], []
    for j in range(batch.mask.shape[1]):
        h = batch.hx[0, j]
        for t in range(T):
            if batch.state.fin[t, j]:
                h = actor.h0[0]
            parameters = {name: getattr(actor.core, of) for name, of in names.items()}
            h = torch.func.functional_call(cell, parameters, (batch.state.obs[t, j], h))
            values.append(actor.value_head(h)[0])
            logits.append(actor.policy(h))
    shape = batch.mask.shape[::-1]
    by_column = torch.stack(values).view(shape).t(), torch.stack(logits).view(*shape, 5).transpose(0, 1)
    return loss_of(batch, *by_column)


def test_its_gradient_is_that_of_a_slow_reference() -> None:
    actor, seen = learnt(), 0
    with same.rollout(DrawingEnv, actor, T, B, entropy=4, debug=True) as it:
        for n, batch in zip(range(6), it, strict=False):
            s = batch.state
            _, _, info = actor(s.obs[:-1], s.act[:-1], s.rew[:-1], s.fin[:-1], hx=batch.hx)
            losses = loss_of(batch, info["value"], info["logits"]), column_by_column(actor, batch)
            mine, theirs = (torch.autograd.grad(x, list(actor.parameters()), allow_unused=True) for x in losses)
            torch.testing.assert_close(losses[0], losses[1])
            for (name, _), a, b in zip(actor.named_parameters(), mine, theirs, strict=True):
                assert (a is None) == (b is None), name
                if a is not None:
                    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            if s.fin[:-1].any():
                grad = dict(zip((name for name, _ in actor.named_parameters()), mine, strict=True))["h0"]
                assert grad is not None
                assert grad.any()
            seen += int(s.fin[1:-1].sum()) if n else 0
    assert seen > 2  # ends in the middle of fragments


@pytest.mark.parametrize("how", ["same", "single", "multi", "inline"])
def test_states_and_values_are_those_of_the_weights_that_acted(how: Any) -> None:
    """Through changes of ``h0``: running states go on as they are, and the next resets take the new one."""
    actor = learnt()
    collectors: dict[str, Callable[[], Any]] = {
        "same": lambda: same.rollout(DrawingEnv, actor, T, B, entropy=4),
        "single": lambda: single.rollout(DrawingEnv, actor, T, B, entropy=4, max_lag=0),
        "multi": lambda: multi.rollout(DrawingEnv, actor, T, 2, B, 4, 2, entropy=4),
        "inline": lambda: multi.rollout(DrawingEnv, actor, T, 2, B, 4, 2, entropy=4, start_method="inline"),
    }
    optimizer = torch.optim.SGD(actor.parameters(), lr=0.3)
    versions: dict[int, Learnt] = {}
    before: dict[int, tuple[int, int, Tensor]] = {}  # by worker: number, version and row T of its last fragment
    n_resets = n_ends = 0
    with collectors[how]() as it:
        for n in range(1, 9):
            versions[n] = copy.deepcopy(actor)
            batch = next(it)
            for i, meta in enumerate(batch.meta):
                pick = slice(i * B, (i + 1) * B)
                s, acted, hx = batch.state, versions[meta.version], batch.hx[:, pick]
                fin = s.fin[:, pick]
                with torch.no_grad():
                    _, _, info = acted(s.obs[:, pick], s.act[:, pick], s.rew[:, pick], fin, hx=hx)
                torch.testing.assert_close(info["value"][:-1], batch.actor["value"][:, pick])
                torch.testing.assert_close(info["value"][-1:], batch.bootstrap[:, pick])
                if meta.seq == 1:  # who was slow to start may have begun with any version up to the one that acted
                    begun = [versions[v].h0.expand(1, B, HIDDEN) for v in range(1, meta.version + 1)]
                    assert any(torch.equal(hx, h0) for h0 in begun)
                # a column that begins with a reset was reset as the fragment before ended, by the weights of that time
                seq, version, last = before.get(meta.worker, (0, 0, fin[0]))
                if seq == meta.seq - 1 > 0:
                    assert torch.equal(fin[0], last)
                    for j in fin[0].nonzero().flatten().tolist():
                        assert torch.equal(hx[:, j], versions[version].h0)
                        n_resets += 1
                before[meta.worker] = meta.seq, meta.version, fin[-1].clone()
                n_ends += int(fin[1:-1].sum())
            optimizer.zero_grad()
            _, _, info = actor(s.obs[:-1], s.act[:-1], s.rew[:-1], s.fin[:-1], hx=batch.hx)
            (info["value"] - 1).square().mean().backward()
            optimizer.step()
    assert n_ends > 3
    assert how != "same" or n_resets > 0
    assert len({tuple(x.h0[0].tolist()) for x in versions.values()}) > 4
