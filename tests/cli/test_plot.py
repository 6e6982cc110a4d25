"""``zrl plot``: which files it writes, and what it says when it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from zrl.cli import main
from zrl.config import TrainConfig
from zrl.train.run_folder import RunFolder


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["plot", *map(str, words)])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two run folders of two updates each."""
    made = [RunFolder.create(TrainConfig(runs=str(tmp_path / "runs"), seed=s).resolved(s)) for s in (1, 2)]
    for folder in made:
        for step in (10, 20):
            folder.append_metrics({"step": step, "return_100": 1.0 * step, "return_update": 1.0})
    return [folder.path for folder in made]


def test_one_run_is_drawn_into_its_folder(runs: list[Path]) -> None:
    result = run(runs[0])
    assert result.exit_code == 0, result.output
    assert result.output == f"{runs[0] / 'plots' / 'overview.png'}\n"
    assert (runs[0] / "plots" / "overview.png").stat().st_size


def test_several_runs_are_drawn_into_the_current_folder(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*runs)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "zrl-plot.png").exists()


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["--out", "new"], {"new/zrl-plot.png"}),
        (["--out", "new", "--svg"], {"new/zrl-plot.png", "new/zrl-plot.svg"}),
        (["--out", "a.svg"], {"a.svg"}),
        (["--out", "a.svg", "--svg"], {"a.svg"}),
        (["--out", "new/a.png", "--svg"], {"new/a.png", "new/a.svg"}),
    ],
)
def test_out(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], files: set[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = run(runs[0], *words)
    assert result.exit_code == 0, result.output
    assert {str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Missing argument 'RUN...'"),
        (["/nowhere"], "'/nowhere' is no run folder"),
        (["RUN", "--out", "a.jpg"], "--out: expected a folder or a file that ends with .png or .svg, not 'a.jpg'"),
        (["RUN", "--out", "/proc/nowhere/a.png"], "out: cannot write '/proc/nowhere/a.png'"),
        (["EMPTY"], "has no metrics to plot"),
    ],
)
def test_what_cannot_be_drawn(runs: list[Path], tmp_path: Path, words: list[str], text: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    paths = {"RUN": str(runs[0]), "EMPTY": str(tmp_path / "empty")}
    result = run(*(paths.get(word, word) for word in words))
    assert result.exit_code == 2
    assert text in result.output
    assert "Traceback" not in result.output


def test_without_matplotlib(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(runs[0])
    assert result.exit_code == 5
    assert "pip install 'zrl[plot]'" in result.output
