"""What must not take seconds does not import torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import zrl; zrl.ConfigError",
        "from zrl.cli import main; main(['--help'], standalone_mode=False)",
        "from zrl.cli import main; main(['train', '--help'], standalone_mode=False)",
        "import zrl.nodes.supervisor, zrl.train.allowed",  # what keeps the workers of a machine
    ],
)
def test_without_torch(code: str) -> None:
    assert not {"torch", "gymnasium"} & modules_after(code)


def test_names_come_on_demand() -> None:
    assert "torch" in modules_after("import zrl; zrl.Batch")
    import zrl

    assert set(dir(zrl)) >= set(zrl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Bach'"):
        zrl.Bach  # noqa: B018


@pytest.mark.parametrize(
    ("words", "expected"), [("zrl tr", "train"), ("zrl train --max", "--max-lag"), ("zrl train x --algo im", "impala")]
)
def test_completion(words: str, expected: str) -> None:
    environment = {
        **os.environ,
        "_ZRL_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = "from zrl.cli import main; main(prog_name='zrl')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert f"plain,{expected}" in done.stdout.splitlines()


def test_versions() -> None:
    done = subprocess.run([sys.executable, "-m", "zrl", "--version"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["zrl", "python", "torch", "gymnasium", "numpy", "pyzmq", "msgpack", "uvloop"]
