"""The numbers behind the plots, and that figures come out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zrl.config import TrainConfig
from zrl.errors import ConfigError
from zrl.train import curves
from zrl.train.curves import Curve, Group, Run
from zrl.train.plot import plot_return, plot_runs
from zrl.train.run_folder import RunFolder

PNG = b"\x89PNG"


def run(rows: list[dict[str, Any]], **settings: Any) -> Run:
    return Run({"env": "E", "algo": "ppo", "seed": 1, "runs": "runs", **settings}, rows)


def line(*points: tuple[float, float]) -> Curve:
    return Curve(*np.array(points, float).T)


def test_runs_that_differ_only_in_seed_are_a_group() -> None:
    runs = [run([], seed=1), run([], seed=2, lr=0.5), run([], seed=3, runs="elsewhere")]
    groups = curves.grouped(runs)
    assert [[r.settings["seed"] for r in g.runs] for g in groups] == [[1, 3], [2]]
    assert [g.label.replace("\xa0", " ") for g in groups] == ["lr None (2 runs)", "lr 0.5"]
    assert curves.title(runs) == "E, ppo"


def test_a_label_does_not_repeat_the_defaults_of_an_algorithm() -> None:
    runs = [Run(TrainConfig(algo=algo).resolved(0).as_dict(), []) for algo in ("ppo", "a2c")]
    assert [g.label for g in curves.grouped(runs)] == ["ppo", "a2c"]
    assert curves.title(runs) == "CartPole-v1"


def test_the_band_of_a_group_over_the_steps_that_all_runs_cover() -> None:
    band = curves.mean_and_std([line((0, 0), (100, 100)), line((50, 60), (150, 160))])
    assert band is not None
    assert (band.steps[0], band.steps[-1]) == (50, 100)
    np.testing.assert_allclose(band.mean, band.steps + 5)
    # of the sample: two values 10 apart
    np.testing.assert_allclose(band.high - band.mean, 50**0.5)
    np.testing.assert_allclose(band.mean - band.low, 50**0.5)


def test_runs_without_common_steps_have_no_band() -> None:
    assert curves.mean_and_std([line((0, 0), (10, 1)), line((20, 0), (30, 1))]) is None


def test_condensed_keeps_what_was_least() -> None:
    c = Curve(np.arange(1000.0), np.where(np.arange(1000) == 537, -7.0, 1.0))
    small = curves.condensed(c, np.min, most=10)
    assert len(small.steps) == 10
    assert small.values.tolist() == [1, 1, 1, 1, 1, -7, 1, 1, 1, 1]
    assert small.steps[0] == np.arange(100).mean()


def test_what_a_resumed_run_left_behind_is_not_shown() -> None:
    rows = [{"step": s, "x": i} for i, s in enumerate([10, 20, 30, 20, 30, 40])]
    assert [row["x"] for row in curves.still_true(rows)] == [0, 3, 4, 5]
    rows.append({"step": 40, "eval_mean": 1})  # the evaluation at the end of a run
    assert [row.get("x") for row in curves.still_true(rows)] == [0, 3, 4, 5, None]


def test_values_that_are_none_or_not_finite_are_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "x": None},
        {"step": 2, "x": 3.0},
        {"step": 3, "x": float("nan")},
        {"y": 1},
    ]
    assert curves.curve(rows, "step", "x") == (np.array([2.0]), np.array([3.0]))


def test_an_evaluation_that_is_repeated_in_later_rows_is_one_point() -> None:
    rows = [{"step": s, "eval_step": 20 if s > 20 else None, "eval_mean": 9.0} for s in (10, 20, 30, 40)]
    (c,) = Group("", [run(rows)]).curves("eval_mean", over="eval_step")
    assert c == (np.array([20.0]), np.array([9.0]))


def test_shares_are_means_over_the_runs() -> None:
    runs = [run([{"step": s, "time/env": share} for s in (0, 100)]) for share in (0.2, 0.4)]
    steps, parts = curves.shares(Group("", runs), ["time/env", "time/actor"])
    assert (steps[0], steps[-1]) == (0, 100)
    assert list(parts) == ["time/env"]
    np.testing.assert_allclose(parts["time/env"], 0.3)


def test_lag_between_its_extremes() -> None:
    rows = [{"step": s, "lag/min": 0, "lag/mean": 1.5, "lag/max": 2 + s} for s in (0, 1)]
    band = curves.extremes(Group("", [run(rows), run(rows)]), "lag/min", "lag/mean", "lag/max")
    assert band is not None
    assert (band.low[0], band.mean[0], band.high[0], band.high[-1]) == (0, 1.5, 2, 3)
    assert curves.extremes(Group("", [run([])]), "lag/min", "lag/mean", "lag/max") is None


def folder(root: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    made = RunFolder.create(TrainConfig(runs=str(root), **settings).resolved(1))
    for row in rows:
        made.append_metrics(row)
    return made.path


def full_row(step: int) -> dict[str, Any]:
    time = dict.fromkeys(("env", "actor", "write", "reset", "wait", "gather", "train", "publish", "wait_learner"), 0.1)
    return {
        "step": step,
        "return_100": 1.0 * step,
        "return_update": 2.0 * step,
        "eval_step": 20,
        "eval_mean": 5.0,
        "lag/min": 0,
        "lag/mean": 1.0,
        "lag/max": 3,
        **{f"time/{key}": x for key, x in time.items()},
    }


#: How many panels there must be, for the rows of one run.
ROWS = {
    "all": ([full_row(s) for s in range(10, 50, 10)], 4),
    "returns only": ([{"step": s, "return_update": 1.0} for s in (10, 20)], 1),
    "of an older run": ([{"step": s, "return_100": 1.0, "time/env": 0.5, "time/learn": 0.2} for s in (10, 20)], 3),
    "one update": ([full_row(10)], 1),
    "no episode yet": ([{"step": s, "return_update": None, "time/env": 0.5} for s in (5_000, 10_000)], 2),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_panel_for_all_that_is_known(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    rows, n_panels = ROWS[name]
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    target = tmp_path / "new" / "a.png"
    plot_runs([folder(tmp_path, rows, seed=1, stop_at_return=3.0)], [target])
    assert target.read_bytes().startswith(PNG)
    assert len(figures[0].axes) == n_panels
    first = figures[0].axes[0]
    assert first.get_title() == ""
    assert figures[0].get_suptitle() == "CartPole-v1, ppo, seed 1"
    assert "goal: 3" in [text.get_text() for text in first.get_legend().get_texts()]  # type: ignore[union-attr]
    assert first.get_xlim()[1] >= rows[-1]["step"]
    for axes in figures[0].axes:
        legend = axes.get_legend()
        assert legend is not None
        window, data = legend.get_window_extent(), axes.get_window_extent()
        assert window.x0 >= data.x1, "the legend is on the data"
        assert window.x1 <= figures[0].bbox.x1 + 2, "the legend is cut off"


def test_several_groups_in_one_figure(tmp_path: Path) -> None:
    rows = ROWS["all"][0]
    runs = [folder(tmp_path, rows, seed=s, algo=algo) for algo in ("ppo", "a2c") for s in (1, 2)]
    older = folder(tmp_path, ROWS["of an older run"][0], algo="impala")
    targets = [tmp_path / "a.png", tmp_path / "a.svg"]
    plot_runs([*runs, older], targets)
    assert targets[0].read_bytes().startswith(PNG)
    assert "<svg" in targets[1].read_text()


def test_settings_of_other_versions_do_not_matter(tmp_path: Path) -> None:
    path = folder(tmp_path, ROWS["all"][0])
    (path / "config.json").write_text(json.dumps({"env": "E", "algo": "dqn", "seed": 4, "colour": "red"}))
    assert curves.title([curves.load(path)]) == "E, dqn, seed 4"


def test_a_run_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no metrics to plot"):
        plot_runs([folder(tmp_path, [])], [tmp_path / "a.png"])


def test_the_return_alone(tmp_path: Path) -> None:
    plot_return(ROWS["all"][0], "CartPole-v1, ppo", tmp_path / "return.png", 475.0)
    plot_return([], "CartPole-v1, ppo", tmp_path / "empty.png")
    assert (tmp_path / "return.png").read_bytes().startswith(PNG)
