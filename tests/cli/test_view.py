"""A status as people see it, from a recorded one, from none, and from one that means harm."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from zrl.cli.view import MOST_ROWS, age_in_words, line, render

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded_status.json").read_text())


def page(status: dict[str, Any], width: int = 80, rows: int = MOST_ROWS) -> list[str]:
    """The lines of the page on a terminal of this width."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False, highlight=False).print(render(status, rows))
    return [text.rstrip() for text in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_of_a_recorded_status(width: int) -> None:
    lines = page(RECORDED, width)
    assert max(map(len, lines)) <= width
    assert not any("…" in text for text in lines)
    assert lines[0].split() == ["CartPole-v1", "ppo", "seed", "1", "run", "ab23d840", "up", "4", "s", "zrl", "0.1.0"]
    assert lines[1].endswith("123,456 of 500,000 steps (25 %)  ETA 1:06:40")
    assert lines[2:8] == [
        "12,346 steps/s   12.2 updates/s   update 240   version 48",
        "return 123.4   best 150.0   length 98.2   1,234 episodes",
        "lag 0 / 1.6 / 4   slots 0 free, 3 worker, 1 ready, 0 held",
        "worker  host     state    slots    fragments   calls  idle",
        "     0  learner  collect  0/1/1/0         48  12,958   0 s",
        "     1  learner  collect  0/2/0/0         48  12,836   0 s",
    ]
    assert lines[8:11] == [
        "dropped: 12 stale, 2 gone   losses: 1 signal   fragments lost: 1   replaced: 1",
        "workers ████▓▓▓▓▓▓▓▒▚·  env 28% actor 54% write 7% reset 4% other 3% wait 4%",
        "learner ·········█████  wait 65% train 34% publish 1%; gather 0%",
    ]
    assert " ".join(lines[11:]) == RECORDED["verdict"]


def test_the_line_of_a_recorded_status() -> None:
    assert line(RECORDED) == (
        "CartPole-v1 ppo seed 1 run ab23d840  123,456 of 500,000 steps (25 %)  12,346 steps/s  return 123.4  "
        f"lag 0 / 1.6 / 4  {RECORDED['verdict']}"
    )


def test_nothing_is_known() -> None:
    assert page({}) == ["a run", "no figures yet"]
    assert line({}) == "a run  no figures yet"


@pytest.mark.parametrize("key", RECORDED)
def test_every_key_may_be_missing_or_hold_anything(key: str) -> None:
    rest = {name: x for name, x in RECORDED.items() if name != key}
    assert page(rest)
    odd: Any
    for odd in (None, True, -1, 1e300, float("nan"), "text", [1, "x", None], {"x": [1]}, [{"slots": 3}], [[]]):
        status = {**rest, key: odd}
        assert page(status)
        assert "\n" not in line(status)


@pytest.mark.parametrize("key", RECORDED["training"])
def test_every_key_of_the_training_may_be_missing_or_hold_anything(key: str) -> None:
    training = {name: x for name, x in RECORDED["training"].items() if name != key}
    assert page({**RECORDED, "training": training})
    for odd in (None, True, -1, 0, 1e300, "text", [1], {"x": 1}):
        assert page({**RECORDED, "training": {**training, key: odd}})


def test_without_a_training_loop_the_collector_tells_the_rates() -> None:
    status = {name: x for name, x in RECORDED.items() if name != "training"}
    assert page(status)[1] == "8,176 steps/s   16.0 batches/s   version 48"


@pytest.mark.parametrize("evaluated", [99.5, {"mean": 99.5}, {"return_mean": 99.5, "mean": 1.0}])
def test_the_return_of_an_evaluation(evaluated: Any) -> None:
    assert page({"training": {"return_100": 3.0, "eval": evaluated}})[1] == "return 3.0   evaluated 99.5"


def test_texts_of_others_are_escaped() -> None:
    evil = "\x1b[31m[red]\nx\u202e"
    status = {
        "verdict": evil,
        "training": {"env": evil},
        "peers": [{"index": 0, "host": evil, "phase": evil}],
        "losses": {evil: 2},
        "run_id": evil,
        "zrl": evil,
    }
    for shown in (page(status, 200), [line(status)]):
        assert all(text.isprintable() for text in shown)
        assert "\\x1b[31m[red]\\nx\\u202e" in "".join(shown)


def test_many_workers_are_summed_up() -> None:
    row = RECORDED["peers"][0]
    rows = [
        row | {"index": i, "host": "a-machine-with-a-long-name", "generation": i % 3, "calls": 10**i, "phase": phase}
        for i, phase in enumerate(["collect", "wait", "build"] * 6)
    ]
    for width in (80, 120):
        lines = page({"peers": rows}, width)
        assert len(lines) == 1 + 1 + MOST_ROWS + 1 + 1
        assert max(map(len, lines)) <= width
        assert lines[-2] == "and 2 more: 1 build, 1 wait"
    (row_10,) = [text for text in lines if text.strip().startswith("10 (1)")]
    assert row_10.split() == ["10", "(1)", "a-machine-with-…", "wait", "0/1/1/0", "48", "10.0G", "0", "s"]
    assert page({"peers": rows}, rows=3)[-2] == "and 15 more: 5 build, 5 collect, 5 wait"
    assert page({"peers_omitted": 400})[-2] == "400 workers, too many to be told one by one"


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (3725, "1:02:05")])
def test_ages(seconds: float, words: str) -> None:
    assert age_in_words(seconds) == words
