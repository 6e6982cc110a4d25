"""Fragments made by NumPy: what the network says, but for the last bits."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.toys import SpaceEnv
from zrl import Batch
from zrl.collect.build import CollectOptions, build
from zrl.rollout import same
from zrl.zoo import MLPActor
from zrl.zoo.by_numpy import MLPByNumpy

BOX = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
SHIFTED = gym.spaces.Discrete(3, start=-7)


def actor_of(action_space: gym.Space[Any] = SHIFTED, observation_space: gym.Space[Any] = BOX, **more: Any) -> MLPActor:
    torch.manual_seed(0)
    actor = MLPActor(observation_space, action_space, hidden=(16, 8), **{"numpy": True, **more})
    with torch.no_grad():  # else nearly all policies are alike
        for p in actor.parameters():
            p.normal_()
    return actor


def env() -> SpaceEnv:
    return SpaceEnv(BOX, SHIFTED, limit=5)


def check(batch: Batch, actor: MLPActor) -> None:
    """What was recorded is what the network says of the observations that were."""
    x = batch.state.rows(0, len(batch.mask))
    with torch.no_grad():
        _, _, info = actor(x.obs, x.act, x.rew, x.fin, hx=())
    assert info.keys() == batch.actor.keys()
    for name, expected in info.items():
        torch.testing.assert_close(batch.actor[name], expected, rtol=1e-4, atol=1e-5)
        assert batch.actor[name].dtype == expected.dtype
    act = batch.state.act[1:]
    assert act.dtype == torch.int64
    assert ((act >= -7) & (act < -4)).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.ReLU])
def test_records_what_the_network_says(shared: bool, activation: type[torch.nn.Module]) -> None:
    actor = actor_of(shared=shared, activation=activation)
    with same.rollout(env, actor, 6, 4, entropy=0) as batches:
        for _ in range(4):
            check(next(batches), actor)
            with torch.no_grad():  # in place, as an optimizer does it
                for p in actor.parameters():
                    p.mul_(0.9)


def test_weights_that_were_replaced_are_seen() -> None:
    actor = actor_of()
    step = MLPByNumpy(actor)
    obs = np.ones((2, 3), np.float32)
    assert step.begin(1, 2)
    before = step(obs, 0)[1]
    actor.core[0].weight = torch.nn.Parameter(torch.zeros(16, 3))
    actor.core[0].bias.data = torch.zeros(16)
    assert step.begin(1, 2)
    assert not np.allclose(step(obs, 0)[1], before)
    with torch.no_grad():
        expected = actor.policy.linear(actor.core(torch.from_numpy(obs)))
    np.testing.assert_allclose(step(obs, 0)[1], expected, rtol=1e-5)


def test_samples_the_policy() -> None:
    """Frequencies over many draws, within five deviations."""
    actor = actor_of()
    step, n = MLPByNumpy(actor), 50_000
    obs = np.tile(np.array([0.3, -0.2, 0.5], np.float32), (n, 1))
    torch.manual_seed(1)
    assert step.begin(2, n)
    for t in range(2):
        act, logits, _ = step(obs, t)
        p = torch.from_numpy(logits[0]).softmax(-1).numpy()
        found = np.bincount(act + 7, minlength=3) / n
        assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-6).all(), (found, p)
    assert not np.array_equal(step(obs, 0)[0], step(obs, 1)[0])  # each row has its own numbers


def test_acts_greedily_in_eval_mode_and_draws_nothing() -> None:
    actor = actor_of().eval()
    step = MLPByNumpy(actor)
    state = torch.get_rng_state()
    assert step.begin(1, 5)
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    act, logits, _ = step(obs, 0)
    assert act.tolist() == (logits.argmax(-1) - 7).tolist()
    assert torch.equal(torch.get_rng_state(), state)


def context(actor: MLPActor, **options: Any) -> Any:
    space = SpaceEnv(actor_space(actor), SHIFTED)
    ctx = build([space], actor, CollectOptions(n_steps=2, n_columns=1, **options))
    ctx.columns.close()
    return ctx


def actor_space(actor: MLPActor) -> gym.Space[Any]:
    return BOX if actor.features.size == 3 else gym.spaces.Discrete(4)


def test_where_it_is_not_asked_for_or_cannot_be_tensors_do_it() -> None:
    assert context(actor_of()).arrays is not None
    assert context(actor_of(numpy=False)).arrays is None
    assert context(actor_of(), debug=True).arrays is None  # where every step is looked at
    assert context(actor_of(observation_space=gym.spaces.Discrete(4))).arrays is None
    assert actor_of(gym.spaces.Box(-1, 1, (2,), np.float32)).by_arrays() is None
    assert actor_of(observation_space=gym.spaces.Box(-1, 1, (3,), np.float64)).by_arrays() is None

    class Mine(MLPActor):
        def forward(self, *args: Any, **more: Any) -> Any:
            return super().forward(*args, **more)

    assert Mine(BOX, SHIFTED, numpy=True).by_arrays() is None  # it may compute something else


@pytest.mark.parametrize("spoil", ["hook", "double", "layer"])
def test_an_actor_that_was_changed_is_stepped_by_tensors(spoil: str) -> None:
    actor = actor_of()
    seen: list[int] = []
    if spoil == "hook":
        actor.core[1].register_forward_hook(lambda *_: seen.append(1))
    elif spoil == "layer":
        actor.core[1] = torch.nn.Sigmoid()
    else:
        actor.core.double()
    step = actor.by_arrays()
    assert step is not None
    assert not step.begin(2, 2)
    if spoil != "double":
        with same.rollout(env, actor, 6, 2, entropy=0) as batches:
            check(next(batches), actor)
    assert bool(seen) == (spoil == "hook")
