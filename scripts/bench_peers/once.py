"""One measurement: a fresh process with the interpreter of its system, and what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench_peers import venvs
from bench_peers.systems import SYSTEMS


class Settings(NamedTuple):
    """How long each measurement takes, and where the environments are."""

    seconds: float
    warm_up: float
    limit: float
    venvs: Path


def measure(system: str, work: str, seed: int, settings: Settings) -> dict[str, Any]:
    """``{"value": …, "total_s": …, …}``, or ``{"error": why}``."""
    venv = SYSTEMS[system].venv
    words = [str(venvs.python_of(settings.venvs, venv)), "-W", "ignore", "-m", "bench_peers.measure", system, work]
    words += ["--seconds", str(settings.seconds), "--warm-up", str(settings.warm_up), "--seed", str(seed)]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        (Path(folder) / "stderr").open("w+", errors="replace") as errors,
    ):
        started = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            cwd=folder,
            env=_environment(venv),
            start_new_session=True,  # its group is ended with it: some peers leave processes behind
        )
        try:
            result = _result(process, started, settings.limit)
        finally:
            _end(process)
        if result is not None:
            return result
        errors.seek(0)
        return {"error": _reason(errors.read(), time.perf_counter() - started, settings.limit)}


def _environment(venv: str) -> dict[str, str]:
    scripts = str(Path(__file__).parents[1])
    path = [scripts, os.environ["PYTHONPATH"]] if not venv and "PYTHONPATH" in os.environ else [scripts]
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return {**os.environ, **one, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _result(process: subprocess.Popen[str], started: float, limit: float) -> dict[str, Any] | None:
    """The JSON object among its lines, with the seconds from the start of the process to that line, or to the goal."""
    timer = threading.Timer(limit, _end, [process])
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"value"'):
                result: dict[str, Any] = json.loads(line)
                return {**result, "total_s": time.perf_counter() - started - result.get("after_s", 0.0)}
        return None
    finally:
        timer.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(stderr: str, seconds: float, limit: float) -> str:
    if seconds >= limit:
        return f"it had no result after {limit:.0f} s"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return "it does not run: " + (errors or lines or ["it said nothing"])[-1][:200]
