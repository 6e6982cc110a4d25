"""The notebook runs and its actor learns; and its file has what came out when it ran, and nothing of the machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "cartpole.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def texts(cell: dict[str, Any]) -> list[str]:
    """What a cell shows, but for its pictures."""
    return ["".join(x.get("text", x.get("data", {}).get("text/plain", ""))) for x in cell["outputs"]]


@pytest.mark.timeout(300)
def test_it_runs_with_small_numbers_and_learns() -> None:
    """That the actor has learnt is asserted in the notebook: a cell that raises is a failure of the script."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "run_notebook.py"), "--small", "--timeout", "200"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert any("\nassert last > untrained" in source(cell) for cell in CODE)
    assert done.stdout == f"{len(CODE)} cells executed\n"


def test_the_file_has_the_outputs_of_one_run_from_the_first_cell_to_the_last() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    silent = [
        cell["id"] for cell in CODE if re.search(r"\b(print|subplots|tqdm)\(", source(cell)) and not cell["outputs"]
    ]
    assert not silent


def test_no_cell_raised_or_warned() -> None:
    assert not [x for cell in CODE for x in cell["outputs"] if x["output_type"] == "error"]
    assert not [text for cell in CODE for text in texts(cell) if re.search("traceback|warn|error", text, re.IGNORECASE)]
    complaints = ["".join(x["text"]) for cell in CODE for x in cell["outputs"] if x.get("name") == "stderr"]
    assert all(re.fullmatch(r"\s*\d+%\|.*\n?", text) for text in complaints), "only the progress of the training"


def test_it_shows_pictures() -> None:
    kinds = [kind for cell in CODE for x in cell["outputs"] for kind in x.get("data", {})]
    assert kinds.count("image/png") >= 3


def test_it_is_small_and_names_no_folder_of_a_machine() -> None:
    assert NOTEBOOK.stat().st_size < 2_000_000
    shown = [text for cell in CODE for text in texts(cell)] + [source(cell) for cell in CELLS]
    assert not [text for text in shown if re.search(r"/(work|tmp|home|root)\b", text)]


def test_its_links_lead_somewhere() -> None:
    prose = [source(cell) for cell in CELLS if cell["cell_type"] == "markdown"]
    links = [link for text in prose for link in re.findall(r"\]\(([^)#]+)", text)]
    local = [link for link in links if not link.startswith("https://")]
    assert local
    assert not [link for link in local if not (NOTEBOOK.parent / link).exists()]
