"""Returns, advantages and value targets: one time recursion, solved by halving.

Everything here is a solution of `y_t = b_t + a_t * y_{t+1}`. Two steps of it are one of the same form, so that T rows
are solved by way of T/2: O(log T) kernels and O(T) arithmetic, instead of the O(T) kernels of a loop.
Nothing is divided: where an episode ends `a_t` is exactly zero, and no finite number leaks through. All functions are
differentiable, twice too; targets are the caller's to detach.

Index convention (`[T, B]`, `B` may be any number of dimensions, or none): row t belongs to the action taken at t and
holds r_{t+1}, d_{t+1} and the value of the true final observation, i.e. `rew[1:]`, `fin[1:]` and `final_value[1:]` of a
record; `value` is v(x_0) ... v(x_{T-1}) and `bootstrap` [B] (or a number) is v(x_T). `final_value` is read where `fin`
only: v of the final observation where the episode was truncated, 0 where it terminated; `None` stands for zeros
everywhere. The temporal difference is

    delta_t = r_{t+1} + gamma * (final_value_{t+1} if d_{t+1} else v_{t+1}) - v_t

Arguments are torch tensors, or NumPy arrays: then NumPy arrays come back. Floating dtypes are kept. All functions raise
`ValueError` if shapes differ, and `TypeError` if `fin` is not boolean or `rew` is not floating.
"""

from collections.abc import Callable
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
    a, b = _unless(d, r, gamma), r if final is None else r.add(torch.where(d, final, 0), alpha=gamma)
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
    b = r if final is None else r.add(torch.where(d, final, 0), alpha=gamma)
    a, y = _unless(d, r, gamma), torch.cat([v, end])
    return _like(rew, _recur(a, b, y[-1:]) if n >= len(r) else _repeat(a, b, y, n))


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
    clipped = ratio.clamp(max=clip_rho)
    delta = _delta(steps, gamma) * clipped
    a = _unless(steps.fin, delta, gamma * lam) * ratio.clamp(max=clip_c)
    vs = steps.value + _recur(a, delta, torch.zeros_like(delta[-1:]), bounded=gamma * lam * clip_c <= 1)
    adv = _delta(steps, gamma, ahead=vs) * (clipped if clip_pg_rho is None else ratio.clamp(max=clip_pg_rho))
    return VTrace(_like(rew, vs), _like(rew, adv))


# -- the recursion ---------------------------------------------------------------------------------------------------

FEW = 8  # rows: a plain loop over them takes no more kernels than halving them does, and fewer views
MANY = 256  # rows: from here on memory counts more than kernels, and four at a time touch it less than two


def _recur(a: Tensor, b: Tensor, end: Tensor, *, bounded: bool = True) -> Tensor:
    """All y_t = b_t + a_t * y_{t+1}, [T, ...], where `end` [1, ...] is y_T, in O(log T) kernels.

    bounded=False keeps products of large `a` finite: where b = 0, inf * 0 would be NaN, and a plain loop yields 0.
    """
    if not len(b):
        return b
    dtype = torch.promote_types(b.dtype, end.dtype)
    a, b, end = a.to(dtype), b.to(dtype), end.to(dtype)
    solve: Callable[..., Tensor] = _Recursion.forward
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or end.requires_grad):
        solve = _Recursion.apply
    return solve(a, b, end, bounded)[:-1]


class _Recursion(torch.autograd.Function):
    """The solution with y_T as its last row, [T+1, ...]. Its gradient is a recursion again, forwards in time."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, end: Tensor, bounded: bool) -> Tensor:
        y = b.new_empty((len(b) + 1, *b.shape[1:]))
        y[-1:] = end
        _solve(a, b, y, bounded)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.bounded = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """s_t = grad_t + a_{t-1} * s_{t-1} is the gradient at y_t, directly and by way of all rows before it."""
        a, y = ctx.saved_tensors
        s: Tensor = _Recursion.apply(a.flip(0), grad[1:].flip(0), grad[:1], ctx.bounded)  # type: ignore[no-untyped-call]
        s = s.flip(0)
        return s[:-1] * y[1:], s[:-1], s[-1:], None


def _solve(a: Tensor, b: Tensor, y: Tensor, bounded: bool) -> None:
    """Fill rows 0 ... n-1 of `y` [n+1, ...] from row n, given `a` and `b` [n, ...].

    k consecutive steps compose to one, y_t = b' + a' * y_{t+k}. So every k-th row is found by a recursion with n/k
    steps, in place, and then the rows between from those after them, all groups at once.
    """
    n, k = len(a), 4 if len(a) >= MANY else 2
    rest = n % k if n > FEW else n
    if rest:
        _loop(a[n - rest :], b[n - rest :], y[n - rest :])
        a, b, y = a[: n - rest], b[: n - rest], y[: n - rest + 1]
    if rest == n:
        return
    a_i, b_i = [a[i::k] for i in range(k)], [b[i::k] for i in range(k)]
    product, total = a_i[-2] * a_i[-1], torch.addcmul(b_i[-2], a_i[-2], b_i[-1])
    for i in reversed(range(k - 2)):
        torch.addcmul(b_i[i], a_i[i], total, out=total)
        product.mul_(a_i[i])
    _solve(product if bounded else product.clamp_(max=torch.finfo(a.dtype).max), total, y[::k], bounded)
    after = y[k::k]
    for i in reversed(range(1, k)):
        after = torch.addcmul(b_i[i], a_i[i], after, out=y[i::k])


def _loop(a: Tensor, b: Tensor, y: Tensor) -> None:
    """As `_solve`, row by row."""
    rows = y.unbind()
    for a_t, b_t, y_t, after in zip(*(reversed(x) for x in (a.unbind(), b.unbind(), rows[:-1], rows[1:])), strict=True):
        torch.addcmul(b_t, a_t, after, out=y_t)


def _repeat(a: Tensor, b: Tensor, y: Tensor, n: int) -> Tensor:
    """Apply y_t <- b_t + a_t * y_{t+1} n < T times to `y` [T+1, ...], in O(log n) kernels; returns [T, ...].

    The maps of s consecutive rows t ... t+s-1 compose to one, y_t = b_t + a_t * y_{t+s}, and two such neighbours
    compose to one of 2s rows. Row T is the constant map to y_T: a composition that reaches it is constant as well,
    therefore `a` is kept for the T+1-s rows that do not.
    """
    n_rows, b, s = len(a), torch.cat([b, y[-1:]]), 1
    a = a.to(b.dtype)
    while True:
        if n & s:
            y = _ahead(a, b, y, s)
        if 2 * s > n:
            return y[:n_rows]
        b, a = _ahead(a, b, b, s), a[:-s] * a[s:]
        s *= 2


def _ahead(a: Tensor, b: Tensor, y: Tensor, s: int) -> Tensor:
    """b_t + a_t * y_{t+s}, where the last s rows have a = 0; [T+1, ...]."""
    return torch.cat([torch.addcmul(b[:-s], a, y[s:]), b[-s:]])


def _unless(fin: Tensor, like: Tensor, decay: float) -> Tensor:
    """`decay` where the episode goes on, 0 where it ends. By their bytes: torch converts booleans slowly on CPUs."""
    return torch.rsub(fin.view(torch.uint8).to(like.dtype), decay, alpha=decay)


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
    w = w.masked_fill_(steps.fin, 0) if steps.final is None else torch.where(steps.fin, steps.final, w)
    return torch.add(steps.rew, w, alpha=gamma).sub_(steps.value)  # in place where new memory would cost more


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
