"""The ``zrl`` command.

What needs torch is imported where a verb begins its work: help and completion must not take seconds.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import zrl
from zrl.cli.options import config_options
from zrl.cli.progress import reporter
from zrl.cli.watch import status_command, top_command
from zrl.cli.worker import worker_command
from zrl.config import TrainConfig
from zrl.errors import ConfigError, PreflightError, StarvationError, WorkerError, ZrlError
from zrl.train.allowed import foreign_modules
from zrl.train.run_folder import RunFolder
from zrl.train.stop import Stopped, StopSignals

if TYPE_CHECKING:
    from zrl.train.loop import Result
    from zrl.train.rollouts import Rollout

EXIT_FAILED, EXIT_USAGE, EXIT_NO_WORKERS, EXIT_PREFLIGHT = 1, 2, 4, 5


class Failure(click.ClickException):
    """An error that ends the command: one message, one exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(zrl.__version__, package_name="zrl")
def main() -> None:
    """Collect reinforcement learning rollouts, and train with them.

    Exit codes: 0 done, 1 failed, 2 usage, 3 no learner, 4 too few workers left, 5 environment, actor or
    machine refused before the first step, 130 or 143 stopped by SIGINT or SIGTERM; a checkpoint is saved, if there was
    an update.
    """


Command = Callable[..., None]


def run_options(command: Command) -> Command:
    """What `zrl train` and `zrl learner` have in common."""
    for add in (
        click.option("--require-goal", is_flag=True, help="exit with 1 if --stop-at-return was not reached"),
        click.option(
            "--eval-episodes", type=click.IntRange(0), default=20, show_default=True, help="greedy episodes at the end"
        ),
        config_options(TrainConfig, skip=("env",)),
        click.argument("env"),
    ):
        command = add(command)
    return command


@main.command("train")
@run_options
def train_command(**options: Any) -> None:
    """Train an actor in ENV, a Gymnasium id such as CartPole-v1, with worker processes on this machine.

    The first Ctrl-C saves a checkpoint and stops, the second one kills.
    """
    _train(**options)


@main.command("learner")
@run_options
@click.option(
    "--bind",
    default="tcp://127.0.0.1:5555",
    show_default=True,
    help="where workers connect to: tcp://127.0.0.1:PORT (and the next port), or ipc:///path/to.sock",
)
def learner_command(bind: str, **options: Any) -> None:
    """Train an actor in ENV with the workers that `zrl worker` processes bring; prints how to start them.

    --workers says how many are expected: each makes one fragment of a batch.
    """
    _train(listen=bind, **options)


def _train(env: str, eval_episodes: int, require_goal: bool, listen: str = "", **settings: Any) -> None:
    try:
        config = TrainConfig(env=env, **{name: x for name, x in settings.items() if x is not None})
        if listen and not config.workers:
            raise ConfigError("--workers: expected how many workers make a batch, at least 1, not 0")
    except ConfigError as e:
        raise Failure(str(e), EXIT_USAGE) from e
    if require_goal and config.stop_at_return is None:
        raise Failure("--require-goal needs --stop-at-return", EXIT_USAGE)
    from zrl.train.loop import train

    with _failures() as signals:
        with reporter(config.steps) as report:
            result = train(
                config,
                report.start,
                report.update,
                signals,
                listen,
                lambda rollout: _print_how_to_connect(config, rollout),
            )
        _print_result(result)
        if eval_episodes and not result.outcome.startswith("SIG"):
            with signals.interruptible():
                _print_evaluation(result.run, eval_episodes)
    if result.outcome.startswith("SIG"):
        raise SystemExit(128 + signal.Signals[result.outcome])
    if require_goal and result.outcome != "goal":
        raise Failure(f"the goal, a mean return of {config.stop_at_return:g}, was not reached", EXIT_FAILED)


def _print_how_to_connect(config: TrainConfig, rollout: Rollout) -> None:
    imports = "".join(f" --import {module}" for module in foreign_modules(config.env, config.actor))
    click.echo("start workers with:")
    for url in getattr(rollout, "urls", []):
        click.echo(f"  zrl worker --connect {url}{imports} --count {config.workers}")


@contextlib.contextmanager
def _failures() -> Iterator[StopSignals]:
    """What ends a verb, as a message and an exit code."""
    try:
        with StopSignals() as signals:
            yield signals
    except Stopped as e:
        raise SystemExit(128 + e.signum) from e
    except PreflightError as e:
        raise Failure(str(e), EXIT_PREFLIGHT) from e
    except ConfigError as e:
        raise Failure(str(e), EXIT_USAGE) from e
    except (WorkerError, StarvationError) as e:
        raise Failure(str(e), EXIT_NO_WORKERS) from e
    except ZrlError as e:
        raise Failure(str(e), EXIT_FAILED) from e


def _print_result(result: Result) -> None:
    status = result.status
    if status is None:
        click.echo("stopped before the first update; nothing to save")
        return
    mean = "fewer than 100 episodes" if status.return_100 is None else f"mean return {status.return_100:.1f}"
    how = {"goal": "goal reached", "steps": "all steps taken"}.get(result.outcome, f"stopped by {result.outcome}")
    click.echo(f"{how} ({mean} over the last 100 episodes)")
    click.echo(f"  took        {status.seconds:.1f} s for {status.step:,} steps: {status.steps_per_s:,.0f} steps/s")
    click.echo(f"  run folder  {result.run.path}")
    click.echo(f"  checkpoint  {result.checkpoint}")
    click.echo(f"  plot        {result.plot or 'none: ' + result.plot_problem}")


def _print_evaluation(run: RunFolder, episodes: int, seed: int = 0) -> None:
    from zrl.train.evaluation import evaluate_run

    _, returns = evaluate_run(run, episodes, seed=seed)
    click.echo(
        f"  greedy      {episodes} episodes: mean return {statistics.fmean(returns):.1f}, minimum {min(returns):.1f}"
    )


@main.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--episodes", type=click.IntRange(1), default=20, show_default=True, help="episodes to play")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="of the first episode")
def eval_command(run: Path, episodes: int, seed: int) -> None:
    """Play the newest checkpoint of the run folder RUN greedily, and print mean and minimum of the returns."""
    with _failures() as signals, signals.interruptible():
        _print_evaluation(RunFolder.open(run), episodes, seed)


for verb in (worker_command, status_command, top_command):
    main.add_command(verb)
