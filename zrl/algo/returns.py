"""Returns, advantages and value targets: one time recursion, solved by doubling.

Everything here is a solution of `y_t = b_t + a_t * y_{t+1}`. Seen as an operator on whole sequences, n steps of it are
composed from O(log n) squarings, so that a fragment of T steps costs O(log T) kernels instead of the O(T) of a loop.
Nothing is divided: where an episode ends `a_t` is exactly zero, and no finite number leaks through. All functions are
differentiable; targets are the caller's to detach.

Index convention (`[T, B]`, `B` may be any number of dimensions, or none): row t belongs to the action taken at t and
holds r_{t+1}, d_{t+1} and the value of the true final observation, i.e. `rew[1:]`, `fin[1:]` and `final_value[1:]` of a
record; `value` is v(x_0) ... v(x_{T-1}) and `bootstrap` [B] (or a number) is v(x_T). `final_value` is read where `fin`
only: v of the final observation where the episode was truncated, 0 where it terminated; `None` stands for zeros
everywhere. The temporal difference is

    delta_t = r_{t+1} + gamma * (final_value_{t+1} if d_{t+1} else v_{t+1}) - v_t

Arguments are torch tensors, or NumPy arrays: then NumPy arrays come back. Floating dtypes are kept. All functions raise
`ValueError` if shapes differ, and `TypeError` if `fin` is not boolean or `rew` is not floating.
"""

from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["VTrace", "gae", "n_step", "returns", "td_error", "vtrace"]

Array = TypeVar("Array")  # torch.Tensor or numpy.ndarray; the same one for all arguments of a call


class VTrace(NamedTuple, Generic[Array]):
    """V-trace targets `vs` and policy gradient advantages `adv`, both [T, B]."""

    vs: Array
    adv: Array


def returns(
    rew: Array,
    fin: Array,
    *,
    gamma: float,
    bootstrap: Array | float,
    final_value: Array | None = None,
    omega: Array | None = None,
) -> Array:
    """Discounted returns G_i = rew[i] + gamma * (final_value[i] if fin[i] else G_{i+1}), G_N = bootstrap; [N, B].

    Any number of rows will do. With the T+1 rows of a record `returns(...)[1:]` are the returns of its T actions, since
    the reward in a row belongs to the step that led there. `omega` [N, B] are importance weights, for per-decision
    importance sampling: each row becomes G_i = omega[i] * (rew[i] + gamma * ...) (Precup, Sutton & Singh 2000,
    "Eligibility traces for off-policy policy evaluation", section 3).
    """
    r, d, final, w = _tensor(rew), _tensor(fin), _optional(final_value), _optional(omega)
    _check(r, fin=d, final_value=final, omega=w)
    a, b = _unless(d, r, gamma), r if final is None else r.add(final.masked_fill(~d, 0), alpha=gamma)
    if w is not None:
        a, b = a * w, b * w
    return _like(rew, _recur(a, b, _end(bootstrap, r, d), bounded=w is None))


def td_error(
    rew: Array, fin: Array, value: Array, *, gamma: float, bootstrap: Array | float, final_value: Array | None = None
) -> Array:
    """One-step temporal differences delta_t, see the module's docstring; [T, B]."""
    return _like(rew, _delta(_steps(rew, fin, value, bootstrap, final_value), gamma))


def gae(
    rew: Array,
    fin: Array,
    value: Array,
    *,
    gamma: float,
    lam: float,
    bootstrap: Array | float,
    final_value: Array | None = None,
) -> Array:
    """Generalized advantages A_t = sum_k (gamma * lam)^k delta_{t+k}, within the episode and the T rows; [T, B].

    Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation", eq. 16.
    """
    steps = _steps(rew, fin, value, bootstrap, final_value)
    delta = _delta(steps, gamma)
    return _like(rew, _recur(_unless(steps.fin, delta, gamma * lam), delta, torch.zeros_like(delta[-1:])))


def n_step(
    rew: Array,
    fin: Array,
    value: Array,
    n: int,
    *,
    gamma: float,
    bootstrap: Array | float,
    final_value: Array | None = None,
) -> Array:
    """n-step returns r_{t+1} + ... + gamma^{n-1} r_{t+n} + gamma^n v_{t+n}; [T, B].

    The sum stops at the end of the episode (with `final_value`), and at x_T (with `bootstrap`) where the rows end
    before n steps are up. Raises `ValueError` if n < 1. Sutton & Barto 2018, "Reinforcement learning", eq. 7.1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    r, d, v, end, final = _steps(rew, fin, value, bootstrap, final_value)
    b = r if final is None else r.add(final.masked_fill(~d, 0), alpha=gamma)
    return _like(rew, _recur(_unless(d, r, gamma), b, torch.cat([v, end]), n))


def vtrace(
    rew: Array,
    fin: Array,
    value: Array,
    *,
    rho: Array,
    gamma: float,
    bootstrap: Array | float,
    final_value: Array | None = None,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    clip_pg_rho: float | None = None,
    lam: float = 1.0,
) -> VTrace[Array]:
    """V-trace targets and advantages [T, B], for actions of a behaviour policy mu with rho = pi / mu.

        vs_t  = v_t + sum_k gamma^k (c_t ... c_{t+k-1}) min(clip_rho, rho_{t+k}) delta_{t+k}
        c_i   = lam * min(clip_c, rho_i)
        adv_t = min(clip_pg_rho, rho_t) * (r_{t+1} + gamma * vs_{t+1} - v_t)

    where vs_{t+1} is `final_value` at the end of an episode, and `bootstrap` at x_T. `rho` [T, B] is the ratio of all
    components of an action together. `clip_pg_rho` is `clip_rho` unless given; `math.inf` clips nothing. With rho = 1,
    `vs - value` is `gae`. The sum ends with the episode, as in `gae`.
    Espeholt et al. 2018, "IMPALA", eq. 1 (`vs`), section 4.2 (`adv`) and remark 2 (`lam`).
    """
    steps, ratio = _steps(rew, fin, value, bootstrap, final_value), _tensor(rho)
    _check(steps.rew, rho=ratio)
    delta = _delta(steps, gamma) * ratio.clamp(max=clip_rho)
    a = _unless(steps.fin, delta, gamma * lam) * ratio.clamp(max=clip_c)
    vs = steps.value + _recur(a, delta, torch.zeros_like(delta[-1:]), bounded=gamma * lam * clip_c <= 1)
    adv = _delta(steps, gamma, ahead=vs) * ratio.clamp(max=clip_rho if clip_pg_rho is None else clip_pg_rho)
    return VTrace(_like(rew, vs), _like(rew, adv))


# -- the recursion ---------------------------------------------------------------------------------------------------


def _recur(a: Tensor, b: Tensor, y: Tensor, n: int | None = None, *, bounded: bool = True) -> Tensor:
    """Apply y_t <- b_t + a_t * y_{t+1} n times (`None`: to the end), in O(log n) kernels; returns [T, ...].

    `y` [T+1, ...] is what to start from; only its last row, y_T, is used if n >= T. The maps of s consecutive rows t
    ... t+s-1 compose to one, y_t = b_t + a_t * y_{t+s}, and two such neighbours compose to one of 2s rows. Row T is the
    constant map to y_T: a composition that reaches it is constant as well, therefore `a` is kept for the T+1-s rows
    that do not.

    bounded=False keeps products of large `a` finite: where b = 0, inf * 0 would be NaN, and a plain loop yields 0.
    """
    n_rows, b, s = len(a), torch.cat([b, y[-1:]]), 1
    n, a = n_rows if n is None else min(n, n_rows), a.to(b.dtype)
    while s <= n:
        if n < n_rows and n & s:
            y = _ahead(a, b, y, s)
        b, a = _ahead(a, b, b, s), a[:-s] * a[s:]
        a = a if bounded else a.clamp(max=torch.finfo(a.dtype).max)
        s *= 2
    return (y if n < n_rows else b)[:n_rows]


def _ahead(a: Tensor, b: Tensor, y: Tensor, s: int) -> Tensor:
    """b_t + a_t * y_{t+s}, where the last s rows have a = 0; [T+1, ...]."""
    return torch.cat([torch.addcmul(b[:-s], a, y[s:]), b[-s:]])


def _unless(fin: Tensor, like: Tensor, decay: float) -> Tensor:
    """`decay` where the episode goes on, 0 where it ends."""
    return like.new_full(fin.shape, decay).masked_fill_(fin, 0)


# -- arguments -------------------------------------------------------------------------------------------------------


class _Steps(NamedTuple):
    """Checked arguments: rew, fin, value, final [T, B] and bootstrap [1, B]."""

    rew: Tensor
    fin: Tensor
    value: Tensor
    bootstrap: Tensor
    final: Tensor | None


def _steps(rew: object, fin: object, value: object, bootstrap: object, final_value: object) -> _Steps:
    r, d, v, final = _tensor(rew), _tensor(fin), _tensor(value), _optional(final_value)
    _check(r, fin=d, value=v, final_value=final)
    return _Steps(r, d, v, _end(bootstrap, r, d), final)


def _delta(steps: _Steps, gamma: float, ahead: Tensor | None = None) -> Tensor:
    """r_{t+1} + gamma * (final_value or w_{t+1}) - v_t; [T, B]. w is `ahead` (default: v), and bootstrap at T."""
    w = torch.cat([(steps.value if ahead is None else ahead)[1:], steps.bootstrap])
    w = w.masked_fill(steps.fin, 0) if steps.final is None else torch.where(steps.fin, steps.final, w)
    return torch.add(steps.rew, w, alpha=gamma) - steps.value


def _check(rew: Tensor, **others: Tensor | None) -> None:
    if not rew.is_floating_point():
        raise TypeError(f"rew must be floating point, got {rew.dtype}")
    for name, x in others.items():
        if x is None:
            continue
        if x.shape != rew.shape:
            hint = "; of a record's T+1 rows pass rew[1:], fin[1:], final_value[1:]" if len(rew) == len(x) + 1 else ""
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but rew has {tuple(rew.shape)}{hint}")
        if name == "fin" and x.dtype != torch.bool:
            raise TypeError(f"fin must be boolean, got {x.dtype}")


def _end(bootstrap: object, rew: Tensor, fin: Tensor) -> Tensor:
    """v(x_T) as one row [1, B], from [B] or a number; 0 where the last step ended its episode, as 0 * NaN is NaN."""
    if getattr(bootstrap, "shape", ()):
        end = _tensor(bootstrap)
        if end.shape != rew.shape[1:]:
            raise ValueError(f"bootstrap has shape {tuple(end.shape)}, expected {tuple(rew.shape[1:])}, one row of rew")
        end = end.unsqueeze(0)
    else:
        end = bootstrap.to(rew) if isinstance(bootstrap, Tensor) else rew.new_tensor(bootstrap)
    return torch.where(fin[-1:], 0, end)


# NumPy is duck-typed, not imported: this package depends on torch alone.


def _tensor(x: Any) -> Tensor:
    # The copy is for arrays that torch cannot alias: read-only ones, and those with negative strides.
    return x if isinstance(x, Tensor) else torch.from_numpy(x.copy())


def _optional(x: object) -> Tensor | None:
    return None if x is None else _tensor(x)


def _like(x: Array, y: Tensor) -> Array:
    return cast(Array, y if isinstance(x, Tensor) else y.numpy())
