"""Batches: what is known about them, copies, and minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from zrl.data.batch import Batch, Episode, FragmentMeta
from zrl.data.fragment import Slot, fill_with_poison
from zrl.data.spec import DTYPES, ArraySpec, FragmentSpec, flatten
from zrl.errors import ConfigError

T, B = 4, 3
F32 = ArraySpec("float32")
FIELDS = "state actor hx bootstrap final_value mask ep_return ep_length final_obs env extra".split()  # noqa: SIM905


def stamp(t: Any, j: Any) -> Any:
    """What entry (t, j) holds: different in every entry, the same in every field."""
    return 100 * t + j + 1


def batch(*, hx: bool = True, optional: bool = True, obs: Any = None) -> Batch:
    """Entry (t, j) of every field is its stamp; no end anywhere, all of the mask True."""
    spec = FragmentSpec.build(
        T,
        B,
        obs={"x": ArraySpec("float32", (2,)), "y": [ArraySpec("int16")]} if obs is None else obs,
        act=ArraySpec("int64"),
        actor={"value": F32, "logits": ArraySpec("float64", (3,))},
        hx={"h": ArraySpec("float32", (2, 5))} if hx else (),
        env={"n": ArraySpec("int64"), "_n": ArraySpec("bool")} if optional else None,
        keep_final_obs=optional,
    )
    slot = Slot(spec)
    for x in slot.tensors:
        rows, columns = torch.arange(len(x)).unsqueeze(1), torch.arange(B)
        x.copy_(stamp(rows, columns).view(len(x), B, *[1] * (x.dim() - 2)).expand(x.shape))
    slot.np.state.fin[:] = slot.np.state.term[:] = False
    return Batch.of_record(slot.pt, (FragmentMeta(3, 0, 7),), 5)


def leaves(b: Batch) -> list[Tensor]:
    return [x for f in FIELDS for x in flatten(getattr(b, f))[0] if x is not None]


def assert_same(a: Batch, b: Batch) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert torch.equal(x, y)


# -- what is known ---------------------------------------------------------------------------------------------------


def test_meta_and_lag() -> None:
    b = batch()
    assert b.meta == (FragmentMeta(version=3, worker=0, seq=7),)
    assert b.lag == (2,)
    record = batch()
    two = Batch.of_record(record, (FragmentMeta(1, 0, 1), FragmentMeta(4, 1, 9)), 4)
    assert two.lag == (3, 0)
    assert two.version == 4


def test_env_steps_are_those_of_the_mask() -> None:
    b = batch()
    assert b.n_env_steps == T * B
    b = batch()
    b.mask[1:, 2] = False
    assert b.n_env_steps == T * B - 3


def ended(b: Batch, ends: Sequence[tuple[int, int, bool]]) -> None:
    for t, j, term in ends:
        b.state.fin[t, j], b.state.term[t, j] = True, term
        b.ep_return[t, j], b.ep_length[t, j] = 10.0 * t + j + 0.5, t


def test_episodes() -> None:
    """In order of time, then column; not those of row 0, nor where the mask says that no step was taken."""
    b = batch()
    ended(b, [(0, 1, True), (T, 2, False), (2, 2, True), (2, 0, False), (T, 0, True)])
    b.state.fin[4, 1], b.mask[3, 1] = True, False
    assert b.episodes == [
        Episode(ret=20.5, length=2, column=0, truncated=True),
        Episode(22.5, 2, 2, False),
        Episode(40.5, 4, 0, False),
        Episode(42.5, 4, 2, True),
    ]
    (first, *_) = b.episodes
    assert [type(x) for x in first] == [float, int, int, bool]
    assert batch().episodes == []


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optional", [True, False])
def test_clone(optional: bool) -> None:
    b = batch(optional=optional)
    b.extra["adv"] = torch.ones(T, B)
    ended(b, [(2, 1, True)])
    assert (b.n_env_steps, len(b.episodes)) == (T * B, 1)
    copy, kept = b.clone(), b.clone()
    assert_same(copy, b)
    assert {x.data_ptr() for x in leaves(copy)}.isdisjoint({x.data_ptr() for x in leaves(b)})
    b.poison()
    assert_same(copy, kept)
    assert (copy.meta, copy.version, copy.lag) == (b.meta, b.version, b.lag)
    assert copy.episodes == [Episode(21.5, 2, 1, False)]
    assert (copy.final_obs is None, copy.env is None) == (not optional, not optional)
    copy.extra["more"] = torch.zeros(T, B)
    assert set(b.extra) == {"adv"}


def test_to() -> None:
    b = batch()
    for here in (b.to("cpu"), b.to(torch.device("cpu"), non_blocking=True)):
        assert_same(here, b)
        assert [x.data_ptr() for x in leaves(here)] == [x.data_ptr() for x in leaves(b)]
    there = b.to("meta")
    assert {x.device.type for x in leaves(there)} == {"meta"}
    assert [x.shape for x in leaves(there)] == [x.shape for x in leaves(b)]
    assert there.meta == b.meta


def test_numbers_of_a_copy_are_its_own() -> None:
    """`n_env_steps` and `episodes` are remembered, but not by copies."""
    b = batch()
    assert b.n_env_steps == T * B
    copy = b.clone()
    copy.mask[0] = False
    assert copy.n_env_steps == T * B - B
    assert b.n_env_steps == T * B


def test_poison() -> None:
    obs = [ArraySpec(dtype) for dtype in sorted(DTYPES)]
    b = batch(obs=obs)
    b.poison()
    for x, dtype in zip(b.state.obs, sorted(DTYPES), strict=True):
        a = x.numpy().copy()
        if a.dtype.kind != "u":
            fill_with_poison(a)
            assert x.numpy().tobytes() == a.tobytes(), dtype
    assert b.actor["value"].isnan().all()
    assert b.mask.all()


# -- minibatches -----------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_by_column_each_exactly_once(size: int) -> None:
    b = batch()
    extra = {"adv": stamp(torch.arange(T).unsqueeze(1), torch.arange(B)).float(), "wide": torch.zeros(T, B, 6)}
    parts = list(b.minibatches(size, by="column", extra=extra, generator=generator()))
    assert [p.mask.shape[1] for p in parts] == [min(size, B - k) for k in range(0, B, size)]
    columns = [int(x) - 1 for p in parts for x in p.state.rew[0]]
    assert sorted(columns) == list(range(B))
    for p in parts:
        j = [int(x) - 1 for x in p.state.rew[0]]
        whole = b.clone()
        whole.extra = extra
        for x, y in zip(leaves(p), leaves(whole), strict=True):
            assert torch.equal(x, y[:, j])
        assert p.extra["wide"].shape == (T, len(j), 6)
        assert p.meta == b.meta
        assert p.n_env_steps == T * len(j)
    assert b.extra == {}


@pytest.mark.parametrize("size", [1, 5, 12, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_once", [1, 12, 1000], ids="{}_at_once".format)
def test_by_step_each_exactly_once(size: int, masked: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minibatch is a batch of T = 1: rows 0 and 1 are t and t+1 of a step that was taken; however many steps are cut
    out together."""
    b = batch(hx=False)
    monkeypatch.setattr("zrl.data.batch._AT_ONCE_NBYTES", at_once * b._nbytes() // b.mask.numel())
    if masked:
        b.mask[2:, 1] = b.mask[3, 2] = False
    steps = {(t, j) for t in range(T) for j in range(B) if b.mask[t, j]}
    extra = {"adv": stamp(torch.arange(T).unsqueeze(1), torch.arange(B)).float(), "wide": torch.zeros(T, B, 6)}
    parts = list(b.minibatches(size, by="step", extra=extra, generator=generator()))
    n = [p.mask.shape[1] for p in parts]
    assert n == [min(size, len(steps) - k) for k in range(0, len(steps), size)]
    seen = []
    for p in parts:
        m = p.mask.shape[1]
        assert p.mask.shape == (1, m)
        assert p.mask.all()
        where = [divmod(int(x) - 1, 100) for x in p.state.rew[0]]
        seen += where
        t, j = torch.tensor(where).T
        for x in (p.state.rew, p.state.act, p.final_value, p.ep_return, p.ep_length, p.state.obs["y"][0]):
            assert x.tolist() == [stamp(t, j).tolist(), stamp(t + 1, j).tolist()]
        for x in (p.state.obs["x"], p.final_obs["x"]):
            assert x.shape == (2, m, 2)
            assert x[..., 1].tolist() == [stamp(t, j).tolist(), stamp(t + 1, j).tolist()]
        for x in (p.actor["value"], p.env["n"], p.extra["adv"], p.actor["logits"][..., 2]):
            assert x.tolist() == [stamp(t, j).tolist()]
        assert p.extra["wide"].shape == (1, m, 6)
        assert p.hx == ()
        assert p.n_env_steps == m
        assert p.meta == b.meta
    assert len(seen) == len(set(seen))
    assert set(seen) == steps


def test_the_bootstrap_of_a_step() -> None:
    """v(x_{t+1}): the value one row on, and behind the last row the fragment's bootstrap."""
    b = batch(hx=False)
    b.bootstrap.fill_(-1.0)
    for p in b.minibatches(5, by="step"):
        for x, v in zip(p.state.rew[0].tolist(), p.bootstrap[0].tolist(), strict=True):
            t, j = divmod(int(x) - 1, 100)
            assert v == (-1.0 if t == T - 1 else stamp(t + 1, j))
        assert p.bootstrap.shape == (1, p.mask.shape[1])


@pytest.mark.parametrize("by", ["step", "column"])
def test_minibatches_own_their_tensors(by: str) -> None:
    b = batch(hx=False)
    kept = b.clone()
    parts = list(b.minibatches(2, by=by))
    copies = [p.clone() for p in parts]
    for p in parts[1:]:
        p.poison()
    assert_same(b, kept)
    b.poison()
    assert_same(parts[0], copies[0])


@pytest.mark.parametrize("by", ["step", "column"])
def test_minibatches_are_whole_and_changed_one_by_one(by: str) -> None:
    """As if each had been cut out alone: in memory, and in what autograd knows of it."""
    b = batch(hx=False)
    w = torch.ones((), requires_grad=True)
    loss = torch.zeros(())
    for p in b.minibatches(2, by=by, extra={"adv": torch.rand(T, B)}):
        assert all(x.is_contiguous() for x in (p.state.rew, p.actor["value"], p.bootstrap, p.extra["adv"]))
        p.extra["adv"] -= p.extra["adv"].mean()
        loss = loss + (w * p.extra["adv"] * p.state.rew[1:].float()).sum()
    torch.autograd.backward(loss)
    assert w.grad is not None


def test_minibatches_of_what_has_a_gradient() -> None:
    b = batch(hx=False)
    adv = torch.rand(T, B, requires_grad=True)
    torch.autograd.backward([p.extra["adv"].sum() for p in b.minibatches(5, by="step", extra={"adv": adv})])
    assert adv.grad is not None
    assert torch.equal(adv.grad, torch.ones(T, B))


@pytest.mark.parametrize("by", ["step", "column"])
def test_minibatches_are_random_and_repeatable(by: str) -> None:
    b = batch(hx=False)

    def order(g: torch.Generator | None) -> list[float]:
        return [x for p in b.minibatches(1, by=by, generator=g) for x in p.state.rew[0].tolist()]

    assert order(generator(1)) == order(generator(1))
    assert len({tuple(order(generator(seed))) for seed in range(9)}) > 2
    torch.manual_seed(1)
    default = order(None)
    torch.manual_seed(1)
    assert order(None) == default


def test_by_column_is_the_default() -> None:
    assert next(batch().minibatches(2)).mask.shape == (T, 2)


def test_the_batchs_own_extra_is_cut_too() -> None:
    b = batch(hx=False)
    b.extra["ret"] = b.actor["value"].clone()
    for p in b.minibatches(3, by="step", extra={"adv": -b.actor["value"]}):
        assert torch.equal(p.extra["ret"], p.actor["value"])
        assert torch.equal(p.extra["adv"], -p.actor["value"])


@pytest.mark.parametrize("by", ["step", "column"])
def test_minibatches_of_every_dtype(by: str) -> None:
    obs = [ArraySpec(dtype, (2,)) for dtype in sorted(DTYPES)]
    (p,) = batch(hx=False, obs=obs).minibatches(100, by=by)
    assert [str(x.dtype).removeprefix("torch.") for x in p.state.obs] == sorted(DTYPES)


def test_minibatches_of_nothing() -> None:
    """No step was taken: there is no minibatch."""
    b = batch(hx=False)
    b.mask.fill_(False)
    assert list(b.minibatches(4, by="step")) == []


@pytest.mark.parametrize(
    ("size", "options", "word"),
    [
        (0, {}, "size"),
        (-1, {"by": "step"}, "size"),
        (2, {"by": "row"}, "row"),
        (2, {"extra": {"adv": torch.zeros(T + 1, B)}}, r"extra\['adv'\].*\[4, 3\].*\[5, 3\]"),
        (2, {"extra": {"adv": torch.zeros(T)}, "by": "step"}, "adv"),
        (2, {"by": "step"}, "recurrent"),
    ],
)
def test_refusals(size: int, options: dict[str, Any], word: str) -> None:
    """Also if nothing is ever taken from the iterator."""
    with pytest.raises(ConfigError, match=word):
        batch().minibatches(size, **options)
