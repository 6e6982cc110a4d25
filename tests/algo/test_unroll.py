"""Unrolling T rows must be what T calls for one row are, with resets in between."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zrl.algo import unroll

F, H, L = 3, 4, 2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.GRU(F, H, L) if kind == "gru" else nn.LSTM(F, H, L)


def record(n_steps: int, n_columns: int, p_fin: float, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n_steps, n_columns, F, generator=g), torch.rand(n_steps, n_columns, generator=g) < p_fin


def one_by_one(
    core: Any, x: Tensor, states: list[Tensor], fin: Tensor, h0: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Rows and columns one at a time; `states` are [L, B, H], `h0` [L, H]."""
    ys = []
    for t in range(len(x)):
        columns = []
        for j in range(x.shape[1]):
            h = [(first if fin[t, j] else s[:, j])[:, None] for s, first in zip(states, h0, strict=True)]
            y, h = core(x[t, j][None, None], h[0] if len(h) == 1 else tuple(h))
            columns.append((y, [h] if isinstance(h, Tensor) else list(h)))
        ys.append(torch.cat([y for y, _ in columns], dim=1))
        states = [torch.cat([h[i] for _, h in columns], dim=1) for i in range(len(states))]
    return torch.cat(ys), states


@settings(derandomize=True, max_examples=25)
@given(
    st.sampled_from(["gru", "lstm"]),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_rows_at_once_equal_rows_one_by_one(
    kind: str, n_steps: int, n_columns: int, p_fin: float, learnt: bool, seed: int
) -> None:
    core, (x, fin) = make(kind), record(n_steps, n_columns, p_fin, seed)
    n_states = 1 if kind == "gru" else 2
    hx = [torch.randn(L, n_columns, H) for _ in range(n_states)]
    h0 = [torch.randn(L, H) if learnt else torch.zeros(L, H) for _ in range(n_states)]
    expected_y, expected_h = one_by_one(core, x, hx, fin, h0)

    pack: Any = (lambda s: s[0]) if kind == "gru" else tuple
    y, h = unroll(core, x, pack(hx), fin, pack(h0) if learnt else None)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close([h] if kind == "gru" else list(h), expected_h)


@pytest.mark.parametrize("shape", [(L, H), (L, 1, H)])
def test_a_learnt_initial_state_gets_its_gradient(shape: tuple[int, ...]) -> None:
    core, (x, fin) = make("gru"), record(5, 3, 0.3, seed=1)
    h0, hx = torch.randn(shape, requires_grad=True), torch.randn(L, 3, H)
    y, _ = unroll(core, x, hx, fin, h0)
    expected, _ = one_by_one(core, x, [hx], fin, [h0.view(L, H)])
    (actual,) = torch.autograd.grad(y.square().sum(), h0)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.square().sum(), h0)[0])
    assert actual.ne(0).all()


@pytest.mark.parametrize("n_steps", [1, 4])
def test_the_reset_at_row_0_changes_no_value_but_gives_gradient(n_steps: int) -> None:
    core, x = make("gru"), torch.randn(n_steps, 2, F)
    h0 = torch.randn(L, H, requires_grad=True)
    fin = torch.zeros(n_steps, 2, dtype=torch.bool)
    fin[0, 1] = True
    hx = torch.randn(L, 2, H)
    hx[:, 1] = h0.detach()  # as recorded: after the reset
    y, h = unroll(core, x, hx, fin, h0)
    torch.testing.assert_close((y, h), core(x, hx))
    (gradient,) = torch.autograd.grad(y.sum(), h0)
    assert gradient.ne(0).all()


def test_the_core_runs_once_for_each_stretch() -> None:
    core, lengths = make("gru"), []

    def counting(x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        lengths.append(len(x))
        return core(x, hx)  # type: ignore[no-any-return]

    fin = torch.zeros(8, 3, dtype=torch.bool)
    unroll(counting, torch.randn(8, 3, F), torch.zeros(L, 3, H), fin)
    fin[0, 0] = fin[3, 1] = fin[3, 2] = fin[7, 0] = True
    unroll(counting, torch.randn(8, 3, F), torch.zeros(L, 3, H), fin)
    assert lengths == [8, 3, 4, 1]


def test_two_fragments_in_a_row_equal_one_long_fragment() -> None:
    core, (x, fin) = make("lstm"), record(7, 2, 0.3, seed=2)
    hx = (torch.zeros(L, 2, H), torch.zeros(L, 2, H))
    whole = unroll(core, x, hx, fin)
    y, h = unroll(core, x[:4], hx, fin[:4])
    rest, h = unroll(core, x[4:], h, fin[4:])
    torch.testing.assert_close((torch.cat([y, rest]), h), whole)


class Pair(NamedTuple):
    a: Tensor
    b: Any


def test_state_of_any_nesting() -> None:
    """A core that counts its rows since the last reset, from a learnt beginning, in every leaf."""

    def core(x: Tensor, hx: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        pair, empty = hx["pair"], hx["empty"]
        rows = pair.a + torch.arange(1, len(x) + 1).view(-1, 1, 1)
        return rows[:, :, 0], {"pair": Pair(pair.a + len(x), [pair.b[0] + len(x)]), "empty": empty}

    fin = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 0]], dtype=torch.bool)
    hx = {"pair": Pair(torch.zeros(1, 2, 1), [torch.zeros(1, 2, 3, 4)]), "empty": ()}
    h0 = {"pair": Pair(torch.full((1, 1), 10.0), [torch.full((1, 1, 3, 4), 20.0)]), "empty": ()}
    y, h = unroll(core, torch.zeros(4, 2, 1), hx, fin, h0)
    assert y.tolist() == [[1, 1], [2, 11], [3, 12], [11, 13]]
    assert isinstance(h["pair"], Pair)
    assert h["empty"] == ()
    assert h["pair"].a.flatten().tolist() == [11, 13]
    assert h["pair"].b[0][0, :, 2, 3].tolist() == [21, 23]


def test_the_callers_state_is_left_alone() -> None:
    core, (x, _) = make("gru"), record(3, 2, 1.0, seed=3)
    hx = torch.ones(L, 2, H)
    unroll(core, x, hx, torch.ones(3, 2, dtype=torch.bool))
    assert hx.eq(1).all()


@pytest.mark.parametrize("n_steps", [1, 4])
def test_no_state_means_the_initial_one(n_steps: int) -> None:
    core, (x, fin) = make("gru"), record(n_steps, 3, 0.4, seed=4)
    h0 = torch.randn(L, H, requires_grad=True)
    torch.testing.assert_close(unroll(core, x, None, fin), unroll(core, x, torch.zeros(L, 3, H), fin))
    expected = unroll(core, x, h0[:, None].expand(L, 3, H), fin, h0)
    torch.testing.assert_close(unroll(core, x, None, fin, h0), expected)


def test_wrong_arguments_raise() -> None:
    core, x = make("gru"), torch.zeros(4, 2, F)
    with pytest.raises(ValueError, match=r"fin must be \[T, B\] = \(4, 2\) like x, got \(5, 2\)"):
        unroll(core, x, None, torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="fin must be boolean"):
        unroll(core, x, None, torch.zeros(4, 2))
