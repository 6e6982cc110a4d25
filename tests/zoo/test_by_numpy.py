"""Fragments made by NumPy: what the network says, but for the last bits."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.toys import SpaceEnv
from zrl import Batch
from zrl.collect.build import CollectOptions, build
from zrl.rollout import same
from zrl.zoo import GRUActor, MLPActor
from zrl.zoo.by_numpy import GRUByNumpy, MLPByNumpy

BOX = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
SHIFTED = gym.spaces.Discrete(3, start=-7)


IMAGE = gym.spaces.Box(0, 255, (3, 2, 2), np.uint8)
ARM = gym.spaces.Box(-2.0, 2.0, (2, 2), np.float32)
Ours = MLPActor | GRUActor


def actor_of(
    action_space: gym.Space[Any] = SHIFTED,
    observation_space: gym.Space[Any] = BOX,
    kind: type[Ours] = MLPActor,
    **more: Any,
) -> Any:
    torch.manual_seed(0)
    hidden: Any = (16, 8) if kind is MLPActor else 8
    actor = kind(observation_space, action_space, hidden=hidden, **{"numpy": True, **more})
    with torch.no_grad():  # else nearly all policies are alike
        for p in actor.parameters():
            p.normal_()
    return actor


class Terminating(SpaceEnv):
    def step(self, action: Any) -> Any:
        obs, rew, term, trunc, info = super().step(action)
        return obs, rew, term or trunc, False, info


def env() -> SpaceEnv:
    return SpaceEnv(BOX, SHIFTED, limit=5)


def check(batch: Batch, actor: Ours) -> Any:
    """What was recorded is what the network says of the observations that were, row by row: its outputs, the values of
    final observations, and the bootstrap. The recurrent state behind the last row, as the next fragment has it."""
    close: Any = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    s, hx = batch.state, batch.hx
    with torch.no_grad():
        for t in range(len(batch.mask)):
            x, after = s.rows(t, t + 1), s.rows(t + 1, t + 2)
            _, hx, info = actor(x.obs, x.act, x.rew, x.fin, hx=hx)
            assert info.keys() == batch.actor.keys()
            for name, expected in info.items():
                close(batch.actor[name][t : t + 1], expected)
                assert batch.actor[name].dtype == expected.dtype
            cut = after.fin & ~after.term
            final = batch.final_obs[t + 1 : t + 2]
            _, _, info = actor(final, after.act, after.rew, torch.zeros_like(after.fin), hx=hx)
            close(batch.final_value[t + 1 : t + 2], torch.where(cut, info["value"], 0.0))
        last = s.rows(len(batch.mask), len(batch.mask) + 1)
        _, _, info = actor(last.obs, last.act, last.rew, last.fin, hx=hx)
        close(batch.bootstrap, info["value"])
    act = s.act[1:]
    if "logits" in info:
        assert act.dtype == torch.int64
        assert ((act >= -7) & (act < -4)).all()
    else:
        assert act.dtype == torch.float32
    return hx if hx == () else hx.masked_fill(last.fin.unsqueeze(-1), 0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.ReLU])
def test_records_what_the_network_says(shared: bool, activation: type[torch.nn.Module]) -> None:
    actor = actor_of(shared=shared, activation=activation)
    with same.rollout(env, actor, 6, 4, entropy=0, keep_final_obs=True) as batches:
        for _ in range(4):
            check(next(batches), actor)
            with torch.no_grad():  # in place, as an optimizer does it
                for p in actor.parameters():
                    p.mul_(0.9)


@pytest.mark.parametrize("kind", [MLPActor, GRUActor])
@pytest.mark.parametrize("action_space", [SHIFTED, ARM], ids=["discrete", "gaussian"])
@pytest.mark.parametrize("observation_space", [BOX, IMAGE, gym.spaces.Box(-1.0, 1.0, (), np.float64)])
def test_all_that_can_be_computed_so(
    kind: type[Ours],
    action_space: gym.Space[Any],
    observation_space: gym.Space[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Episodes of several lengths end within the fragments, truncated or terminated: what is carried on fits, and so do
    the values that were asked for by tensors."""
    limits = iter([3, 4, 5, 7, 6])
    actor = actor_of(action_space, observation_space, kind)
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(0.3)

    def make() -> gym.Env[Any, Any]:
        limit = next(limits)
        return (Terminating if limit % 2 else SpaceEnv)(observation_space, action_space, limit=limit)

    by_numpy: Any = MLPByNumpy if kind is MLPActor else GRUByNumpy
    begin = by_numpy.begin
    begun: list[bool] = []

    def noted(*args: Any) -> bool:
        begun.append(begin(*args))
        return begun[-1]

    monkeypatch.setattr(by_numpy, "begin", noted)
    with same.rollout(make, actor, 8, 4, entropy=0, keep_final_obs=True) as batches:
        hx = None
        for _ in range(4):
            batch = next(batches)
            if hx is not None and kind is GRUActor:
                torch.testing.assert_close(batch.hx, hx, rtol=1e-4, atol=1e-4)
            hx = check(batch, actor)
            assert (batch.state.fin & ~batch.state.term)[1:].any()
            assert batch.state.term[1:].any()
    assert begun == [True] * 4


def test_weights_that_were_replaced_are_seen() -> None:
    actor = actor_of()
    step = MLPByNumpy(actor)
    obs = np.ones((2, 3), np.float32)
    assert step.begin(1, 2)
    before = outputs(step, obs)[1]
    actor.core[0].weight = torch.nn.Parameter(torch.zeros(16, 3))
    actor.core[0].bias.data = torch.zeros(16)
    assert step.begin(1, 2)
    assert not np.allclose(outputs(step, obs)[1], before)
    with torch.no_grad():
        expected = actor.policy.linear(actor.core(torch.from_numpy(obs)))
    np.testing.assert_allclose(outputs(step, obs)[1], expected, rtol=1e-5)


def outputs(step: MLPByNumpy, obs: Any, t: int = 0) -> tuple[Any, ...]:
    found, hx = step(obs, np.zeros(len(obs), bool), (), t)
    assert hx == ()
    return found


def test_samples_the_gaussian() -> None:
    """Mean and deviation of many draws, within five deviations of theirs."""
    actor = actor_of(ARM)
    step, n = MLPByNumpy(actor), 50_000
    obs = np.tile(np.array([0.3, -0.2, 0.5], np.float32), (n, 1))
    torch.manual_seed(1)
    assert step.begin(1, n)
    act, log_std, mean, _ = outputs(step, obs)
    std = np.exp(log_std)
    assert act.shape == mean.shape == (n, 2, 2)
    assert std.shape == (2, 2)
    assert (np.abs(act.mean(0) - mean[0]) < 5 * std / np.sqrt(n)).all()
    assert (np.abs(act.std(0) / std - 1) < 5 / np.sqrt(2 * n)).all()
    assert np.abs(np.corrcoef(act.reshape(n, 4).T) - np.eye(4)).max() < 5 / np.sqrt(n)
    assert actor.eval()
    assert step.begin(1, n)
    np.testing.assert_array_equal(*outputs(step, obs)[0:3:2])  # greedily: the mean


def test_samples_the_policy() -> None:
    """Frequencies over many draws, within five deviations."""
    actor = actor_of()
    step, n = MLPByNumpy(actor), 50_000
    obs = np.tile(np.array([0.3, -0.2, 0.5], np.float32), (n, 1))
    torch.manual_seed(1)
    assert step.begin(2, n)
    for t in range(2):
        act, logits, _ = outputs(step, obs, t)
        p = torch.from_numpy(logits[0]).softmax(-1).numpy()
        found = np.bincount(act + 7, minlength=3) / n
        assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-6).all(), (found, p)
    assert not np.array_equal(outputs(step, obs, 0)[0], outputs(step, obs, 1)[0])  # each row has its own numbers


def test_acts_greedily_in_eval_mode_and_draws_nothing() -> None:
    actor = actor_of().eval()
    step = MLPByNumpy(actor)
    state = torch.get_rng_state()
    assert step.begin(1, 5)
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    act, logits, _ = outputs(step, obs)
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
    assert actor_of(gym.spaces.MultiDiscrete([2, 3])).by_arrays() is None
    assert actor_of(observation_space=gym.spaces.Dict(a=BOX), kind=GRUActor).by_arrays() is None

    class Mine(MLPActor):
        def forward(self, *args: Any, **more: Any) -> Any:
            return super().forward(*args, **more)

    assert Mine(BOX, SHIFTED, numpy=True).by_arrays() is None  # it may compute something else


@pytest.mark.parametrize(
    "core", [torch.nn.GRU(8, 8, num_layers=2), torch.nn.GRU(8, 8, bias=False), torch.nn.LSTM(8, 8)], ids=repr
)
def test_other_cores_are_run_by_tensors(core: Any) -> None:
    actor = actor_of(kind=GRUActor)
    actor.core = core
    step = actor.by_arrays()
    assert step is not None
    assert not step.begin(2, 2)


def test_a_core_of_two_layers_steps_as_it_learns() -> None:
    actor = actor_of(kind=GRUActor, numpy=False)
    actor.core = torch.nn.GRU(8, 8, num_layers=2)
    obs, act, rew, fin = torch.ones(1, 4, 3), torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([[False, True] * 2])
    hx = torch.randn(2, 4, 8)
    with torch.inference_mode():
        _, stepped, info = actor.step(obs, act, rew, fin, hx)
        _, expected, of_forward = actor(obs, act, rew, fin, hx=hx)
    assert torch.equal(stepped, expected)
    assert torch.equal(info["value"], of_forward["value"])


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
        with same.rollout(env, actor, 6, 2, entropy=0, keep_final_obs=True) as batches:
            check(next(batches), actor)
    assert bool(seen) == (spoil == "hook")
