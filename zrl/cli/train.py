"""``zrl train`` and ``zrl learner``."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import zrl
from zrl.cli.failures import EXIT_FAILED, EXIT_USAGE, Failure, failures, usage
from zrl.cli.keys import keys_option
from zrl.cli.options import config_options, settings_of
from zrl.cli.progress import Quiet, reporter
from zrl.config import TrainConfig
from zrl.errors import ConfigError, ProcessError
from zrl.train.allowed import foreign_modules
from zrl.train.listen import Listen
from zrl.train.ranks import rank_in
from zrl.train.run_folder import RunFolder

if TYPE_CHECKING:
    from zrl.train.loop import Result, Start

Command = Callable[..., None]


def run_options(command: Command) -> Command:
    """What both verbs have in common."""
    for add in (
        click.option("--require-goal", is_flag=True, help="exit with 1 if --stop-at-return was not reached"),
        click.option(
            "--resume",
            type=click.Path(path_type=Path),
            metavar="RUN",
            help="go on with this run, from its newest checkpoint",
        ),
        config_options,
    ):
        command = add(command)
    return command


@click.command("train")
@run_options
def train_command(**words: Any) -> None:
    """Train an actor in ENV, a Gymnasium id such as CartPole-v1, with worker processes on this machine.

    Settings come from options, then from the environment (ZRL_STEPS=500k), then from --config FILE.toml, then from the
    run that is resumed. The first Ctrl-C saves a checkpoint and stops, the second one kills.
    """
    _train(words)


@click.command("learner")
@run_options
@click.option(
    "--bind",
    default="tcp://127.0.0.1:5555",
    show_default=True,
    help="where workers connect to: tcp://127.0.0.1:PORT (and the next port), or ipc:///path/to.sock",
)
@keys_option("folder with the learner's keys and with those of who may connect; tcp is encrypted then")
@click.option("--expect-workers", type=click.IntRange(0), default=0, metavar="N", help="begin when N workers are there")
@click.option("--insecure", is_flag=True, help="--bind without keys where other machines can connect")
def learner_command(bind: str, keys: Path | None, expect_workers: int, insecure: bool, **words: Any) -> None:
    """Train an actor in ENV with the workers that `zrl worker` processes bring; prints how to start them.

    --workers says how many are expected. Settings come from where those of `zrl train` do.

    Several learners, one a GPU, train as one: torchrun --nproc-per-node=2 -m zrl learner ENV. Workers are started with
    the address of the first, and spread out over all.
    """
    _train(words, Listen(bind, keys, insecure, expect_workers))


def _train(words: dict[str, Any], listen: Listen | None = None) -> None:
    resume, require_goal = words.pop("resume"), words.pop("require_goal")
    with usage():
        rank = rank_in(os.environ)
        if rank is not None and listen is None:
            raise ConfigError(
                f"WORLD_SIZE={rank.size} says that there are several learners: zrl train is one process with its "
                "workers; use torchrun -m zrl learner with zrl worker, or unset WORLD_SIZE"
            )
        leads = rank is None or rank.leads  # whose config and run folder count
        resumed = None if resume is None or not leads else RunFolder.open(resume)
        config = settings_of(words, words.pop("sets"), words.pop("file"), resumed)
        if listen is not None and not config.workers:
            raise ConfigError("--workers: expected how many workers make a batch, at least 1, not 0")
    if require_goal and leads and config.stop_at_return is None:
        raise Failure("--require-goal needs --stop-at-return", EXIT_USAGE)
    if rank is not None:  # before torch is imported: it warns of what is meant to be, on standard error
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with failures() as signals, contextlib.ExitStack() as ended:
        if listen is None and config.workers:  # before torch is imported
            with contextlib.suppress(ProcessError):  # whoever starts the workers has the same trouble, and says so
                zrl.prestart()
            ended.callback(zrl.end_prestarted)
        from zrl.train.loop import train

        with reporter() if leads else Quiet() as report:

            def on_start(start: Start) -> None:
                report.start(start)
                if listen is not None and leads:
                    _print_how_to_connect(start, listen.keys)

            result = train(config, on_start, report.update, signals, listen, resumed, report.worker, rank)
        if leads:
            _print_result(result)
        if leads and config.eval_episodes and not result.outcome.startswith("SIG"):
            with signals.interruptible():
                _print_evaluation(result.run, config)
    if result.outcome.startswith("SIG"):
        if result.checkpoint is not None:
            verb = "train" if listen is None else "learner"
            click.echo(f"go on with: zrl {verb} --resume {shlex.quote(str(result.run.path))}")
        raise SystemExit(128 + signal.Signals[result.outcome])
    if require_goal and leads and result.outcome != "goal":
        raise Failure(f"the goal, a mean return of {config.stop_at_return:g}, was not reached", EXIT_FAILED)


def _print_how_to_connect(start: Start, keys: Path | None) -> None:
    config: TrainConfig = start.config
    words = [f"--import {module}" for module in foreign_modules(config.env, config.actor)]
    if config.env_kwargs:
        words.append(f"--env-kwargs {shlex.quote(json.dumps(dict(config.env_kwargs)))}")
    several = f", once or more for each of the {start.n_learners} learners" if start.n_learners > 1 else ""
    click.echo(f"start workers with{several}:")
    for url in getattr(start.rollout, "urls", []):
        with_keys = ["--keys DIR"] if keys is not None and url.startswith("tcp://") else []
        click.echo("  " + " ".join(["zrl worker --connect", url, *words, *with_keys, f"--count {config.workers}"]))


def _print_result(result: Result) -> None:
    status = result.status
    if status is None:
        saved = f"; the checkpoint is {result.checkpoint}" if result.checkpoint else "; nothing to save"
        click.echo(f"stopped before the first update{saved}")
        return
    mean = "fewer than 100 episodes" if status.return_100 is None else f"mean return {status.return_100:.1f}"
    how = {"goal": "goal reached", "steps": "all steps taken"}.get(result.outcome, f"stopped by {result.outcome}")
    click.echo(f"{how} ({mean} over the last 100 episodes)")
    click.echo(
        f"  took        {status.seconds:.1f} s for {status.step:,} steps: {status.step / status.seconds:,.0f} steps/s"
    )
    click.echo(f"  run folder  {result.run.path}")
    click.echo(f"  checkpoint  {result.checkpoint}")
    click.echo(f"  plot        {result.plot or 'none: ' + result.plot_problem}")


def _print_evaluation(run: RunFolder, config: TrainConfig) -> None:
    from zrl.cli.eval import print_evaluation

    print_evaluation(run, config.eval_episodes, 0)
