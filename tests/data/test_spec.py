"""The layout of a fragment: which leaves, of which shape, where."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zrl.data.spec import ALIGNMENT, DTYPES, ArraySpec, FragmentSpec, flatten, rows_of, tree_paths
from zrl.errors import RecordError

F32, I64 = ArraySpec("float32"), ArraySpec("int64")


class Pair(NamedTuple):
    here: Any
    there: Any


def build(n_steps: int = 4, n_columns: int = 3, **changed: Any) -> FragmentSpec:
    trees: dict[str, Any] = {
        "obs": {"image": ArraySpec("uint8", (2, 5)), "at": Pair(F32, [ArraySpec("float64", (3,))])},
        "act": (I64, ArraySpec("float32", (2,))),
        "actor": {"value": F32, "logits": ArraySpec("float32", (4,))},
        "hx": (ArraySpec("float32", (2, 7)), ArraySpec("float32", (1,))),
        "env": {"n": I64, "_n": ArraySpec("bool")},
        "keep_final_obs": True,
    }
    return FragmentSpec.build(n_steps, n_columns, **(trees | changed))


SHAPES = {
    "state.obs['at'].here": ("float32", (5, 3)),
    "state.obs['at'].there[0]": ("float64", (5, 3, 3)),
    "state.obs['image']": ("uint8", (5, 3, 2, 5)),
    "state.act[0]": ("int64", (5, 3)),
    "state.act[1]": ("float32", (5, 3, 2)),
    "state.rew": ("float32", (5, 3)),
    "state.fin": ("bool", (5, 3)),
    "state.term": ("bool", (5, 3)),
    "actor['logits']": ("float32", (4, 3, 4)),
    "actor['value']": ("float32", (4, 3)),
    "hx[0]": ("float32", (2, 3, 7)),
    "hx[1]": ("float32", (1, 3)),
    "bootstrap": ("float32", (1, 3)),
    "final_value": ("float32", (5, 3)),
    "mask": ("bool", (4, 3)),
    "ep_return": ("float32", (5, 3)),
    "ep_length": ("int32", (5, 3)),
    "final_obs['at'].here": ("float32", (5, 3)),
    "final_obs['at'].there[0]": ("float64", (5, 3, 3)),
    "final_obs['image']": ("uint8", (5, 3, 2, 5)),
    "env['_n']": ("bool", (4, 3)),
    "env['n']": ("int64", (4, 3)),
}


def test_every_leaf_by_path() -> None:
    assert {leaf.path: (leaf.dtype, leaf.full_shape(3)) for leaf in build().leaves} == SHAPES


def test_optional_fields() -> None:
    """The others are always there, an empty hx too."""
    plain = build(env=None, keep_final_obs=False, hx=())
    assert [name for name in build().fields if name not in plain.fields] == ["final_obs", "env"]
    assert plain.fields["hx"].leaves == ()
    assert [leaf.path for leaf in plain.leaves] == [p for p in SHAPES if not p.startswith(("final_obs", "env", "hx"))]


def test_leaves_do_not_overlap_and_are_aligned() -> None:
    check_layout(build())


def check_layout(spec: FragmentSpec) -> None:
    end = 0
    for leaf in spec.leaves:
        assert leaf.offset % ALIGNMENT == 0
        assert end <= leaf.offset < end + ALIGNMENT
        end = leaf.offset + leaf.nbytes(spec.n_columns)
    assert spec.nbytes % ALIGNMENT == 0
    assert end <= spec.nbytes < end + ALIGNMENT
    firsts = [f.first for f in spec.fields.values()]
    assert firsts == [sum(len(f.leaves) for f in list(spec.fields.values())[:i]) for i in range(len(firsts))]


ARRAYS = st.builds(
    ArraySpec, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3).map(lambda shape: tuple(shape))
)
TREES = st.recursive(
    ARRAYS,
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50, derandomize=True)
@given(TREES, TREES, st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_any_layout(obs: Any, act: Any, n_steps: int, n_columns: int, keep: bool) -> None:
    spec = FragmentSpec.build(n_steps, n_columns, obs=obs, act=act, actor={"value": F32}, keep_final_obs=keep)
    check_layout(spec)
    assert spec.fields["state.obs"].unflatten(flatten(obs)[0]) == obs
    again = FragmentSpec.build(9, 7, obs=obs, act=act, actor={"value": F32}, keep_final_obs=keep)
    assert again.with_columns(n_columns).with_steps(n_steps) == spec


def test_another_size() -> None:
    spec = build()
    assert spec.with_columns(8) == build(n_columns=8)
    assert spec.with_steps(9) == build(n_steps=9)
    assert spec.with_steps(9).with_columns(8).digest == build(9, 8).digest
    assert spec.with_columns(3) == spec


def test_rows() -> None:
    rows = {name: rows_of(name, 4) for name in build().fields if name != "hx"}
    of_steps = {"actor", "mask", "env"}
    assert rows == {name: 4 if name in of_steps else 1 if name == "bootstrap" else 5 for name in rows}


# -- digests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"n_steps": 5},
        {"n_columns": 4},
        {"keep_final_obs": False},
        {"env": None},
        {"env": {"m": I64, "_m": ArraySpec("bool")}},
        {"hx": ()},
        {"hx": (ArraySpec("float32", (7, 2)), ArraySpec("float32", (1,)))},
        {"hx": [ArraySpec("float32", (2, 7)), ArraySpec("float32", (1,))]},
        {"act": (ArraySpec("int32"), ArraySpec("float32", (2,)))},
        {"act": [I64, ArraySpec("float32", (2,))]},
        {"act": (I64, ArraySpec("float32", (2, 1)))},
        {"obs": {"image": ArraySpec("uint8", (5, 2)), "at": Pair(F32, [ArraySpec("float64", (3,))])}},
        {"obs": {"image": ArraySpec("uint8", (2, 5)), "at": (F32, [ArraySpec("float64", (3,))])}},
        {"obs": {"image": ArraySpec("uint8", (2, 5)), "at": Pair(F32, (ArraySpec("float64", (3,)),))}},
        {"actor": {"value": F32, "logit": ArraySpec("float32", (4,))}},
    ],
    ids=str,
)
def test_the_digest_tells_specifications_apart(changed: dict[str, Any]) -> None:
    assert len(build().digest) == 16
    assert build(**changed).digest != build().digest
    assert build(**changed) != build()


def test_equal_specifications_have_equal_digests() -> None:
    """The order in which a dict was filled does not count."""
    assert build().digest == build().digest
    actor = {"logits": ArraySpec("float32", (4,)), "value": F32}
    assert build(actor=actor).digest == build().digest


def test_plain() -> None:
    spec = build()
    n_steps, n_columns, fields = spec.to_plain()
    assert (n_steps, n_columns) == (4, 3)
    assert [name for name, _, _ in fields] == list(spec.fields)
    assert sum(len(leaves) for _, _, leaves in fields) == len(list(spec.leaves))


# -- leaves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (1.0, "float64[]"),
        (1, "int64[]"),
        (True, "bool[]"),
        (np.zeros((2, 3), np.uint8), "uint8[2, 3]"),
        (np.float32(1), "float32[]"),
        ([1.0, 2.0], "float64[2]"),
        (np.zeros((0, 2), np.complex64), "complex64[0, 2]"),
    ],
)
def test_array_specs(x: Any, text: str) -> None:
    assert str(ArraySpec.of(x)) == text


@pytest.mark.parametrize("x", [None, "text", np.array([None]), np.datetime64("2020-01-01"), np.zeros(1, np.longdouble)])
def test_what_is_no_array_of_numbers(x: Any) -> None:
    with pytest.raises(RecordError, match="dtype") as e:
        ArraySpec.of(x)
    assert e.value.found == np.asarray(x).dtype.name
    assert "float32" in e.value.expected


def test_dtypes_are_known_to_both_sides() -> None:
    for name in DTYPES:
        assert torch.from_numpy(np.zeros(1, name)).dtype == getattr(torch, name)


@pytest.mark.parametrize(("n_steps", "n_columns"), [(0, 1), (1, 0), (-1, 1)])
def test_a_fragment_needs_steps_and_columns(n_steps: int, n_columns: int) -> None:
    with pytest.raises(RecordError) as e:
        build(n_steps, n_columns)
    assert e.value.found == f"T={n_steps}, B={n_columns}"


def test_paths_and_trees() -> None:
    tree = {"b": [1, (2,)], "a": Pair(3, OrderedDict(z=4, y=5)), 7: 6}
    leaves, spec = flatten({"x": tree})
    paths = dict(zip(tree_paths(spec, "root"), leaves, strict=True))
    assert paths["root['x']['b'][1][0]"] == 2
    assert paths["root['x']['a'].there['z']"] == 4
    assert paths["root['x'][7]"] == 6
    assert len(paths) == 6
    assert flatten(None)[0] == [None]
    assert tree_paths(flatten(1)[1], "root") == ["root"]


def spoilt(name: str, tree: str, leaves: list[Any]) -> list[Any]:
    """A specification with one field replaced, as a stranger might send it."""
    plain = FragmentSpec.build(
        2, 3, obs=ArraySpec("float32", (4,)), act=ArraySpec("int64"), actor={"value": ArraySpec("float32")}
    ).to_plain()
    plain[2] = [[name, tree, leaves] if field[0] == name else field for field in plain[2]]
    return plain


@pytest.mark.parametrize(
    ("name", "tree", "leaves"),
    [
        ("state.obs", '"*"', [["float32", [(1 << 31) - 1] * 500]]),
        ("state.obs", '"*"', [["float32", [(1 << 31) - 1] * 30]]),
        ("state.obs", '"*"', [["float32", [1] * 70]]),
        ("state.obs", '["namedtuple", "A", ["\ufb01", "*"], ["fi", "*"]]', [["float32", []], ["float32", []]]),
        ("state.rew", '"*"', [["bool", []]]),
        ("state.rew", '"*"', [["float32", [3]]]),
        ("state.fin", '"*"', [["uint8", []]]),
        ("ep_length", '["list", "*"]', [["int32", []]]),
        ("bootstrap", '["dict"]', []),
    ],
)
def test_what_no_fragment_is_like_is_refused(name: str, tree: str, leaves: list[Any]) -> None:
    FragmentSpec.from_plain(spoilt("state.obs", '"*"', [["float32", [4]]]))
    with pytest.raises(RecordError):
        FragmentSpec.from_plain(spoilt(name, tree, leaves), most_nbytes=1 << 28)
