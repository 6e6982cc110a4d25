from __future__ import annotations

import collections
import contextlib
import json
from typing import Any

import optree
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.data.structure import from_text, to_text
from zrl.errors import RecordError

Pair = collections.namedtuple("Pair", "x y")

TREES = st.recursive(
    st.none(),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 9)), children, max_size=3).filter(
            lambda d: len({type(k) for k in d}) < 2
        ),
        st.tuples(children, children).map(lambda p: Pair(*p)),
    ),
    max_leaves=12,
)


def structure(tree: object) -> optree.PyTreeSpec:
    return optree.tree_structure(tree, none_is_leaf=True)  # type: ignore[arg-type]


@given(TREES)
def test_what_goes_in_comes_out(tree: object) -> None:
    spec = structure(tree)
    again = from_text(to_text(spec))
    assert to_text(again) == to_text(spec)
    leaves = list(range(spec.num_leaves))
    assert again.unflatten(leaves) == spec.unflatten(leaves)


@given(
    st.one_of(
        st.text(max_size=40),
        st.recursive(st.one_of(st.none(), st.integers(), st.text(max_size=5)), st.lists).map(json.dumps),
    )
)
def test_garbage_is_refused_with_one_kind_of_error(text: str) -> None:
    with contextlib.suppress(RecordError):
        from_text(text)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '["dict", ["a", "*"], ["a", "*"]]', '["namedtuple", "x y", ["class", "*"]]']
)
def test_hostile_texts(text: str) -> None:
    with pytest.raises(RecordError):
        from_text(text)


def spec(changes: dict[str, Any] | None = None) -> FragmentSpec:
    x = ArraySpec("float32", (3,))
    trees: dict[str, Any] = {
        "obs": {"a": x, "b": Pair(x, [x])},
        "act": ArraySpec("int64"),
        "actor": {"value": ArraySpec("float32")},
        "hx": (ArraySpec("float32", (1, 5)),),
    }
    return FragmentSpec.build(4, 2, **trees | (changes or {}))


def test_a_specification_travels() -> None:
    again = FragmentSpec.from_plain(json.loads(json.dumps(spec().to_plain())))
    assert again.digest == spec().digest
    assert list(again.leaves) == list(spec().leaves)
    assert spec().differences(again) == []


def test_differences_are_named() -> None:
    other = FragmentSpec.build(
        4, 2, obs={"a": ArraySpec("float32", (4,))}, act=ArraySpec("int64"), actor={"value": ArraySpec("float32")}
    )
    assert spec().differences(other) == [
        "state.obs['a']: expected float32[3], found float32[4]",
        "state.obs['b'].x: expected float32[3], found no such leaf",
        "state.obs['b'].y[0]: expected float32[3], found no such leaf",
        "hx[0]: expected float32[1, 5], found no such leaf",
    ]
    layers = spec({"hx": (ArraySpec("float32", (2, 5)),)})
    assert spec().differences(layers) == ["hx[0]: expected float32[1, 5], found float32[2, 5]"]
    (line,) = spec().differences(spec({"hx": [ArraySpec("float32", (1, 5))]}))
    assert line == 'hx: expected nested as ["tuple", "*"], found ["list", "*"]'
    assert spec().differences(spec().with_columns(3)) == ["T and B: expected (4, 2), found (4, 3)"]
    assert spec({"keep_final_obs": True}).differences(spec())[0] == (
        "final_obs['a']: expected float32[3], found no such leaf"
    )


PLAIN = st.recursive(
    st.one_of(st.integers(-2, 1 << 40), st.text(max_size=8), st.booleans()), lambda c: st.lists(c, max_size=5)
)


@given(PLAIN)
def test_a_garbled_specification_is_refused(plain: object) -> None:
    with pytest.raises(RecordError):
        FragmentSpec.from_plain(plain)


@given(st.data())
def test_a_mutated_specification_is_read_or_refused(data: st.DataObject) -> None:
    plain = spec().to_plain()
    where = plain[2][data.draw(st.integers(0, len(plain[2]) - 1))]
    where[data.draw(st.integers(0, 2))] = data.draw(PLAIN)
    with contextlib.suppress(RecordError):
        FragmentSpec.from_plain(plain, most_nbytes=1 << 30)
