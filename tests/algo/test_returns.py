"""The recursions against the papers' sums, written out term by term in NumPy: no recursion, O(T^2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zrl.algo import gae, n_step, returns, td_error, vtrace

Floats = NDArray[np.floating[Any]]
GAMMA, LAM = 0.9, 0.8


@dataclass
class Case:
    """T steps of B columns, float64; index t holds what the step from row t led to."""

    rew: Floats
    fin: NDArray[np.bool_]
    final_value: Floats  # 0 where the episode terminated; garbage where it did not end
    value: Floats
    bootstrap: Floats
    rho: Floats

    @classmethod
    def random(cls, n_steps: int, n_columns: int, p_fin: float, seed: int) -> Case:
        rng, shape = np.random.default_rng(seed), (n_steps, n_columns)
        fin, truncated = rng.random(shape) < p_fin, rng.random(shape) < 0.5
        final = np.where(fin, np.where(truncated, rng.normal(size=shape), 0.0), np.nan)
        rew, value, bootstrap = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=n_columns)
        return cls(rew, fin, final, value, bootstrap, np.exp(rng.normal(size=shape)))

    def tensors(self, *names: str) -> dict[str, Any]:
        return {name: torch.as_tensor(getattr(self, name)) for name in names}

    def v_next(self, t: int, j: int) -> float:
        """The value that follows the step at t."""
        if self.fin[t, j]:
            return float(self.final_value[t, j])
        return float(self.value[t + 1, j] if t + 1 < len(self.rew) else self.bootstrap[j])

    def delta(self, t: int, j: int) -> float:
        return float(self.rew[t, j] + GAMMA * self.v_next(t, j) - self.value[t, j])

    def last(self, t: int, j: int) -> int:
        """The last step of the episode (or of the rows) that step t belongs to."""
        return next((k for k in range(t, len(self.rew)) if self.fin[k, j]), len(self.rew) - 1)

    def each(self, definition: Callable[[int, int], float]) -> Floats:
        n_steps, n_columns = self.rew.shape
        return np.array([[definition(t, j) for j in range(n_columns)] for t in range(n_steps)])


cases = st.builds(
    Case.random, st.integers(1, 13), st.integers(1, 3), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6)
)
STEPS = ("rew", "fin", "value", "bootstrap", "final_value")


def check(actual: Tensor, expected: Floats) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9)


# -- definitions -----------------------------------------------------------------------------------------------------


@settings(derandomize=True)
@given(cases, st.booleans())
def test_returns_are_the_discounted_sums_of_their_episode(c: Case, weighted: bool) -> None:
    omega = c.rho if weighted else np.ones_like(c.rew)

    def definition(t: int, j: int) -> float:
        last, end = c.last(t, j), c.bootstrap[j]
        terms = [GAMMA ** (k - t) * np.prod(omega[t : k + 1, j]) * c.rew[k, j] for k in range(t, last + 1)]
        end = c.final_value[last, j] if c.fin[last, j] else c.bootstrap[j]
        return float(sum(terms) + GAMMA ** (last + 1 - t) * np.prod(omega[t : last + 1, j]) * end)

    arguments = c.tensors("rew", "fin", "bootstrap", "final_value")
    actual = returns(**arguments, gamma=GAMMA, omega=torch.as_tensor(omega) if weighted else None)
    check(actual, c.each(definition))


@settings(derandomize=True)
@given(cases)
def test_td_errors(c: Case) -> None:
    check(td_error(**c.tensors(*STEPS), gamma=GAMMA), c.each(c.delta))


@settings(derandomize=True)
@given(cases)
def test_gae_is_equation_16(c: Case) -> None:
    def definition(t: int, j: int) -> float:
        return sum((GAMMA * LAM) ** (k - t) * c.delta(k, j) for k in range(t, c.last(t, j) + 1))

    check(gae(**c.tensors(*STEPS), gamma=GAMMA, lam=LAM), c.each(definition))


@settings(derandomize=True)
@given(cases, st.integers(1, 15))
def test_n_step_returns(c: Case, n: int) -> None:
    def definition(t: int, j: int) -> float:
        last = min(t + n - 1, c.last(t, j))
        rewards = sum(GAMMA ** (k - t) * c.rew[k, j] for k in range(t, last + 1))
        return float(rewards + GAMMA ** (last + 1 - t) * c.v_next(last, j))

    arguments = c.tensors(*STEPS)
    check(n_step(**arguments, n=n, gamma=GAMMA), c.each(definition))


@settings(derandomize=True)
@given(
    cases, st.sampled_from([0.7, 1.0, 2.5, math.inf]), st.sampled_from([0.7, 1.0, 2.5]), st.sampled_from([None, 1.5])
)
def test_vtrace_is_equation_1(c: Case, clip_rho: float, clip_c: float, clip_pg_rho: float | None) -> None:
    def target(t: int, j: int) -> float:
        terms = [
            GAMMA ** (k - t)
            * np.prod([LAM * min(clip_c, c.rho[i, j]) for i in range(t, k)])
            * min(clip_rho, c.rho[k, j])
            * c.delta(k, j)
            for k in range(t, c.last(t, j) + 1)
        ]
        return float(c.value[t, j] + sum(terms))

    vs = c.each(target)

    def advantage(t: int, j: int) -> float:
        ahead = vs[t + 1, j] if not c.fin[t, j] and t + 1 < len(vs) else c.v_next(t, j)
        clip = clip_rho if clip_pg_rho is None else clip_pg_rho
        return float(min(clip, c.rho[t, j]) * (c.rew[t, j] + GAMMA * ahead - c.value[t, j]))

    clips: dict[str, Any] = {"clip_rho": clip_rho, "clip_c": clip_c, "clip_pg_rho": clip_pg_rho}
    actual = vtrace(**c.tensors("rho", *STEPS), gamma=GAMMA, lam=LAM, **clips)
    check(actual.vs, vs)
    check(actual.adv, c.each(advantage))


# -- identities ------------------------------------------------------------------------------------------------------


@settings(derandomize=True)
@given(cases)
def test_on_policy_vtrace_is_gae(c: Case) -> None:
    arguments = c.tensors(*STEPS)
    target = vtrace(**arguments, rho=torch.ones_like(arguments["rew"]), gamma=GAMMA, lam=LAM)
    check(target.vs - arguments["value"], gae(**arguments, gamma=GAMMA, lam=LAM).numpy())


@settings(derandomize=True)
@given(cases)
def test_the_ends_of_n_step_and_gae_are_td_errors_and_returns(c: Case) -> None:
    arguments = c.tensors(*STEPS)
    value, n_steps = arguments["value"], len(c.rew)
    delta = td_error(**arguments, gamma=GAMMA)
    full = returns(**c.tensors("rew", "fin", "bootstrap", "final_value"), gamma=GAMMA)
    check(gae(**arguments, gamma=GAMMA, lam=0.0), delta.numpy())
    check(gae(**arguments, gamma=GAMMA, lam=1.0), (full - value).numpy())
    check(n_step(**arguments, n=1, gamma=GAMMA), (delta + value).numpy())
    check(n_step(**arguments, n=n_steps, gamma=GAMMA), full.numpy())
    check(n_step(**arguments, n=10 * n_steps, gamma=GAMMA), full.numpy())


def test_returns_of_all_rows_of_a_record_agree_with_those_of_its_steps() -> None:
    """As in the seed: T+1 rows in, `[1:]` of what comes out."""
    arguments = Case.random(9, 2, 0.3, seed=0).tensors("rew", "fin", "bootstrap", "final_value")
    end = arguments.pop("bootstrap")
    rows = {k: torch.cat([x[:1], x]) for k, x in arguments.items()}
    torch.testing.assert_close(
        returns(**rows, gamma=GAMMA, bootstrap=end)[1:], returns(**arguments, gamma=GAMMA, bootstrap=end)
    )


def test_without_final_values_truncation_counts_as_termination() -> None:
    c = Case.random(9, 2, 0.4, seed=1)
    arguments = c.tensors("rew", "fin", "value", "bootstrap")
    zeros = torch.zeros_like(arguments["rew"])
    without = gae(**arguments, gamma=GAMMA, lam=LAM)
    torch.testing.assert_close(without, gae(**arguments, gamma=GAMMA, lam=LAM, final_value=zeros))


def test_a_number_bootstraps_every_column() -> None:
    arguments = Case.random(5, 3, 0.2, seed=2).tensors("rew", "fin", "value")
    expected = gae(**arguments, gamma=GAMMA, lam=LAM, bootstrap=torch.full((3,), 0.1, dtype=torch.float64))
    for number in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        torch.testing.assert_close(gae(**arguments, gamma=GAMMA, lam=LAM, bootstrap=number), expected)


def test_any_number_of_batch_dimensions() -> None:
    c = Case.random(7, 6, 0.3, seed=3)
    expected = gae(**c.tensors(*STEPS), gamma=GAMMA, lam=LAM)
    matrix = {k: x.reshape(*x.shape[:-1], 2, 3) for k, x in c.tensors(*STEPS).items()}
    vector = {k: x[..., 0] for k, x in c.tensors(*STEPS).items()}
    torch.testing.assert_close(gae(**matrix, gamma=GAMMA, lam=LAM).flatten(1), expected)
    torch.testing.assert_close(gae(**vector, gamma=GAMMA, lam=LAM), expected[:, 0])


# -- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.99, 0.999, 1.0])
def test_long_fragments_are_as_exact_as_a_loop(gamma: float) -> None:
    """Rounding gamma to float32 is most of the error, of either."""
    rng = np.random.default_rng(0)
    rew, fin = rng.normal(size=(4096, 8)).astype(np.float32), rng.random((4096, 8)) < 1e-3

    def loop(dtype: type[np.floating[Any]]) -> Any:
        out, y = np.zeros(rew.shape, dtype), np.ones(8, dtype)
        for t in reversed(range(len(rew))):
            out[t] = y = rew[t] + dtype(gamma) * np.where(fin[t], dtype(0), y)
        return out

    exact = loop(np.float64)
    actual = returns(rew, fin, gamma=gamma, bootstrap=np.ones(8, np.float32))
    assert np.abs(actual - exact).max() < 2.5 * np.abs(loop(np.float32) - exact).max()


#: Around the sizes at which the recursion is cut in another way, and with odd rests on every level.
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 255, 256, 257, 1023, 1024, 1031]


def loop(x: dict[str, Tensor], gamma: float, lam: float) -> tuple[Tensor, ...]:
    """Returns, advantages, V-trace targets and advantages, row by row; final_value must be finite everywhere."""
    rew, value = x["rew"], x["value"]
    ret = ahead = target = x["bootstrap"]
    adv = trace = torch.zeros_like(ret)
    rows = []
    for t in reversed(range(len(rew))):
        goes_on, rho = ~x["fin"][t], x["rho"][t].clamp(max=1)
        ends = gamma * x["final_value"][t] * x["fin"][t]
        ret = rew[t] + ends + gamma * ret * goes_on
        delta = rew[t] + ends + gamma * ahead * goes_on - value[t]
        adv = delta + gamma * lam * adv * goes_on
        policy = rho * (rew[t] + ends + gamma * target * goes_on - value[t])
        trace = rho * delta + gamma * lam * rho * trace * goes_on
        ahead, target = value[t], value[t] + trace
        rows.append((ret, adv, target, policy))
    return tuple(torch.stack(column[::-1]) for column in zip(*rows, strict=True))


def ours(x: dict[str, Tensor], gamma: float, lam: float) -> tuple[Tensor, ...]:
    ends: dict[str, Any] = {k: x[k] for k in ("bootstrap", "final_value")}
    rew, fin, value = x["rew"], x["fin"], x["value"]
    target = vtrace(rew, fin, value, rho=x["rho"], gamma=gamma, lam=lam, **ends)
    return returns(rew, fin, gamma=gamma, **ends), gae(rew, fin, value, gamma=gamma, lam=lam, **ends), *target


@pytest.mark.parametrize("n_steps", LENGTHS)
@pytest.mark.parametrize(
    ("gamma", "lam", "p_fin", "scale"),
    [(0.99, 0.95, 0.05, 1.0), (1.0, 1.0, 0.0, 1.0), (1.0, 1.0, 0.01, 1e6), (0.0, 0.5, 0.1, 1.0), (0.9, 0.0, 1.0, 1e6)],
)
def test_float32_agrees_with_a_loop_in_float64(
    n_steps: int, gamma: float, lam: float, p_fin: float, scale: float
) -> None:
    """To 1e-5 of the greatest result: the results are sums of numbers of that size, of both signs."""
    c = Case.random(n_steps, 5, p_fin, seed=n_steps)
    c.final_value = np.nan_to_num(c.final_value)
    for name in ("rew", "value", "bootstrap", "final_value"):
        setattr(c, name, getattr(c, name) * scale)
    exact = c.tensors("rew", "fin", "value", "rho", "bootstrap", "final_value")
    single = {k: x.float() if x.is_floating_point() else x for k, x in exact.items()}
    results = zip(ours(single, gamma, lam), loop(exact, gamma, lam), strict=True)
    for actual, expected in results:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("n_steps", [9, 64, 257, 1031])
def test_gradients_of_long_fragments_are_those_of_a_loop(n_steps: int) -> None:
    c = Case.random(n_steps, 3, 0.05, seed=n_steps)
    c.final_value = np.nan_to_num(c.final_value)
    arguments = c.tensors("rew", "fin", "value", "rho", "bootstrap", "final_value")
    leaves = [arguments[k].requires_grad_() for k in ("rew", "value", "rho", "bootstrap", "final_value")]
    weights = torch.randn(4, n_steps, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((torch.stack(f(arguments, GAMMA, LAM)) * weights).sum(), leaves) for f in (ours, loop)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    rew, fin, v = torch.ones(20, 2), torch.zeros(20, 2, dtype=torch.bool), torch.ones(20, 2, requires_grad=True)
    assert not returns(rew, fin, gamma=GAMMA, bootstrap=0.0).requires_grad
    assert gae(rew, fin, v, gamma=GAMMA, lam=LAM, bootstrap=0.0).requires_grad
    with torch.no_grad():
        assert not gae(rew, fin, v, gamma=GAMMA, lam=LAM, bootstrap=0.0).requires_grad
    returns(rew, fin, gamma=GAMMA, bootstrap=v[0]).sum().backward()  # type: ignore[no-untyped-call]
    assert v.grad is not None
    torch.testing.assert_close(v.grad[0], torch.full((2,), sum(GAMMA**k for k in range(1, 21))))


def test_what_follows_an_end_may_be_nan() -> None:
    c = Case.random(6, 3, 0.3, seed=6)
    c.fin[-1], c.final_value[-1] = True, 1.0
    with_nan = c.tensors(*STEPS) | {"bootstrap": torch.full((3,), math.nan)}
    for f in (td_error, partial(gae, lam=LAM), partial(n_step, n=2), partial(n_step, n=9)):
        torch.testing.assert_close(f(**with_nan, gamma=GAMMA), f(**c.tensors(*STEPS), gamma=GAMMA))
    full = returns(**c.tensors("rew", "fin", "final_value"), gamma=GAMMA, bootstrap=math.nan)
    assert full.isfinite().all()


def test_importance_weights_that_overflow_do_not_make_nan_of_zero_rewards() -> None:
    rew, fin = torch.zeros(64, 1), torch.zeros(64, 1, dtype=torch.bool)
    omega = torch.full((64, 1), 100.0)
    assert returns(rew, fin, gamma=1.0, bootstrap=0.0, omega=omega).eq(0).all()
    target = vtrace(rew, fin, rew, rho=omega, gamma=1.0, bootstrap=0.0, clip_c=math.inf)
    assert target.vs.eq(0).all()
    assert target.adv.eq(0).all()


@settings(derandomize=True, max_examples=10)
@given(st.builds(Case.random, st.integers(1, 6), st.just(2), st.sampled_from([0.0, 0.3]), st.integers(0, 10**6)))
def test_gradients_are_those_of_finite_differences(c: Case) -> None:
    fin, final = torch.as_tensor(c.fin), torch.as_tensor(np.nan_to_num(c.final_value))

    def everything(rew: Tensor, value: Tensor, bootstrap: Tensor, rho: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"gamma": GAMMA, "bootstrap": bootstrap, "final_value": final}
        return (
            returns(rew, fin, omega=rho, **options),
            gae(rew, fin, value, lam=LAM, **options),
            n_step(rew, fin, value, 3, **options),
            *vtrace(rew, fin, value, rho=rho, lam=LAM, **options),
        )

    inputs = [x.requires_grad_() for x in c.tensors("rew", "value", "bootstrap", "rho").values()]
    assert torch.autograd.gradcheck(everything, inputs)


def test_gradients_have_gradients() -> None:
    c = Case.random(10, 1, 0.2, seed=7)
    fin, final = torch.as_tensor(c.fin), torch.as_tensor(np.nan_to_num(c.final_value))

    def weighted(rew: Tensor, bootstrap: Tensor, rho: Tensor) -> Tensor:
        return returns(rew, fin, omega=rho, gamma=GAMMA, bootstrap=bootstrap, final_value=final)

    inputs = [x.requires_grad_() for x in c.tensors("rew", "bootstrap", "rho").values()]
    assert torch.autograd.gradgradcheck(weighted, inputs)


class CountOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that compute something; views launch no kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["returns", "gae", "vtrace", "n_step"])
def test_kernels_grow_with_the_logarithm_of_time(name: str) -> None:
    def n_ops(n_steps: int) -> int:
        x, fin = torch.ones(n_steps, 2), torch.zeros(n_steps, 2, dtype=torch.bool)
        with CountOps() as ops:
            if name == "returns":
                returns(x, fin, gamma=GAMMA, bootstrap=x[0])
            elif name == "gae":
                gae(x, fin, x, gamma=GAMMA, lam=LAM, bootstrap=x[0])
            elif name == "vtrace":
                vtrace(x, fin, x, rho=x, gamma=GAMMA, bootstrap=x[0])
            else:
                n_step(x, fin, x, n_steps // 2, gamma=GAMMA, bootstrap=x[0])
        return int(ops.n)

    counts = [n_ops(2**k) for k in (10, 12, 14)]
    assert counts[1] - counts[0] == counts[2] - counts[1] <= 9
    assert counts[0] <= 60


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out_of_the_same_dtype(dtype: type[np.floating[Any]]) -> None:
    c = Case.random(6, 2, 0.3, seed=4)
    fin, (rew, value, final, end, rho) = (
        c.fin,
        (x.astype(dtype) for x in (c.rew, c.value, c.final_value, c.bootstrap, c.rho)),
    )
    options: dict[str, Any] = {"gamma": GAMMA, "bootstrap": end, "final_value": final}
    results = [
        returns(rew, fin, omega=rho, **options),
        td_error(rew, fin, value, **options),
        gae(rew, fin, value, lam=LAM, **options),
        n_step(rew, fin, value, 2, **options),
        *vtrace(rew, fin, value, rho=rho, **options),
    ]
    for x in results:
        assert isinstance(x, np.ndarray)
        assert (x.shape, x.dtype) == ((6, 2), dtype)
    expected = gae(**c.tensors(*STEPS), gamma=GAMMA, lam=LAM)
    np.testing.assert_allclose(results[2], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_numpy_arrays_may_be_read_only_reversed_or_strided() -> None:
    rew = np.arange(12.0)[::-2].reshape(6, 1)
    rew.flags.writeable = False
    fin = np.zeros((6, 1), np.bool_)
    np.testing.assert_array_equal(returns(rew, fin, gamma=0.0, bootstrap=np.zeros(1)), rew)
    np.testing.assert_array_equal(returns(rew, fin, gamma=1.0, bootstrap=np.float64(1.0))[0], rew.sum() + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype(dtype: torch.dtype) -> None:
    x, fin = torch.ones(5, 2, dtype=dtype), torch.zeros(5, 2, dtype=torch.bool)
    assert returns(x, fin, gamma=GAMMA, bootstrap=x[0], omega=x).dtype == dtype
    assert n_step(x, fin, x, 3, gamma=GAMMA, bootstrap=0.5).dtype == dtype
    assert gae(x, fin, x, gamma=GAMMA, lam=LAM, bootstrap=x[0]).dtype == dtype
    assert vtrace(x, fin, x, rho=x, gamma=GAMMA, bootstrap=x[0]).vs.dtype == dtype


def test_the_wider_dtype_of_rewards_and_values_counts() -> None:
    x, fin = torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.bool)
    assert returns(x, fin, gamma=GAMMA, bootstrap=x[0].double()).dtype == torch.float64
    assert gae(x, fin, x.double(), gamma=GAMMA, lam=LAM, bootstrap=x[0]).dtype == torch.float64
    for n in (3, 9):
        assert n_step(x, fin, x.double(), n, gamma=GAMMA, bootstrap=x[0]).dtype == torch.float64


def test_no_rows_are_no_results() -> None:
    x, fin = torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.bool)
    assert returns(x, fin, gamma=GAMMA, bootstrap=0.0).shape == (0, 2)


def test_inputs_are_left_alone() -> None:
    arguments = Case.random(6, 2, 0.3, seed=5).tensors("rho", *STEPS)
    before = {k: x.clone() for k, x in arguments.items()}
    vtrace(**arguments, gamma=GAMMA)
    torch.testing.assert_close(arguments, before, equal_nan=True)


def test_unequal_lengths_raise_and_say_which() -> None:
    rew, fin, v = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.bool), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"value has shape \(4, 2\), but rew has \(5, 2\).*rew\[1:\]"):
        gae(rew, fin, v, gamma=GAMMA, lam=LAM, bootstrap=v[0])
    with pytest.raises(ValueError, match=r"fin has shape \(5, 2\), but rew has \(4, 2\)"):
        td_error(rew[1:], fin, v, gamma=GAMMA, bootstrap=v[0])
    with pytest.raises(ValueError, match=r"final_value has shape \(1, 2\)"):
        returns(rew, fin, gamma=GAMMA, bootstrap=v[0], final_value=v[:1])
    with pytest.raises(ValueError, match=r"omega has shape \(4, 2\)"):
        returns(rew, fin, gamma=GAMMA, bootstrap=v[0], omega=v)
    with pytest.raises(ValueError, match=r"rho has shape \(5, 1\)"):
        vtrace(rew, fin, rew, rho=rew[:, :1], gamma=GAMMA, bootstrap=v[0])


def test_bootstrap_of_a_batch_must_lose_its_time_dimension() -> None:
    rew, fin = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"bootstrap has shape \(1, 2\), expected \(2,\)"):
        returns(rew, fin, gamma=GAMMA, bootstrap=rew[:1])


def test_dtypes_that_would_compute_nonsense_raise() -> None:
    rew, fin = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"fin must be boolean, got torch\.float32"):
        returns(rew, rew, gamma=GAMMA, bootstrap=0.0)
    with pytest.raises(TypeError, match=r"rew must be floating point, got torch\.int64"):
        returns(rew.long(), fin, gamma=GAMMA, bootstrap=0.0)


@pytest.mark.parametrize("n", [0, -1])
def test_n_step_needs_a_step(n: int) -> None:
    rew, fin = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
        n_step(rew, fin, rew, n, gamma=GAMMA, bootstrap=0.0)
