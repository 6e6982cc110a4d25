"""Minibatches by column of what recurrent actors collected: together they are the batch, nested states included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.toys import DrawingEnv
from zrl import BaseActorModule, Batch, algo
from zrl.data.spec import flatten
from zrl.rollout import multi, same

T, B, HIDDEN = 6, 5, 4


class Deep(BaseActorModule):
    """A stacked LSTM and a GRU side by side: ``hx`` is ``{"lstm": (h [2, B, H], c [2, B, H]), "more": {"gru": …}}``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(2, HIDDEN, num_layers=2), nn.GRU(2, HIDDEN)
        self.value_head, self.policy = nn.Linear(2 * HIDDEN, 1), nn.Linear(2 * HIDDEN, 5)

    def both(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        a, lstm = self.lstm(x, hx["lstm"])
        b, gru = self.gru(x, hx["more"]["gru"])
        return torch.cat([a, b], -1), {"lstm": lstm, "more": {"gru": gru}}

    def forward(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any = None) -> Any:
        if hx is None:
            zeros = obs.new_zeros(2, fin.shape[1], HIDDEN)
            hx = {"lstm": (zeros, zeros), "more": {"gru": zeros[:1]}}
        y, hx = algo.unroll(self.both, obs, hx, fin)
        logits = self.policy(y)
        return algo.categorical(logits), hx, {"value": self.value_head(y).squeeze(-1), "logits": logits}


def summed(actor: Deep, batch: Batch) -> Tensor:
    """A loss as a sum over the steps that were taken."""
    s = batch.state
    _, _, info = actor(s.obs[:-1], s.act[:-1], s.rew[:-1], s.fin[:-1], hx=batch.hx)
    log_pi = actor.log_prob(info, s.act[1:])
    loss = (info["value"] - batch.extra["ret"]).square() - batch.extra["ret"] * log_pi - 0.1 * actor.entropy(info)
    total: Tensor = loss[batch.mask].sum()
    return total


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_sums_over_minibatches_by_column_are_those_of_the_batch(size: int, sticky: bool) -> None:
    torch.manual_seed(0)
    actor = Deep()
    n_masked = n_ends = 0
    with same.rollout(DrawingEnv, actor, T, B, entropy=2, sticky=sticky) as it:
        for _, batch in zip(range(4), it, strict=False):
            end: Any = {"bootstrap": batch.bootstrap[0], "final_value": batch.final_value[1:]}
            batch.extra["ret"] = algo.returns(batch.state.rew[1:], batch.state.fin[1:], gamma=0.9, **end)
            whole = summed(actor, batch)
            parts = [summed(actor, part) for part in batch.minibatches(size, by="column")]
            assert len(parts) == -(-B // size)
            together = torch.stack(parts).sum()
            torch.testing.assert_close(together, whole)
            gradients = [torch.autograd.grad(x, list(actor.parameters())) for x in (together, whole)]
            for mine, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
            n_masked += int((~batch.mask).sum())
            n_ends += int(batch.state.fin[1:-1].any(1).sum())
            with torch.no_grad():
                for x in actor.parameters():
                    x.mul_(1.1)
    assert n_ends > 1
    assert (n_masked > 0) == sticky


def test_states_are_cut_along_the_columns_of_all_fragments() -> None:
    """Layers stay, whatever the nesting; the columns of a minibatch come from both workers."""
    torch.manual_seed(0)
    with multi.rollout(DrawingEnv, Deep(), T, 2, B, 2, 2, entropy=2, start_method="inline") as it:
        next(it)
        batch = next(it)
    batch.extra["column"] = torch.arange(2 * B).expand(T, -1)
    seen = []
    for part in batch.minibatches(3):
        js = part.extra["column"][0]
        seen += js.tolist()
        (h, c), gru = part.hx["lstm"], part.hx["more"]["gru"]
        assert (h.shape, c.shape, gru.shape) == ((2, len(js), HIDDEN),) * 2 + ((1, len(js), HIDDEN),)
        for cut, all_of_it in zip(flatten(part.hx)[0], flatten(batch.hx)[0], strict=True):
            assert torch.equal(cut, all_of_it[:, js])
            assert cut.any()
    assert sorted(seen) == list(range(2 * B))
