"""Running a recurrent core over a fragment in which episodes end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["unroll"]


def unroll(
    core: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, hx: Any, fin: Tensor, h0: Any = None
) -> tuple[Tensor, Any]:
    """Run `core` over T rows, its state reset before row t where `fin[t]`; y [T, B, ...] and the state after row T-1.

    The core runs once for each stretch of rows between two resets (of any column): once in all where no episode ends.
    The record's `hx` is already the state after the reset at row 0. To reset it there again changes no value, but it is
    what gives a learnt `h0` its gradient.

    Args:
        core: ``core(x [t, B, F], hx) -> (y [t, B, ...], hx)``, as `torch.nn.GRU` and `torch.nn.LSTM` are.
        x: [T, B, F].
        hx: state before row 0: a tensor [L, B, ...], or dicts, lists and tuples of them; None: the initial state.
        fin: [T, B] bool.
        h0: initial state to reset to, like `hx` with leaves [L, ...] or [L, 1, ...]; zeros by default. With ``hx=None``
            the leaves must be [L, H] or [L, 1, ...], or h0 None as well: then `core` is called with ``hx=None``.

    Raises:
        ValueError: shapes of `x` and `fin` that do not go together.
        TypeError: `fin` is not boolean.
    """
    if x.shape[:2] != fin.shape:
        raise ValueError(f"fin must be [T, B] = {tuple(x.shape[:2])} like x, got {tuple(fin.shape)}")
    if fin.dtype != torch.bool:
        raise TypeError(f"fin must be boolean, got {fin.dtype}")
    if hx is None and h0 is not None:
        hx = map_nested(lambda h: _one_column(h, ndim=3).repeat_interleave(fin.shape[1], dim=1), h0)
    # To look costs less than to reset, but on a GPU it means to wait: not worth it for a single row, as in acting.
    resets = fin.any(dim=1).tolist() if len(fin) > 1 or fin.is_cpu else [True]
    starts = [0, *(t for t in range(1, len(fin)) if resets[t])]
    ys = []
    for start, stop in zip(starts, [*starts[1:], len(fin)], strict=True):
        if resets[start] and hx is not None:
            hx = _reset(hx, fin[start], h0)
        y, hx = core(x[start:stop], hx)
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys), hx


def _reset(hx: Any, fin: Tensor, h0: Any) -> Any:
    """State with its columns at `fin` [B] set to `h0` (`None`: to zero), never in place: the caller owns `hx`."""

    def leaf(h: Tensor, *first: Tensor) -> Tensor:
        columns = fin.view(1, -1, *[1] * (h.ndim - 2))
        return torch.where(columns, _one_column(first[0], h.ndim), h) if first else h.masked_fill(columns, 0)

    return map_nested(leaf, hx) if h0 is None else map_nested(leaf, hx, h0)


def _one_column(h0: Tensor, ndim: int) -> Tensor:
    """[L, ...] or [L, 1, ...] -> [L, 1, ...], the latter of `ndim` dimensions."""
    return h0.unsqueeze(1) if h0.ndim < ndim else h0


def map_nested(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Call `fn(leaf, *leaves)` on the leaves of nested dicts, lists and tuples; the first one gives the structure."""
    if isinstance(tree, dict):
        return {k: map_nested(fn, v, *(o[k] for o in others)) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        items = [map_nested(fn, *leaves) for leaves in zip(tree, *others, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return fn(tree, *others)
