"""Batches from worker processes: the same numbers as in-process, whatever carries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rollout.test_same import same_numbers
from tests.toys import DrawingEnv
from zrl import Batch
from zrl.rollout import multi, same, single
from zrl.rollout.inline import InlineRollout
from zrl.rollout.pipeline import PipelineRollout
from zrl.zoo import GRUActor, MLPActor

T, B = 5, 3
Rollout = PipelineRollout | InlineRollout | same.SameRollout


def drawing() -> DrawingEnv:
    return DrawingEnv()


def nudge(actor: torch.nn.Module) -> None:
    """What an optimizer does."""
    with torch.no_grad():
        for x in actor.parameters():
            x.add_(0.01 * torch.arange(x.numel()).view_as(x))


def batches(it: Rollout, actor: torch.nn.Module, n: int) -> list[Batch]:
    """Clones of the first n batches, with the actor changed after each; closes the iterator."""
    found = []
    with it:
        for _ in range(n):
            found.append(next(it).clone())
            nudge(actor)
    return found


def actor_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    env = drawing()
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "mlp": lambda: MLPActor(env.observation_space, env.action_space),
        "gru": lambda: GRUActor(env.observation_space, env.action_space),
    }
    return make[kind]()


@pytest.mark.parametrize("kind", ["mlp", "gru"])
@pytest.mark.parametrize("sticky", [False, True])
def test_same_single_and_multi_give_the_same_numbers(kind: str, sticky: bool) -> None:
    found = []
    for which in ("same", "single", "multi", "inline"):
        actor = actor_of(kind)
        it: Rollout
        if which == "same":
            it = same.rollout(drawing, actor, T, B, entropy=11, sticky=sticky)
        elif which == "single":
            it = single.rollout(drawing, actor, T, B, entropy=11, sticky=sticky, max_lag=0)
        else:
            how: Any = "fork" if which == "multi" else "inline"
            it = multi.rollout(drawing, actor, T, 1, B, 2, 1, entropy=11, sticky=sticky, max_lag=0, start_method=how)
        found.append(batches(it, actor, 4))
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert same_numbers(mine, theirs)
            assert mine.meta == theirs.meta
            assert mine.version == theirs.version
