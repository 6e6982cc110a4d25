"""Every Python block of the README and of the documentation runs, one after the other, in one namespace a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in p.read_text()]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        first_line = text[: match.start(1)].count("\n")
        code = compile("\n" * first_line + match.group(1), str(page), "exec")
        exec(code, namespace)


def test_there_are_pages_with_code() -> None:
    assert {"README", "semantics"} <= {p.stem for p in PAGES}
