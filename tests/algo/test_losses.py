"""The losses against plain NumPy, on fake batches; what is masked must not matter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zrl.algo import (
    Actor,
    Batch,
    Info,
    a2c,
    advantages,
    categorical,
    gae,
    impala,
    ppo,
    reinforce,
    returns,
    unroll,
    vtrace,
)

N_ACTIONS, N_FEATURES, HIDDEN = 3, 4, 5
Loss = Callable[[Batch, Actor], tuple[Tensor, Info]]
LOSSES: dict[str, Loss] = {"reinforce": reinforce, "a2c": a2c, "ppo": ppo, "impala": impala}
every_loss = pytest.mark.parametrize("name", LOSSES)


# -- fakes -----------------------------------------------------------------------------------------------------------


@dataclass
class FakeState:
    obs: dict[str, Tensor]
    act: Tensor
    rew: Tensor
    fin: Tensor
    term: Tensor

    def rows(self, start: int, stop: int) -> FakeState:
        obs = {k: x[start:stop] for k, x in self.obs.items()}
        return FakeState(obs, *(x[start:stop] for x in (self.act, self.rew, self.fin, self.term)))


@dataclass
class FakeBatch:
    state: FakeState
    actor: dict[str, Tensor]
    hx: Any
    bootstrap: Tensor
    final_value: Tensor
    mask: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def columns(self, *js: int) -> FakeBatch:
        def cut(x: Tensor) -> Tensor:
            return x[:, list(js)]

        s = self.state
        return FakeBatch(
            FakeState({k: cut(x) for k, x in s.obs.items()}, *map(cut, (s.act, s.rew, s.fin, s.term))),
            {k: cut(x) for k, x in self.actor.items()},
            cut(self.hx) if isinstance(self.hx, Tensor) else self.hx,
            cut(self.bootstrap),
            cut(self.final_value),
            cut(self.mask),
        )


class Policy(nn.Module):
    """Categorical actor-critic on nested observations, feed-forward or with a GRU."""

    def __init__(self, *, recurrent: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.core = nn.GRU(N_FEATURES, HIDDEN) if recurrent else None
        self.head = nn.Linear(HIDDEN if recurrent else N_FEATURES, N_ACTIONS + 1)
        self.double()

    def forward(
        self, obs: dict[str, Tensor], act: Tensor, rew: Tensor, fin: Tensor, *, hx: Any
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        x = torch.cat([obs["x"], act[..., None] / N_ACTIONS, rew[..., None]], dim=-1)
        if self.core is not None:
            x, hx = unroll(self.core, x, hx, fin)
        out = self.head(x)
        logits = out[..., :-1].log_softmax(-1)
        return categorical(logits), hx, {"value": out[..., -1], "logits": logits}

    def log_prob(self, info: dict[str, Tensor], act: Tensor) -> Tensor:
        return info["logits"].gather(-1, act[..., None]).squeeze(-1)

    def entropy(self, info: dict[str, Tensor]) -> Tensor:
        return -(info["logits"].exp() * info["logits"]).sum(-1)


def make_batch(actor: Policy, n_steps: int = 6, n_columns: int = 4, seed: int = 0) -> FakeBatch:
    """A fragment with ends, truncations and nothing masked, made by `actor`."""
    torch.manual_seed(seed)
    shape = (n_steps + 1, n_columns)
    fin = torch.rand(shape) < 0.3
    term = fin & (torch.rand(shape) < 0.5)
    obs = {"x": torch.randn(*shape, N_FEATURES - 2, dtype=torch.float64)}
    act, rew = torch.randint(N_ACTIONS, shape), torch.randn(shape, dtype=torch.float64)
    state = FakeState(obs, act, rew, fin, term)
    hx = torch.zeros(1, n_columns, HIDDEN, dtype=torch.float64) if actor.core is not None else ()
    with torch.no_grad():
        _, _, info = actor(obs, act, rew, fin, hx=hx)
    final_value = torch.where(fin & ~term, torch.randn(shape, dtype=torch.float64), 0)
    recorded = {k: x[:-1].clone() for k, x in info.items()}
    mask = torch.ones(n_steps, n_columns, dtype=torch.bool)
    return FakeBatch(state, recorded, hx, info["value"][-1:].clone(), final_value, mask)


def freeze(batch: FakeBatch, *, garbage: int | None = None) -> FakeBatch:
    """Mask column 0 altogether, column 1 from its third row on; fill what is masked with zeros or with garbage."""
    s, mask = batch.state, batch.mask.clone()
    mask[:, 0] = mask[2:, 1] = False
    after = torch.cat([torch.zeros_like(mask[:1]), ~mask])  # rows of the state that a masked step led to
    torch.manual_seed(garbage or 0)

    def junk(x: Tensor, where: Tensor, bad: float = 0.0) -> Tensor:
        if x.dtype == torch.bool:
            new = torch.ones_like(x) if garbage is None else torch.rand(x.shape) < 0.5
        elif not x.is_floating_point():
            new = torch.zeros_like(x) if garbage is None else torch.randint(N_ACTIONS, x.shape)
        else:
            new = torch.zeros_like(x) if garbage is None else torch.randn_like(x).mul(100) + bad
        return torch.where(where.view(*where.shape, *[1] * (x.ndim - 2)), new, x)

    # What goes through the network stays finite: backward would send NaN on, multiplied by zero.
    state = FakeState(
        {k: junk(x, after) for k, x in s.obs.items()}, *(junk(x, after) for x in (s.act, s.rew, s.fin, s.term))
    )
    bad = math.nan if garbage else 0.0
    return replace(
        batch,
        state=state,
        actor={k: junk(x, ~mask, bad) for k, x in batch.actor.items()},
        bootstrap=junk(batch.bootstrap, ~mask[-1:], bad),
        final_value=junk(batch.final_value, after, bad),
        extra={k: junk(x, ~mask, bad) for k, x in batch.extra.items()},
        mask=mask,
    )


def gradients(loss: Tensor, actor: Policy) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(actor.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


# -- values ----------------------------------------------------------------------------------------------------------


class Plain:
    """What a loss needs, in NumPy, with the tests of the recursions taken for granted."""

    def __init__(self, batch: FakeBatch, actor: Policy) -> None:
        s, act = batch.state, batch.state.act[1:]
        with torch.no_grad():
            _, _, info = actor(s.obs, s.act, s.rew, s.fin, hx=batch.hx)
            now = {k: x[:-1] for k, x in info.items()}
            self.log_pi = actor.log_prob(now, act).numpy()
            log_mu = actor.log_prob(batch.actor, act).numpy()
            self.entropy = actor.entropy(now).numpy().mean()
        self.value, self.last = info["value"][:-1].numpy(), info["value"][-1].numpy()
        self.old_value, self.old_last = batch.actor["value"].numpy(), batch.bootstrap[0].numpy()
        self.rho = np.exp(self.log_pi - log_mu)
        self.steps: tuple[Any, Any] = s.rew[1:].numpy(), s.fin[1:].numpy()
        self.final_value = batch.final_value[1:].numpy()


def normal(x: NDArray[Any]) -> Any:
    return (x - x.mean()) / (x.std() + 1e-8)


@pytest.fixture(params=[False, True], ids=["on-policy", "off-policy"])
def off_policy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["mlp", "gru"])
def recurrent(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def setting(off_policy: bool, recurrent: bool) -> tuple[FakeBatch, Policy, Plain]:
    behaviour = Policy(recurrent=recurrent)
    actor = Policy(recurrent=recurrent, seed=1) if off_policy else behaviour
    batch = make_batch(behaviour)
    return batch, actor, Plain(batch, actor)


def test_reinforce(setting: tuple[FakeBatch, Policy, Plain]) -> None:
    batch, actor, p = setting
    rew, fin = p.steps
    loss, info = reinforce(batch, actor, gamma=0.9, c_entropy=0.3)
    g = returns(rew, fin, gamma=0.9, bootstrap=p.old_last, final_value=p.final_value)
    policy = -(p.log_pi * (g - g.mean(0)) * np.minimum(p.rho, 1)).mean()
    assert info["policy"].item() == pytest.approx(policy)
    assert info["returns"].item() == pytest.approx(g.mean())
    assert loss.item() == pytest.approx(policy - 0.3 * p.entropy)


@pytest.mark.parametrize("normalize", [False, True])
def test_a2c(setting: tuple[FakeBatch, Policy, Plain], normalize: bool) -> None:
    batch, actor, p = setting
    rew, fin = p.steps
    options: dict[str, Any] = {"gamma": 0.9, "final_value": p.final_value, "bootstrap": p.last, "lam": 0.8}
    loss, info = a2c(batch, actor, gamma=0.9, lam=0.8, c_value=0.7, c_entropy=0.3, normalize=normalize)
    adv = vtrace(rew, fin, p.value, rho=p.rho, **options).vs - p.value
    if actor.head.weight.equal(Policy(recurrent=actor.core is not None).head.weight):
        np.testing.assert_allclose(adv, gae(rew, fin, p.value, **options), rtol=1e-9, atol=1e-12)
    policy, value = -(p.log_pi * (normal(adv) if normalize else adv)).mean(), 0.5 * (adv**2).mean()
    assert info["policy"].item() == pytest.approx(policy)
    assert info["value"].item() == pytest.approx(value)
    assert loss.item() == pytest.approx(policy + 0.7 * value - 0.3 * p.entropy)


def test_impala(setting: tuple[FakeBatch, Policy, Plain]) -> None:
    batch, actor, p = setting
    rew, fin = p.steps
    clips = {"clip_rho": 1.5, "clip_c": 0.9, "clip_pg_rho": 2.0}
    loss, info = impala(batch, actor, gamma=0.9, lam=0.8, c_value=0.7, c_entropy=0.3, **clips)
    options: dict[str, Any] = {"gamma": 0.9, "final_value": p.final_value, "bootstrap": p.last, "lam": 0.8, **clips}
    target = vtrace(rew, fin, p.value, rho=p.rho, **options)
    policy, value = -(p.log_pi * target.adv).mean(), 0.5 * ((target.vs - p.value) ** 2).mean()
    assert info["policy"].item() == pytest.approx(policy)
    assert info["value"].item() == pytest.approx(value)
    assert loss.item() == pytest.approx(policy + 0.7 * value - 0.3 * p.entropy)


@pytest.mark.parametrize("clip_value", [None, 0.1])
@pytest.mark.parametrize("normalize", [False, True])
def test_ppo(setting: tuple[FakeBatch, Policy, Plain], clip_value: float | None, normalize: bool) -> None:
    batch, actor, p = setting
    options: dict[str, Any] = {"normalize": normalize, "clip_value": clip_value, "clip": 0.1}
    loss, info = ppo(batch, actor, gamma=0.9, lam=0.8, c_value=0.7, c_entropy=0.3, **options)

    rew, fin = p.steps
    adv = gae(rew, fin, p.old_value, gamma=0.9, lam=0.8, bootstrap=p.old_last, final_value=p.final_value)
    ret, score = adv + p.old_value, normal(adv) if normalize else adv
    policy = -np.minimum(p.rho * score, np.clip(p.rho, 0.9, 1.1) * score).mean()
    error = (p.value - ret) ** 2
    if clip_value is not None:
        near = p.old_value + np.clip(p.value - p.old_value, -clip_value, clip_value)
        error = np.maximum(error, (near - ret) ** 2)
    assert info["policy"].item() == pytest.approx(policy)
    assert info["value"].item() == pytest.approx(0.5 * error.mean())
    assert info["clip_fraction"].item() == pytest.approx((abs(p.rho - 1) > 0.1).mean())
    assert loss.item() == pytest.approx(policy + 0.35 * error.mean() - 0.3 * p.entropy)


@every_loss
def test_info_is_of_detached_scalars_and_says_how_far_off_policy(
    setting: tuple[FakeBatch, Policy, Plain], name: str
) -> None:
    batch, actor, p = setting
    loss, info = LOSSES[name](batch, actor)
    assert loss.shape == ()
    assert loss.requires_grad
    for x in info.values():
        assert x.shape == ()
        assert not x.requires_grad
    assert info["rho_mean"].item() == pytest.approx(p.rho.mean())
    assert info["kl"].item() == pytest.approx((p.rho - 1 - np.log(p.rho)).mean(), abs=1e-12)
    assert info["entropy"].item() == pytest.approx(p.entropy)


@every_loss
def test_every_parameter_gets_a_finite_gradient(setting: tuple[FakeBatch, Policy, Plain], name: str) -> None:
    batch, actor, _ = setting
    loss, _ = LOSSES[name](batch, actor)
    for g in torch.autograd.grad(loss, list(actor.parameters())):
        assert g.isfinite().all()
        assert g.ne(0).any()


def test_policy_gradients_do_not_reach_the_value_and_targets_are_constant() -> None:
    actor = Policy()
    batch = make_batch(Policy(seed=1))
    for loss_of in (a2c, impala, ppo):
        loss, _ = loss_of(batch, actor, c_value=0.0)
        assert gradients(loss, actor)[0][-1].eq(0).all()  # the last row of the head makes the value
        loss, _ = loss_of(batch, actor, c_value=1.0, c_entropy=0.0)
        error, _ = loss_of(batch, actor, c_value=2.0, c_entropy=0.0)
        assert gradients(error - loss, actor)[0][:-1].eq(0).all()


# -- masks -----------------------------------------------------------------------------------------------------------


@every_loss
def test_masked_garbage_changes_nothing(name: str, recurrent: bool) -> None:
    actor = Policy(recurrent=recurrent, seed=1)
    batch = make_batch(Policy(recurrent=recurrent))
    if name == "ppo":
        batch.extra = advantages(batch)
    results = []
    for garbage in (None, 1, 2):
        loss, info = LOSSES[name](freeze(batch, garbage=garbage), actor)
        results.append((loss, info, gradients(loss, actor)))
    assert results[0][0].isfinite()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@every_loss
def test_a_masked_column_is_as_good_as_none(name: str) -> None:
    actor, batch = Policy(seed=1), freeze(make_batch(Policy()))
    with_it, without = LOSSES[name](batch, actor), LOSSES[name](batch.columns(1, 2, 3), actor)
    torch.testing.assert_close(with_it, without)


@every_loss
def test_a_batch_without_actions_has_a_loss_of_zero(name: str) -> None:
    actor, batch = Policy(seed=1), make_batch(Policy())
    batch.mask = torch.zeros_like(batch.mask)
    loss, info = LOSSES[name](batch, actor)
    assert loss.item() == 0
    assert all(x == 0 for x in info.values())
    assert all(g.eq(0).all() for g in gradients(loss, actor))


def test_no_trace_crosses_a_masked_row() -> None:
    """As with the dummy rows of vector environments: the step before is an end, the one after a beginning."""
    batch = make_batch(Policy(), n_steps=5, n_columns=1)
    batch.state.fin[:] = False
    batch.state.fin[3] = True
    batch.mask[3] = False
    before = advantages(batch)["adv"]
    batch.state.rew[5] += 1
    batch.state.rew[4] += 100  # of the masked row itself
    change = advantages(batch)["adv"] - before
    torch.testing.assert_close(change.flatten(), torch.tensor([0, 0, 0, 0, 1.0], dtype=torch.float64))


# -- the parts of a batch --------------------------------------------------------------------------------------------


def test_the_recorded_log_prob_is_the_behaviour_policy() -> None:
    """An actor that mixes in exploration reports what it sampled from; its logits are those of the target policy."""
    actor = Policy()
    batch = make_batch(actor)
    log_mu = actor.log_prob(batch.actor, batch.state.act[1:])
    batch.actor["log_prob"] = log_mu - math.log(2)
    for loss_of in LOSSES.values():
        _, info = loss_of(batch, actor)
        assert info["rho_mean"].item() == pytest.approx(2.0)


def test_ppo_on_policy_has_ratio_one() -> None:
    actor = Policy(recurrent=True)
    batch = make_batch(actor)
    _, info = ppo(batch, actor, normalize=False)
    assert info["clip_fraction"] == 0
    assert info["policy"].item() == pytest.approx(-advantages(batch)["adv"].mean().item())


def test_minibatches_of_columns_add_up_to_the_batch() -> None:
    actor, batch = Policy(seed=1), make_batch(Policy())
    batch.extra = advantages(batch, gamma=0.9)
    halves = [batch.columns(0, 1), batch.columns(2, 3)]
    for half, js in zip(halves, ([0, 1], [2, 3]), strict=True):
        half.extra = {k: x[:, js] for k, x in batch.extra.items()}
    of = functools.partial(ppo, actor=actor, normalize=False)
    whole, parts = of(batch)[0], [of(half)[0] for half in halves]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_ppo_takes_advantages_from_extra() -> None:
    actor, batch = Policy(), make_batch(Policy())
    batch.extra = {"adv": torch.ones_like(batch.state.rew[1:]), "ret": batch.actor["value"]}
    _, info = ppo(batch, actor, normalize=False)
    assert info["policy"].item() == pytest.approx(-1)
    assert info["value"].item() == pytest.approx(0, abs=1e-12)


def test_truncation_is_not_termination() -> None:
    batch = make_batch(Policy(), n_steps=4, n_columns=1)
    batch.state.fin[:], batch.state.term[:] = False, False
    batch.state.fin[2], batch.final_value[2] = True, 10.0
    cut = advantages(batch, gamma=0.5, lam=0.0)["adv"]
    batch.final_value[2] = 0.0
    ended = advantages(batch, gamma=0.5, lam=0.0)["adv"]
    torch.testing.assert_close((cut - ended).flatten(), torch.tensor([0, 5.0, 0, 0], dtype=torch.float64))


def test_one_step_is_enough() -> None:
    actor, batch = Policy(recurrent=True, seed=1), make_batch(Policy(recurrent=True), n_steps=1, n_columns=1)
    for loss_of in LOSSES.values():
        loss, _ = loss_of(batch, actor)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients(loss, actor))


@every_loss
def test_absurd_ratios_keep_loss_and_gradient_finite(name: str) -> None:
    actor, batch = Policy().float(), make_batch(Policy())
    s = batch.state
    batch.state = FakeState({"x": s.obs["x"].float()}, s.act, s.rew.float(), s.fin, s.term)
    batch.actor = {k: x.float() for k, x in batch.actor.items()}
    batch.bootstrap, batch.final_value = batch.bootstrap.float(), batch.final_value.float()
    batch.actor["log_prob"] = torch.full(batch.mask.shape, -200.0)
    batch.actor["log_prob"][::2] = 200.0
    loss, info = LOSSES[name](batch, actor)
    assert loss.isfinite()
    assert all(x.isfinite() for x in info.values())
    assert all(g.isfinite().all() for g in gradients(loss, actor))


@every_loss
def test_a_stray_dimension_raises(name: str) -> None:
    class Stray(Policy):
        def log_prob(self, info: dict[str, Tensor], act: Tensor) -> Tensor:
            return super().log_prob(info, act)[..., None]

    with pytest.raises(ValueError, match=r"log_prob must be \[T, B\] = \(6, 4\), got \(6, 4, 1\)"):
        LOSSES[name](make_batch(Policy()), Stray())
