"""docs/states.md is what the tables of transitions say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_tables_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_states.py"), "--print"],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stdout == (ROOT / "docs" / "states.md").read_text(), "run scripts/make_states.py"
