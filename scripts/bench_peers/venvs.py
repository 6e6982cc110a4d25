"""A virtual environment for each peer, made with ``python -m venv`` and pip, under one folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bench_peers.systems import REQUIREMENTS

ROOT = Path(__file__).parents[2]
STAMP = "bench-peers.txt"  # in an environment: what it was installed from


def python_of(venvs: Path, name: str) -> Path:
    """The interpreter of an environment; "" is the one that runs us."""
    return venvs / name / "bin" / "python" if name else Path(sys.executable)


def is_ready(venvs: Path, name: str) -> bool:
    if not name:
        return True
    stamp = venvs / name / STAMP
    return stamp.exists() and stamp.read_text() == _wanted(name)


def prepare(venvs: Path, name: str) -> str:
    """Make the environment, unless it is there and whole; "" or why that failed. It is tried again next time."""
    if is_ready(venvs, name):
        return ""
    folder = venvs / name
    print(f"installing {', '.join(REQUIREMENTS[name])} into {folder}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    if made.returncode:
        return _reason(made.stdout + made.stderr)
    constraints = folder / "constraints.txt"
    constraints.write_text(_torch() + "\n")
    pip = [str(python_of(venvs, name)), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-c", str(constraints), *REQUIREMENTS[name]], capture_output=True, text=True)
    (folder / "pip.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        return _reason(done.stderr)
    (folder / STAMP).write_text(_wanted(name))
    return ""


def _wanted(name: str) -> str:
    return "\n".join((_torch(), *REQUIREMENTS[name])) + "\n"


def _torch() -> str:
    """The one torch for all, of constraints.txt."""
    found = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[0]


def _reason(output: str) -> str:
    """The line of pip's that says what was wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith("note:")]
    return "it does not install: " + (errors or lines or ["pip said nothing"])[0][:200]
