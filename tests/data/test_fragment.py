"""A slot's views: they are all of the same memory, made once, outside of inference mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from zrl.data.fragment import Record, Slot, State, fill_with_poison, map_leaves, private_memory
from zrl.data.spec import DTYPES, ArraySpec, FragmentSpec, flatten
from zrl.errors import RecordError

F32 = ArraySpec("float32")
T, B = 3, 2
SPEC = FragmentSpec.build(
    T,
    B,
    obs={"x": ArraySpec("float32", (4,)), "y": (ArraySpec("uint8", (2, 5)), ArraySpec("int64"))},
    act=[ArraySpec("int64"), ArraySpec("float32", (2,))],
    actor={"value": F32, "logits": ArraySpec("float32", (5,))},
    hx=(ArraySpec("float32", (2, 7)),),
    env={"n": ArraySpec("int32"), "_n": ArraySpec("bool")},
    keep_final_obs=True,
)


def slot() -> Slot:
    """A slot in which no two bytes next to each other are the same."""
    memory = private_memory(SPEC.nbytes)
    memory[:] = np.arange(SPEC.nbytes) % 251
    return Slot(SPEC, memory)


def test_leaves_are_views_of_the_memory() -> None:
    s = slot()
    for leaf, a, x in zip(SPEC.leaves, s.arrays, s.tensors, strict=True):
        raw = s.memory[leaf.offset : leaf.offset + leaf.nbytes(B)]
        assert a.tobytes() == raw.tobytes()
        assert a.ctypes.data == s.memory.ctypes.data + leaf.offset == x.data_ptr()
        assert a.shape == tuple(x.shape) == leaf.full_shape(B)
        assert a.dtype.name == leaf.dtype == str(x.dtype).removeprefix("torch.")
        assert a.flags.c_contiguous
        assert a.ctypes.data % 64 == 0


def test_records_are_nested_like_the_specification() -> None:
    s = slot()
    for record in (s.np, s.pt):
        assert isinstance(record, Record)
        assert isinstance(record.state, State)
        assert list(record.state.obs) == ["x", "y"]
        assert isinstance(record.state.obs["y"], tuple)
        assert isinstance(record.state.act, list)
        assert list(record.actor) == ["value", "logits"] or sorted(record.actor) == ["logits", "value"]
        assert record.hx[0].shape == (2, B, 7)
        assert record.bootstrap.shape == (1, B)
        assert record.final_obs["x"].shape == (T + 1, B, 4)
        assert record.env["n"].shape == (T, B)
    s.np.state.obs["y"][1][2, 1] = 77
    assert s.pt.state.obs["y"][1][2, 1] == 77
    assert flatten(s.np.state.obs)[0][2] is s.arrays_of("state.obs")[2]
    assert s.tensors_of("hx")[0] is s.pt.hx[0]


def test_fields_that_are_not_recorded() -> None:
    plain = Slot(FragmentSpec.build(T, B, obs=F32, act=F32, actor={"value": F32}))
    assert plain.arrays_of("final_obs") == plain.arrays_of("env") == plain.tensors_of("env") == []
    assert plain.np.final_obs is None
    assert plain.np.env is None
    assert plain.np.hx == ()


def test_rows_are_views_too() -> None:
    s = slot()
    assert len(s.rows) == T + 1
    assert s.rows is s.rows
    for t, row in enumerate(s.rows):
        obs, act, rew, fin = row.inputs
        for x, whole in zip(flatten((obs, act, rew, fin))[0], flatten(tuple(s.pt.state[:4]))[0], strict=True):
            assert x.shape == (1, *whole.shape[1:])
            assert x.data_ptr() == whole[t].data_ptr()
        for name in ("rew", "fin", "term"):
            assert getattr(row, name).ctypes.data == getattr(s.np.state, name)[t].ctypes.data
        for name in ("final_value", "ep_return", "ep_length"):
            assert getattr(row, name).ctypes.data == getattr(s.np, name)[t].ctypes.data
        for name in ("obs", "act"):
            for a, whole in zip(getattr(row, name), s.arrays_of(f"state.{name}"), strict=True):
                assert a.ctypes.data == whole[t].ctypes.data
        assert [a.ctypes.data for a in row.final_obs] == [a[t].ctypes.data for a in s.arrays_of("final_obs")]
        if t < T:
            assert row.mask.ctypes.data == s.np.mask[t].ctypes.data
            written = [x[t + 1] for x in s.tensors_of("state.act")] + [x[t] for x in s.tensors_of("actor")]
            assert [x.data_ptr() for x in row.outputs] == [x.data_ptr() for x in written]
            assert [x.shape for x in row.outputs] == [(1, *x.shape) for x in written]
            assert [a.ctypes.data for a in row.env] == [a[t].ctypes.data for a in s.arrays_of("env")]
        else:
            assert row.mask.size == 0
            assert row.outputs == row.env == []


def test_observations_with_their_columns_folded() -> None:
    """What one `numpy.concatenate` over all columns writes to."""
    s = slot()
    row = s.rows[1]
    assert [a.shape for a in row.obs_flat] == [(B * 4,), (B * 2, 5), (B,)]
    columns = [np.full((2, 5), j, np.uint8) for j in range(B)]
    np.concatenate(columns, 0, row.obs_flat[1])
    assert all((s.np.state.obs["y"][0][1, j] == j).all() for j in range(B))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_leaves_without_a_single_number(shape: tuple[int, ...]) -> None:
    spec = FragmentSpec.build(T, B, obs=ArraySpec("float32", shape), act=F32, actor={"value": F32})
    (flat,) = Slot(spec).rows[0].obs_flat
    assert flat.shape == (B * shape[0], *shape[1:])


def test_what_a_row_carries_on() -> None:
    """All that has T+1 rows, and nothing else."""
    s = slot()
    fields = [f for f in SPEC.fields if f not in ("hx", "bootstrap", "actor", "mask", "env")]
    for t in (0, T):
        expected = [a[t].ctypes.data for f in fields for a in s.arrays_of(f)]
        assert [a.ctypes.data for a in s.rows[t].carried] == expected
    assert len(expected) == 3 + 2 + 3 + 3 + 3


def test_views_made_in_inference_mode_take_part_in_autograd() -> None:
    with torch.inference_mode():
        s = slot()
        rows = s.rows
    scale = torch.ones((), requires_grad=True)
    for x in [*s.tensors, *flatten([row.inputs for row in rows])[0], *rows[0].outputs]:
        assert not x.is_inference()
        if x.is_floating_point():
            (x * scale).sum().backward()


def test_rows_of_a_state() -> None:
    state = slot().pt.state
    part = state.rows(1, 3)
    assert isinstance(part, State)
    for x, whole in zip(flatten(tuple(part))[0], flatten(tuple(state))[0], strict=True):
        assert torch.equal(x, whole[1:3])
        assert x.data_ptr() == whole[1].data_ptr()
    assert type(part.obs["y"]) is tuple


def test_memory() -> None:
    memory = private_memory(100)
    assert memory.shape == (100,)
    assert memory.ctypes.data % 64 == 0
    assert not memory.any()
    shared = private_memory(2 * SPEC.nbytes + 64)
    one, two = Slot(SPEC, shared[: SPEC.nbytes]), Slot(SPEC, shared[SPEC.nbytes :])
    one.poison()
    assert not any(a.any() for a in two.arrays)


@pytest.mark.parametrize("memory", [private_memory(SPEC.nbytes - 64), private_memory(SPEC.nbytes + 64)[8:]])
def test_memory_that_does_not_fit(memory: Any) -> None:
    with pytest.raises(RecordError, match="memory of a slot") as e:
        Slot(SPEC, memory)
    assert str(SPEC.nbytes) in e.value.expected
    assert str(memory.nbytes) in e.value.found


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_poison(dtype: str) -> None:
    a = np.zeros((2, 3), dtype)
    fill_with_poison(a)
    if a.dtype.kind in "fc":
        assert np.isnan(a).all()
    elif a.dtype.kind == "b":
        assert a.all()
    else:
        assert (a == (np.iinfo(dtype).min if a.dtype.kind == "i" else np.iinfo(dtype).max)).all()


def test_a_poisoned_slot() -> None:
    s = slot()
    s.poison()
    assert all(np.isnan(a).all() for a in s.arrays if a.dtype.kind == "f")
    assert s.np.mask.all()
    assert (s.np.ep_length == np.iinfo(np.int32).min).all()


def test_map_leaves() -> None:
    tree = {"a": [1, (2, State(3, 4, 5, 6, 7))], "b": ()}
    assert map_leaves(lambda x: -x, tree) == {"a": [-1, (-2, State(-3, -4, -5, -6, -7))], "b": ()}
    assert map_leaves(lambda x: x is None, {"a": None}) == {"a": True}
