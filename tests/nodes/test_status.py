"""The document that a learner publishes: plain JSON, whatever goes into it, and never too long for a frame."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.protocol.test_peers import HOST, RUN, WORKER, make
from zrl.errors import ConfigError
from zrl.nodes.status import LEAST_ROW, ROOM, Learner, document, frame, has_room, plain, rows_of
from zrl.protocol import messages as m
from zrl.protocol.slots import SlotTable

NAMES = ("free", "worker", "ready", "held")


def strict(data: bytes) -> Any:
    """JSON that has no NaN in it."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(data, parse_constant=refuse)


def test_plain_is_what_json_has() -> None:
    value = {1: (1.5, np.float32(2.5), np.int64(3), True, None, "x"), "bad": [math.nan, -math.inf, np.float64("inf")]}
    assert plain(value, "") == {"1": [1.5, 2.5, 3, True, None, "x"], "bad": [None, None, None]}


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ([1], "annotate: expected a mapping, not"),
        ({"a": {"b": [1, torch.ones(2)]}}, r"annotate: a: b\[1\]: expected numbers, texts, .* not Tensor; call float"),
        ({"a": b"x"}, "annotate: a: expected numbers, .* not bytes"),
        ({"a": "x" * 20_000}, r"annotate: 20\d\d\d bytes of JSON, at most 16384: say less"),
    ],
)
def test_notes_that_are_no_plain_json(note: Any, message: str) -> None:
    learner = Learner()
    learner.annotate({"env": "before"})
    with pytest.raises(ConfigError, match=message):
        learner.annotate(note)
    assert learner.training == {"env": "before"}


def test_a_note_that_contains_itself() -> None:
    note: dict[str, Any] = {}
    note["me"] = note
    with pytest.raises(ConfigError, match="nested too deeply"):
        Learner().annotate(note)


def test_nothing_that_is_not_finite_gets_into_the_document() -> None:
    learner = Learner()
    note = {"return_100": math.nan, "losses": {"policy": math.inf}}
    learner.annotate(note)
    note["return_100"] = 1.0  # a copy was taken
    learner.lags.update([0, 0, 3])
    stats = {"version": 3, "seconds": {"env": math.inf}, **learner.figures()}
    status = strict(frame(document(stats, learner, lag={"min": 0}, time=1.0)))
    assert status["training"] == {"return_100": None, "losses": {"policy": None}}
    assert (status["seconds"], status["version"]) == ({"env": None}, 3)
    assert (status["lags"], status["lag"]) == ({"0": 2, "3": 1}, {"min": 0})


def test_a_document_without_a_note_has_no_training() -> None:
    assert "training" not in document({}, Learner())


@pytest.mark.parametrize("n", [10, 1000])
def test_rows_of_workers_are_left_out_where_there_are_too_many(n: int) -> None:
    row = {"index": 1, "host": "h" * 60, "phase": "collect", "slots": {"free": 1, "worker": 0, "ready": 0, "held": 0}}
    data = frame({"run_id": "ab", "version": 1, "peers": [row] * n, "verdict": "fine"})
    status = strict(data)
    if n == 10:
        assert len(status["peers"]) == n
    else:
        assert status == {"run_id": "ab", "version": 1, "verdict": "fine", "peers_omitted": n}
    assert len(data) <= ROOM < m.LARGE_HEADER


def test_rows_that_would_be_left_out_are_not_made() -> None:
    peers = make(attached=True)
    (row,) = rows_of(peers, SlotTable(), 0.0)
    shortest = {**row, "host": "", "phase": "wait", "age": 0.0}
    assert len(json.dumps(shortest)) >= LEAST_ROW
    assert [has_room(n) for n in (1, 250, 1000)] == [True, True, False]
    left_out = {"run_id": "ab", "version": 1, "verdict": "fine", "peers_omitted": 1000}
    assert strict(frame(left_out)) == left_out
    assert strict(frame({**left_out, "stale": {str(worker): 1 for worker in range(1 << 16)}})) == left_out


def test_a_sign_of_life_is_given_however_long_the_rest_is() -> None:
    stale = {str(worker): 1 for worker in range(1 << 16)}
    status = strict(frame({"run_id": "ab", "version": 1, "stale": stale, "peers": [], "verdict": "fine"}))
    assert status == {"run_id": "ab", "version": 1, "verdict": "fine", "peers_omitted": 0}


def test_a_row_says_where_the_slots_of_a_worker_are() -> None:
    peers, slots = make(attached=True), SlotTable()
    (before,) = rows_of(peers, slots, 2.0)
    assert (before["n_slots"], before["slots"], before["phase"], before["age"]) == (
        0,
        dict.fromkeys(NAMES, 0),
        "build",
        2,
    )
    slots.attach(WORKER, 1, 4)
    for slot in (0, 1, 2):
        slots.grant(WORKER, slot, 1)
    for slot in (0, 1):
        slots.ready(WORKER, slot, slot + 1, 1)
    peers.receive(b"h", m.Beat(RUN, HOST, (m.ChildBeat(WORKER, 12, 2, 2, 3),)), 3.0)
    (row,) = rows_of(peers, slots, 5.0)
    assert row == {
        "index": 1,
        "host": "left",
        "generation": 0,
        "phase": "collect",
        "slots": {"free": 1, "worker": 1, "ready": 2, "held": 0},
        "n_slots": 4,
        "calls": 12,
        "sent": 2,
        "age": 2.0,
    }
