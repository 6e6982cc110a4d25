"""The actor's defaults: densities against torch.distributions, and the reset of one column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from tests.toys import CountingActor, RandomActor
from zrl import ActorError

T, B = 4, 3


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def randint(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


ACTOR = RandomActor()


def categorical(logits: Tensor) -> Distribution:
    return Categorical(logits=logits)


def log_prob_of(dist: Distribution, act: Tensor) -> Tensor:
    x: Tensor = dist.log_prob(act)
    return x


def entropy_of(dist: Distribution) -> Tensor:
    x: Tensor = dist.entropy()
    return x


# -- categorical -----------------------------------------------------------------------------------------------------


def test_categorical() -> None:
    logits, act = randn(T, B, 5), randint(5, T, B)
    dist = categorical(logits)
    torch.testing.assert_close(ACTOR.log_prob({"logits": logits}, act), log_prob_of(dist, act))
    torch.testing.assert_close(ACTOR.entropy({"logits": logits}), entropy_of(dist))


def test_logits_need_not_be_normalised_nor_actions_be_int64() -> None:
    logits, act = randn(T, B, 5), randint(5, T, B)
    expected = ACTOR.log_prob({"logits": logits}, act)
    torch.testing.assert_close(ACTOR.log_prob({"logits": logits + 100.0}, act.to(torch.uint8)), expected)
    torch.testing.assert_close(ACTOR.entropy({"logits": logits - 100.0}), ACTOR.entropy({"logits": logits}))


def test_forbidden_actions() -> None:
    """−inf is probability 0: no NaN in value or gradient, of the allowed actions or the entropy."""
    logits = randn(T, B, 5, grad=True)
    forbidden = torch.zeros(T, B, 5, dtype=torch.bool)
    forbidden[..., 1] = forbidden[0, 0, :4] = True  # one action alone is left at [0, 0]
    info, act = {"logits": logits.masked_fill(forbidden, -torch.inf)}, torch.full((T, B), 4)
    log_prob, entropy = ACTOR.log_prob(info, act), ACTOR.entropy(info)
    assert log_prob[0, 0] == 0
    assert entropy[0, 0] == 0
    few = categorical(logits[..., [0, 2, 3, 4]])
    rest = ~forbidden[..., 0]
    torch.testing.assert_close(log_prob[rest], log_prob_of(few, torch.tensor(3))[rest])
    torch.testing.assert_close(entropy[rest], entropy_of(few)[rest])
    for x in (log_prob, entropy):
        (grad,) = torch.autograd.grad(x.sum(), logits, retain_graph=True)
        assert torch.isfinite(grad).all()
        assert not grad[forbidden].any()
        assert grad[1].any()
    assert ACTOR.log_prob(info, torch.full((T, B), 1)).isneginf().all()


def test_gradients_of_the_defaults() -> None:
    logits, act = randn(2, 2, 3, seed=1).double().requires_grad_(), randint(3, 2, 2)
    assert torch.autograd.gradcheck(lambda x: ACTOR.log_prob({"logits": x}, act), logits)
    assert torch.autograd.gradcheck(lambda x: ACTOR.entropy({"logits": x}), logits)


class Move(NamedTuple):
    to: Any
    by: Any


def test_nested_actions_are_summed() -> None:
    a, b, c = randn(T, B, 4), randn(T, B, 2, seed=1), randn(T, B, 3, seed=2)
    act_a, act_b, act_c = randint(4, T, B), randint(2, T, B, seed=1), randint(3, T, B, seed=2)
    info = {"logits": {"m": Move(b, [c]), "a": a}}
    dists = [categorical(x) for x in (a, b, c)]
    expected = sum(log_prob_of(d, x) for d, x in zip(dists, (act_a, act_b, act_c), strict=True))
    torch.testing.assert_close(ACTOR.log_prob(info, {"a": act_a, "m": Move(act_b, [act_c])}), expected)
    torch.testing.assert_close(ACTOR.entropy(info), sum(map(entropy_of, dists)))


def test_multi_discrete_as_one_tensor() -> None:
    """One categorical a component; the short ones are padded with −inf."""
    logits = randn(T, B, 3, 5)
    logits[..., 0, 2:] = logits[..., 1, 3:] = -torch.inf
    act = torch.stack([randint(2, T, B), randint(3, T, B), randint(5, T, B)], -1)
    parts = [categorical(logits[..., i, :n]) for i, n in enumerate((2, 3, 5))]
    expected = sum(log_prob_of(dist, act[..., i]) for i, dist in enumerate(parts))
    torch.testing.assert_close(ACTOR.log_prob({"logits": logits}, act), expected)
    torch.testing.assert_close(ACTOR.entropy({"logits": logits}), sum(entropy_of(dist) for dist in parts))


def test_multi_discrete_as_a_list() -> None:
    logits = [randn(T, B, n, seed=n) for n in (2, 3, 5)]
    act = torch.stack([randint(n, T, B) for n in (2, 3, 5)], -1)
    expected = sum(log_prob_of(categorical(x), act[..., i]) for i, x in enumerate(logits))
    torch.testing.assert_close(ACTOR.log_prob({"logits": logits}, act), expected)
    nested = ACTOR.log_prob({"logits": {"x": tuple(logits), "y": logits[0]}}, {"x": act, "y": act[..., 0]})
    torch.testing.assert_close(nested, expected + log_prob_of(categorical(logits[0]), act[..., 0]))


def test_multi_binary_as_one_tensor() -> None:
    logits, act = randn(T, B, 4, 2), randint(2, T, B, 4).to(torch.int8)
    expected = Independent(categorical(logits), 1)
    torch.testing.assert_close(ACTOR.log_prob({"logits": logits}, act), log_prob_of(expected, act))
    torch.testing.assert_close(ACTOR.entropy({"logits": logits}), entropy_of(expected))


# -- Gaussian --------------------------------------------------------------------------------------------------------


def gaussian(mean: Tensor, log_std: Tensor) -> Distribution:
    return Independent(Normal(mean, log_std.exp()), mean.dim() - 2)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_gaussian(shape: tuple[int, ...]) -> None:
    act = randn(T, B, *shape, seed=2)

    def with_gradients(ask: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        mean, log_std = (randn(T, B, *shape, seed=seed, grad=True) for seed in range(2))
        x = ask(mean, log_std)
        grads = torch.autograd.grad(x.sum(), (mean, log_std), allow_unused=True)
        return x, *(torch.zeros_like(mean) if g is None else g for g in grads)

    mine = with_gradients(lambda m, s: ACTOR.log_prob({"mean": m, "log_std": s}, act))
    torch.testing.assert_close(mine, with_gradients(lambda m, s: log_prob_of(gaussian(m, s), act)))
    mine = with_gradients(lambda m, s: ACTOR.entropy({"mean": m, "log_std": s}))
    torch.testing.assert_close(mine, with_gradients(lambda m, s: entropy_of(gaussian(m, s))))


def test_a_log_std_that_does_not_depend_on_the_state() -> None:
    """It broadcasts: a parameter [n] against means [T, B, n]."""
    mean, log_std, act = randn(T, B, 2), randn(2, seed=1), randn(T, B, 2, seed=2)
    dist, info = gaussian(mean, log_std), {"mean": mean, "log_std": log_std}
    torch.testing.assert_close(ACTOR.log_prob(info, act), log_prob_of(dist, act))
    torch.testing.assert_close(ACTOR.entropy(info), entropy_of(dist))


def test_nested_gaussians() -> None:
    mean, log_std, act = randn(T, B, 2), randn(T, B, 2, seed=1), randn(T, B, 2, seed=2)
    info = {"mean": {"x": mean, "y": (mean[..., 0],)}, "log_std": {"x": log_std, "y": (log_std[..., 0],)}}
    expected = log_prob_of(gaussian(mean, log_std), act)
    expected = expected + log_prob_of(gaussian(mean[..., 0], log_std[..., 0]), act[..., 1])
    torch.testing.assert_close(ACTOR.log_prob(info, {"y": (act[..., 1],), "x": act}), expected)


@pytest.mark.parametrize("info", [{}, {"value": torch.zeros(T, B)}, {"mean": torch.zeros(T, B)}])
def test_an_unknown_density(info: dict[str, Any]) -> None:
    asks: list[Callable[[], Tensor]] = [lambda: ACTOR.log_prob(info, torch.zeros(T, B)), lambda: ACTOR.entropy(info)]
    for ask in asks:
        with pytest.raises(ActorError, match="override log_prob") as e:
            ask()
        assert e.value.leaf == "info"
        assert "logits" in e.value.expected
        assert all(repr(key) in e.value.found for key in info)


# -- methods ---------------------------------------------------------------------------------------------------------


def test_reset_zeroes_one_column_of_a_copy() -> None:
    hx = {"h": (torch.ones(2, B, 4), Move(torch.ones(1, B), [torch.ones(1, B, 2, 2, dtype=torch.int64)]))}
    new = ACTOR.reset(1, hx)
    for h, x in zip(flat(hx), flat(new), strict=True):
        assert h.eq(1).all()
        assert x[:, [0, 2]].eq(1).all()
        assert x[:, 1].eq(0).all()
    assert isinstance(new["h"][1], Move)
    assert ACTOR.reset(0, ()) == ()


def flat(hx: Any) -> list[Tensor]:
    h, move = hx["h"]
    return [h, move.to, *move.by]


def test_step_and_value_call_forward() -> None:
    actor = CountingActor()
    obs = torch.tensor([[[0.0, 0.0, 3.0], [1.0, 1.0, 2.0]]])
    inputs = obs, torch.tensor([[1, 2]]), torch.tensor([[5.0, 6.0]]), torch.tensor([[False, True]])
    hx = torch.full((1, 2, 1), 4.0)
    actions, new, info = actor.step(*inputs, hx)
    assert actions.shape == (1, 2)
    assert new.flatten().tolist() == [5, 1]
    assert torch.equal(actor.value(*inputs, hx), info["value"])
    assert hx.flatten().tolist() == [4, 4]
