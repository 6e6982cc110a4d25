"""The ``zrl`` command.

What needs torch is imported where a verb begins its work: help and completion must not take seconds.
"""

from __future__ import annotations

import importlib.metadata
import platform
import signal
from typing import Any

import click

import zrl
from zrl.cli.check import check_command
from zrl.cli.eval import eval_command
from zrl.cli.keys import keys_command
from zrl.cli.launch import launch_command
from zrl.cli.plot import plot_command
from zrl.cli.train import learner_command, train_command
from zrl.cli.watch import status_command, top_command
from zrl.cli.worker import worker_command

VERSIONS = ("torch", "gymnasium", "numpy", "pyzmq", "msgpack", "uvloop")


def _print_versions(context: click.Context, option: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    click.echo(f"zrl {zrl.__version__}")
    click.echo(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in VERSIONS:
        click.echo(f"{name} {importlib.metadata.version(name)}")
    context.exit()


class _Verbs(click.Group):
    """Ctrl-C outside of where a verb looks out for it ends it with the status of a SIGINT, not that of a failure."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions, help="versions, and exit"
)
def main() -> None:
    """Collect reinforcement learning rollouts, and train with them.

    Exit codes: 0 done, 1 failed, 2 usage, 3 no learner there, 4 too few workers left, 5 environment, actor or machine
    refused before the first step, 130 or 143 stopped by SIGINT or SIGTERM; a checkpoint is saved, if there was an
    update.
    """


for _command in (
    *(train_command, eval_command, plot_command, check_command),
    *(learner_command, worker_command, status_command, top_command, keys_command, launch_command),
):
    main.add_command(_command)
