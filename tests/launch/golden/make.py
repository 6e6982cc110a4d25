"""The rendered files that are committed beside this one, and the command lines that make them.

``python tests/launch/golden/make.py`` writes them anew, after a change that is meant; ``git diff`` shows what it did.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from click.testing import CliRunner

from zrl.cli import main

FOLDER = Path(__file__).parent

CASES = MappingProxyType(
    {
        "small.sh": ["slurm", "--keys", "keys", "--", "CartPole-v1", "--algo", "a2c"],
        "all.sh": [
            *("slurm", "--keys", "/shared/my keys", "--hosts", "4", "--workers-per-host", "16", "--port", "6000"),
            *("--import", "my_envs", "--job-name", "maze", "--partition", "gpu", "--host-partition", "cpu,old"),
            *("--account", "lab", "--time", "1-12:00:00", "--cpus", "8", "--gpus", "a100:1", "--activate", "/opt/venv"),
            *("--", "my_envs:Maze-v0", "--env-kwargs", '{"name": "it\'s $(x)"}', "--actor", "my_pkg.nets:make"),
            *("--algo", "impala", "--envs", "128", "--runs", "/shared/runs"),
        ],
        "small.yaml": ["k8s", "--image", "registry/zrl:1", "--keys", "keys", "--", "CartPole-v1", "--algo", "a2c"],
        "all.yaml": [
            *("k8s", "--image", "registry/zrl:1", "--keys", "/home/me/my keys", "--hosts", "4", "--port", "6000"),
            *("--workers-per-host", "16", "--import", "my_envs", "--name", "maze", "--namespace", "rl", "--cpus", "8"),
            *("--memory", "32Gi", "--gpus", "1", "--host-memory", "16Gi", "--shm", "2Gi", "--claim", "runs"),
            *("--user", "2000", "--", "my_envs:Maze-v0", "--env-kwargs", '{"name": "it\'s $(x)"}'),
            *("--actor", "my_pkg.nets:make", "--algo", "impala", "--envs", "128"),
        ],
    }
)


def rendered(words: list[str]) -> str:
    """What `zrl launch` prints for these words."""
    result = CliRunner().invoke(main, ["launch", *words])
    assert result.exit_code == 0, result.output
    return result.output


if __name__ == "__main__":
    for name, words in CASES.items():
        (FOLDER / name).write_text(rendered(words))
        print(FOLDER / name)
