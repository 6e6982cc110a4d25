"""``zrl eval``: which checkpoint it plays, what it prints, and its videos."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg  # type: ignore[import-untyped]
import numpy as np
import pytest
from click.testing import CliRunner, Result

from zrl.cli import main
from zrl.config import TrainConfig
from zrl.train import checkpoint
from zrl.train.evaluation import evaluate_run, split_run
from zrl.train.run_folder import RunFolder
from zrl.train.setup import make_actor


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def run_with_checkpoints(root: Path, *steps: int, env: str = "CartPole-v1") -> RunFolder:
    """A run folder as `zrl train` leaves it, with an untrained actor at each of `steps`."""
    config = TrainConfig(env=env, runs=str(root)).resolved(1)
    folder = RunFolder.create(config)
    for step in steps:
        checkpoint.save(folder.checkpoints, step, {"weights": make_actor(config).state_dict(), "step": step})
    return folder


def test_which_checkpoint_is_played(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path, 100, 200, 300)
    (folder.checkpoints / "best").symlink_to("step_000000000100.pt")
    (folder.checkpoints / "latest").unlink()
    (folder.checkpoints / "latest").symlink_to("step_000000000200.pt")
    for which, step in (("", 300), ("@best", 100), ("@latest", 200), ("@200", 200), ("@3_00", 300)):
        result = run(f"{folder.path}{which}", "--episodes", "1")
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[0] == f"  checkpoint  {folder.checkpoints / f'step_{step:012d}.pt'}"


@pytest.mark.parametrize(
    ("which", "code", "text"),
    [
        ("@best", 1, "there is no checkpoint best; there are: latest (step 200), 100, 200"),
        ("@300", 1, "there is no checkpoint 300; there are: latest (step 200), 100, 200"),
        ("@worst", 2, "expected best, latest or a step behind the @, not 'worst'; there are: latest (step 200), 100"),
    ],
)
def test_an_unknown_checkpoint(tmp_path: Path, which: str, code: int, text: str) -> None:
    result = run(f"{run_with_checkpoints(tmp_path, 100, 200).path}{which}")
    assert result.exit_code == code
    assert text in result.output


def test_a_torn_newest_checkpoint_is_passed_by(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path, 100, 200)
    (folder.checkpoints / "step_000000000200.pt").write_bytes(b"torn")
    assert "step_000000000100.pt" in run(folder.path, "--episodes", "1").output
    result = run(f"{folder.path}@200")
    assert result.exit_code == 1
    assert "cannot read the checkpoint" in result.output


def test_a_folder_with_an_at_sign(tmp_path: Path) -> None:
    (tmp_path / "a@best").mkdir()
    assert split_run(f"{tmp_path}/a@best") == (tmp_path / "a@best", "")
    assert split_run(f"{tmp_path}/a@best@7") == (tmp_path / "a@best", "7")


def test_json_says_what_the_lines_say(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path, 100)
    result = run(folder.path, "--episodes", "3", "--seed", "5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["returns"] == [float(n) for n in found["lengths"]]  # CartPole gives 1 a step
    assert (found["episodes"], found["seed"], found["cut"]) == (3, 5, 0)
    assert found["mean"] == sum(found["returns"]) / 3
    assert found["min"] == min(found["returns"])
    lines = run(folder.path, "--episodes", "3", "--seed", "5").output.splitlines()
    assert lines[-1] == (
        f"  greedy      3 episodes: mean return {found['mean']:.1f}, standard deviation {found['std']:.1f}, "
        f"minimum {found['min']:.1f}, none cut"
    )


def test_episodes_that_are_too_long_are_cut(tmp_path: Path) -> None:
    folder = run_with_checkpoints(tmp_path, 100, env="zrl.zoo:zrl/ChainMDP-v0")
    assert evaluate_run(folder, 2, seed=1).cut == 0
    result = evaluate_run(folder, 2, seed=1, longest=7)
    assert (result.cut, result.lengths) == (2, [7, 7])


@pytest.mark.parametrize("name", ["new/a.mp4", "a.gif"])
def test_the_first_episode_on_film(tmp_path: Path, name: str) -> None:
    folder = run_with_checkpoints(tmp_path, 100)
    target = tmp_path / "videos" / name
    result = run(folder.path, "--episodes", "2", "--seed", "3", "--video", target, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(target))
    assert frames == found["lengths"][0] + 1  # the first observation too
    assert seconds == pytest.approx(frames / 50, abs=0.03)  # as CartPole's metadata says
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert (
        found["returns"] == json.loads(run(folder.path, "--episodes", "2", "--seed", "3", "--json").output)["returns"]
    )


class Odd(gym.Env[Any, Any]):
    """Two steps, with pictures of an odd size, and stripes."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (Gymnasium's way)
    observation_space = gym.spaces.Discrete(3)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, channels: int = 3) -> None:
        self.render_mode, self.channels, self.at = render_mode, channels, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.at = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.at += 1
        return self.at, 1.0, self.at == 2, False, {}

    def render(self) -> Any:
        picture = np.zeros((33, 41, self.channels), np.uint8)
        picture[self.at :: 3] = 255
        return picture


@pytest.fixture
def odd() -> Iterator[None]:
    make: Any = Odd
    for name, kwargs in (("test/Odd-v0", {}), ("test/Grey-v0", {"channels": 1})):
        gym.register(name, entry_point=make, kwargs=kwargs, max_episode_steps=9)
    yield
    for name in ("test/Odd-v0", "test/Grey-v0"):
        del gym.registry[name]


@pytest.mark.usefixtures("odd")
def test_pictures_of_an_odd_size(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    result = run(run_with_checkpoints(tmp_path, 1, env="test/Odd-v0").path, "--episodes", "1", "--video", target)
    assert result.exit_code == 0, result.output
    assert imageio_ffmpeg.count_frames_and_secs(str(target))[0] == 3


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(
    ("env", "file", "code", "text"),
    [
        ("zrl.zoo:zrl/NarrowPath-v0", "a.mp4", 5, "has no render mode 'rgb_array', only ansi; play it without a video"),
        ("test/Grey-v0", "a.mp4", 5, "render() must return uint8 [H, W, 3], not uint8[33, 41, 1]"),
        ("test/Odd-v0", "a.avi", 2, "expected a file that ends with .mp4 or .gif, not"),
        ("test/Odd-v0", "/proc/a.mp4", 2, "video: cannot write '/proc/a.mp4'"),
    ],
)
def test_no_video(tmp_path: Path, env: str, file: str, code: int, text: str) -> None:
    result = run(run_with_checkpoints(tmp_path, 1, env=env).path, "--episodes", "1", "--video", tmp_path / file)
    assert result.exit_code == code, result.output
    assert text in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / file).exists()


@pytest.mark.parametrize(
    ("module", "text"), [("imageio_ffmpeg", "pip install 'zrl[video]'"), ("pygame", "gymnasium[classic-control]")]
)
def test_no_video_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str) -> None:
    folder = run_with_checkpoints(tmp_path, 1)
    monkeypatch.setitem(sys.modules, module, None)
    result = run(folder.path, "--episodes", "1", "--video", tmp_path / "a.mp4")
    assert result.exit_code == 5, result.output
    assert text in result.output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_playing(tmp_path: Path, signum: signal.Signals) -> None:
    folder = run_with_checkpoints(tmp_path, 1)
    code = (
        "from zrl.cli import main\n"
        "import zrl.train.evaluation as evaluation\n"
        "def forever(*args, **kwargs):\n"
        "    print('evaluating', flush=True)\n"
        "    while True: pass\n"
        "evaluation.evaluate = forever\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "eval", str(folder.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "evaluating\n"
        os.kill(process.pid, signum)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signum, output
    assert output == ""
