"""Which learner a newcomer is sent to: a function of what is known, and of the time."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrl.protocol import messages as m
from zrl.protocol.redirect import FORGOTTEN, MOST_SENT, RESERVED, SOON, Spread

HELLO = m.Hello(m.NO_ID, b"H" * 16, m.PROTOCOL_VERSION, "host", "a", (), b"P" * 16, "boot", m.NO_ID, 0, 0, 2)
URLS = ["tcp://zero", "tcp://one", "tcp://two"]


def hello(name: str, count: int = 2) -> m.Hello:
    return dataclasses.replace(HELLO, name=name, count=count)


@pytest.mark.parametrize(
    ("here", "there", "url"),
    [
        ({}, {}, ""),
        ({"x": 2}, {}, URLS[1]),
        ({"x": 2}, {1: {"y": 2}, 2: {"z": 2}}, ""),  # as many everywhere: it stays
        ({"x": 2}, {1: {"y": 1}, 2: {"z": 1}}, URLS[1]),
        ({"x": 2}, {1: {"y": 2, "z": 1}, 2: {"q": 1}}, URLS[2]),
        ({}, {2: {"a": 2}}, URLS[2]),  # one of its name is there: which says so
    ],
)
def test_a_newcomer_goes_where_the_fewest_workers_are(
    here: dict[str, int], there: dict[int, dict[str, int]], url: str
) -> None:
    spread = Spread(URLS)
    spread.there = there
    assert spread(hello("a"), here, 0.0) == url


def test_who_is_on_the_way_counts_and_is_told_the_same_again() -> None:
    spread = Spread(URLS)
    here = {"x": 2}
    assert [spread(hello(name), here, 0.0) for name in "abc"] == [URLS[1], URLS[2], ""]
    assert spread(hello("a"), here, SOON - 0.1) == URLS[1]
    assert spread(hello("d"), here, RESERVED + 1) == URLS[1]  # they have not arrived, and are no longer expected


def test_who_arrived_is_counted_once() -> None:
    spread = Spread(URLS[:2])
    assert spread(hello("a"), {"x": 2}, 0.0) == URLS[1]
    spread.there = {1: {"a": 2}}
    assert spread(hello("b"), {"x": 2}, 1.0) == ""
    assert spread(hello("c"), {"x": 2, "b": 2}, 1.0) == URLS[1]


def test_who_comes_back_without_having_arrived_is_kept() -> None:
    spread = Spread(URLS[:2])
    assert spread(hello("a"), {"x": 2}, 0.0) == URLS[1]
    assert spread(hello("a"), {"x": 2}, SOON) == ""
    assert spread(hello("b"), {"x": 2, "a": 2}, SOON) == URLS[1]  # which is no judgement on others


def test_who_never_arrived_is_a_newcomer_in_the_end() -> None:
    spread = Spread(URLS[:2])
    assert spread(hello("a"), {"x": 2}, 0.0) == URLS[1]
    assert spread(hello("a"), {"x": 2}, FORGOTTEN) == URLS[1]


def test_what_is_remembered_is_bounded() -> None:
    spread = Spread(URLS[:2])
    sent = [spread(hello(str(i)), {"x": 1 << 20}, 0.0) for i in range(MOST_SENT + 1)]
    assert sent == [URLS[1]] * MOST_SENT + [""]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=20), st.integers(2, 5))
def test_hosts_that_all_come_at_once_are_spread_evenly(counts: list[int], n_learners: int) -> None:
    spread = Spread([str(i) for i in range(n_learners)])
    here: dict[str, int] = {}
    load = [0] * n_learners
    for i, count in enumerate(counts):
        url = spread(hello(f"h{i}", count), here, 0.0)
        load[int(url or 0)] += count
        if not url:
            here[f"h{i}"] = count
    assert max(load) - min(load) <= max(counts)
