"""``zrl eval``: plays what a run has learnt."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zrl.cli.failures import failures
from zrl.train.run_folder import RunFolder

if TYPE_CHECKING:
    from zrl.train.evaluation import Evaluation


@click.command("eval")
@click.argument("run", metavar="RUN[@WHICH]")
@click.option("--episodes", type=click.IntRange(1), default=20, show_default=True, help="episodes to play")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="of the first episode")
@click.option(
    "--video", type=click.Path(path_type=Path), default=None, metavar="FILE", help="film the first: an .mp4 or .gif"
)
@click.option("--json", "as_json", is_flag=True, help="print one object, with every return and length")
def eval_command(run: str, episodes: int, seed: int, video: Path | None, as_json: bool) -> None:
    """Play a checkpoint of the run folder RUN greedily, and print what came of it.

    RUN@best is the one that did best during training, RUN@latest the last one, RUN@100352 the one of that step. RUN
    alone is the newest that can be read.
    """
    if video is not None:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures need no screen, and SDL complains if there is none
    from zrl.train.evaluation import evaluate_run, split_run

    with failures() as signals, signals.interruptible():
        path, which = split_run(run)
        result = evaluate_run(RunFolder.open(path), episodes, which, seed=seed, video=video)
    if as_json:
        click.echo(json.dumps(_as_dict(result, path, seed, video)))
        return
    click.echo(f"  checkpoint  {result.checkpoint}")
    if video is not None:
        click.echo(f"  video       {video}")
    click.echo(_summary(result))


def print_evaluation(run: RunFolder, episodes: int, seed: int = 0) -> None:
    """Play the newest checkpoint of a run, and print one line.

    Raises:
        ZrlError: as `zrl.train.evaluation.evaluate_run`.
    """
    from zrl.train.evaluation import evaluate_run

    click.echo(_summary(evaluate_run(run, episodes, seed=seed)))


def _summary(result: Evaluation) -> str:
    n = len(result.returns)
    cut = f"{result.cut} cut at {max(result.lengths):,} steps" if result.cut else "none cut"
    return (
        f"  greedy      {n} episode{'s' * (n > 1)}: mean return {result.mean:.1f}, standard deviation "
        f"{result.std:.1f}, minimum {min(result.returns):.1f}, {cut}"
    )


def _as_dict(result: Evaluation, run: Path, seed: int, video: Path | None) -> dict[str, object]:
    return {
        "run": str(run),
        "checkpoint": str(result.checkpoint),
        "episodes": len(result.returns),
        "seed": seed,
        "mean": result.mean,
        "std": result.std,
        "min": min(result.returns),
        "max": max(result.returns),
        "cut": result.cut,
        "returns": result.returns,
        "lengths": result.lengths,
        "video": None if video is None else str(video),
    }
