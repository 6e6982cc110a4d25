"""Every test that the page of failures names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "failures.md").read_text())))


def test_it_names_some() -> None:
    assert len(NAMED) > 40


@pytest.mark.parametrize(("file", "name"), NAMED, ids=["::".join(x) for x in NAMED])
def test_a_named_test_is_there(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    assert not name or f"\ndef {name}(" in text
