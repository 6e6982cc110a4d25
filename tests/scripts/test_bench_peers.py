"""The benchmark beside the peers: what can be run without them, and what it says of those that are not there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench_peers.report import Report  # noqa: E402
from bench_peers.systems import REQUIREMENTS, SYSTEMS  # noqa: E402
from bench_peers.window import Window  # noqa: E402
from bench_peers.work import WORKS  # noqa: E402

#: What whoever reads the last line may count on, whether the peer is there or not.
PROMISED = {
    *("w1_over_plain", "w1_over_envpool", "w1_over_sb3", "w1_over_sample_factory", "w1_over_torchrl"),
    *("w1l_over_plain", "w2_over_plain", "w5_cartpole_over_envpool", "w5_pong_over_envpool", "solve_over_sb3"),
}
MACHINE = {"processor": "a processor", "cores": 2, "system": "a system", "load_at_start": 0.0}


def bench(out: Path, *words: str) -> str:
    quick = ["--works", "w1", "--rounds", "1", "--seconds", "0.1", "--warm-up", "0.1", "--no-install"]
    done = subprocess.run(
        [sys.executable, "-m", "bench_peers", *quick, "--out", str(out), "--venvs", str(out / "none"), *words],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_measures_and_says_who_is_absent(tmp_path: Path) -> None:
    out = bench(tmp_path, "--systems", "plain,zrl,sb3-dummy")
    figures = json.loads(out.splitlines()[-1])
    assert all(isinstance(x, (int, float)) for x in figures.values())
    assert {key for key in PROMISED if key.startswith("w1_")} <= set(figures)
    assert figures["w1_over_plain"] > 0
    assert figures["w1_zrl_steps_per_s"] > 100
    assert figures["w1_over_sb3"] == 0
    systems = json.loads((tmp_path / "results.json").read_text())["works"]["w1"]["systems"]
    assert systems["sb3-dummy"]["absent"] == "it is not installed"
    assert systems["zrl"]["versions"]["zrl"]
    assert "| `sb3-dummy` | – | it is not installed |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    # once more: nothing is measured twice
    lines = (tmp_path / "measurements.jsonl").read_text()
    assert json.loads(bench(tmp_path, "--systems", "plain,zrl,sb3-dummy").splitlines()[-1]) == figures
    assert (tmp_path / "measurements.jsonl").read_text() == lines


def record(work: str, system: str, turn: int, value: float | None, **more: Any) -> dict[str, Any]:
    return {"work": work, "system": system, "round": turn, "value": value, **more}


def test_a_report_of_everything_has_all_promised_keys() -> None:
    figures = Report(list(WORKS), list(SYSTEMS), [], dict.fromkeys(REQUIREMENTS, "not there"), MACHINE).flat()
    assert set(figures) >= PROMISED
    assert set(figures.values()) == {0.0}


def test_ratios_are_of_rounds_and_against_the_fastest_variant() -> None:
    records = [
        *(record("w1", "zrl", k, value) for k, value in enumerate((100.0, 300.0, 900.0))),
        *(record("w1", "sb3-dummy", k, value) for k, value in enumerate((50.0, 100.0, 100.0))),
        *(record("w1", "sb3-subproc", k, 10.0) for k in range(3)),
        {"work": "w1", "system": "plain", "round": 0, "error": "it does not run: why"},
    ]
    report = Report(["w1"], ["zrl", "plain", "sb3-dummy", "sb3-subproc"], records, {}, MACHINE)
    assert report.flat()["w1_over_sb3"] == 3.0  # of 2, 3 and 9
    assert report.flat()["w1_over_plain"] == 0.0
    assert "it does not run: why" in report.text()


def test_who_gives_up_is_slower_than_who_solves() -> None:
    records = [
        *(record("solve", "zrl", k, 1000, total_s=5.0, warm_s=2.0) for k in range(3)),
        *(record("solve", "sb3-dummy", k, 1000, total_s=15.0, warm_s=8.0) for k in range(2)),
        record("solve", "sb3-dummy", 2, None, total_s=1.0, warm_s=0.5),
    ]
    report = Report(["solve"], ["zrl", "sb3-dummy"], records, {}, MACHINE)
    assert report.values("solve", "sb3-dummy")[2] == math.inf
    assert report.flat()["solve_over_sb3"] == 3.0
    assert report.flat()["solve_warm_over_sb3"] == 4.0
    assert "not solved" in report.markdown()


def test_the_window_counts_from_a_delivery_to_a_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 2.0, 3.0, 6.0))
    monkeypatch.setattr("bench_peers.window.time.perf_counter", lambda: next(now))
    window = Window(seconds=3.0, warm_up=1.5)
    # the third one ends the warm-up, and was made before the window opened
    assert [window.delivered(n) for n in (1000, 1000, 1000, 10, 30)] == [False, False, False, False, True]
    assert window.rate == 40 / 4.0
