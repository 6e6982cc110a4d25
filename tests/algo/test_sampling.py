"""Sampling: the distribution, what is impossible, and the density of mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zrl.algo import categorical, mix_uniform

INF = math.inf


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, -7.0])  # unnormalized either way
def test_frequencies_pass_a_chi_square_test(dtype: torch.dtype, shift: float) -> None:
    logits = (torch.tensor([0.0, -1.0, -2.0, 1.0, -4.0]) + shift).to(dtype)
    n = 20_000
    sample = categorical(logits.expand(n, 5), generator=torch.Generator().manual_seed(1))
    expected = n * logits.double().softmax(-1)
    chi_square = (sample.bincount(minlength=5) - expected).square().div(expected).sum()
    assert chi_square < 18.47  # the 99.9% quantile for 4 degrees of freedom


@settings(derandomize=True)
@given(st.lists(st.integers(1, 3), max_size=3), st.integers(1, 4))
def test_shapes(batch: list[int], n: int) -> None:
    sample = categorical(torch.zeros(*batch, n))
    assert (sample.shape, sample.dtype) == (tuple(batch), torch.int64)
    assert ((sample >= 0) & (sample < n)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_minus_infinity_is_never_sampled(dtype: torch.dtype) -> None:
    logits = torch.tensor([-INF, -30.0, -INF, 0.0, -INF], dtype=dtype).expand(20_000, 5)
    assert set(categorical(logits).tolist()) <= {1, 3}
    only = torch.tensor([-INF, -1e4, -INF], dtype=dtype).expand(1000, 3)
    assert categorical(only).eq(1).all()


def test_a_generator_makes_it_repeatable_and_leaves_the_global_stream_alone() -> None:
    logits, state = torch.zeros(50, 9), torch.get_rng_state()
    a, b = (categorical(logits, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert a.equal(b)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_race_with_the_noise_of_single_precision(dtype: torch.dtype) -> None:
    logits = torch.arange(8.0).div(4).expand(1000, 8)
    half, single = (categorical(x, generator=torch.Generator().manual_seed(4)) for x in (logits.to(dtype), logits))
    assert half.equal(single)


def test_logits_are_neither_changed_nor_differentiated() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    before = logits.detach().clone()
    assert not categorical(logits).requires_grad
    assert logits.detach().equal(before)
    assert categorical(torch.randn(3, 4).t()).shape == (4,)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_mixture_with_the_uniform_distribution(epsilon: float) -> None:
    logits = torch.randn(3, 2, 5, dtype=torch.float64)
    expected = (1 - epsilon) * logits.softmax(-1) + epsilon / 5
    torch.testing.assert_close(mix_uniform(logits, epsilon).exp(), expected)


def test_mixture_leaves_masked_actions_impossible() -> None:
    logits = torch.tensor([0.0, -INF, 1.0, -INF], requires_grad=True)
    log_prob = mix_uniform(logits, 0.5)
    expected = 0.5 * torch.tensor([0.0, 1.0]).softmax(-1) + 0.25
    torch.testing.assert_close(log_prob[[0, 2]].exp(), expected)
    assert log_prob[[1, 3]].eq(-INF).all()


def test_mixture_with_a_rate_for_each_column() -> None:
    logits, rates = torch.randn(4, 3, 5), torch.tensor([[0.0], [0.3], [1.0]])
    columns = [mix_uniform(logits[:, j], float(rates[j])) for j in range(3)]
    torch.testing.assert_close(mix_uniform(logits, rates), torch.stack(columns, dim=1))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_gradients_of_the_mixture_are_finite(epsilon: float) -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [-500.0, 500.0, -INF]], requires_grad=True)
    (gradient,) = torch.autograd.grad(
        mix_uniform(logits, epsilon)[:, 0].sum() + mix_uniform(logits, epsilon)[1, 1], logits
    )
    assert gradient.isfinite().all()
    assert gradient[logits == -INF].eq(0).all()
