"""``zrl worker``: keeps workers for a learner that runs elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import socket
from pathlib import Path

import click

from zrl.cli.keys import host_keys_in, keys_option
from zrl.config import value_of
from zrl.errors import ConfigError, ZrlError
from zrl.net.addresses import check_connect, is_loopback
from zrl.nodes.limits import cores_to_pin_to
from zrl.nodes.supervisor import EXIT_FAILED, SupervisorOptions, supervise
from zrl.train.allowed import Allowed

EXIT_USAGE = 2
MOST_NAME = 64  # bytes


@click.command("worker")
@click.option("--connect", "url", required=True, metavar="URL", help="the learner's address")
@click.option("--count", type=click.IntRange(1, 4096), default=1, show_default=True, help="worker processes to keep")
@click.option(
    "--id", "name", default=None,
    help="name of this host: one that comes back under it gets its seeds again  [default: a new one]",
)  # fmt: skip
@click.option(
    "--import",
    "modules",
    multiple=True,
    metavar="MODULE",
    help="module whose environments and actors the learner may name; repeatable. It is imported here",
)
@click.option(
    "--env-kwargs", default=None, metavar="JSON", help="arguments of the environment, if the learner's has some"
)
@click.option(
    "--give-up-after", type=click.FloatRange(0, min_open=True), default=None, metavar="S",
    help="exit with 3 after so many seconds without a learner  [default: never]",
)  # fmt: skip
@click.option(
    "--drain-timeout", type=click.FloatRange(0), default=20.0, show_default=True, metavar="S",
    help="seconds after SIGTERM in which workers may finish the fragments that they have in hand",
)  # fmt: skip
@click.option("--logs", type=click.Path(path_type=Path), default=None, help="folder of the workers' output")
@keys_option("folder with this host's keys, for a learner that has some")
@click.option(
    "--no-shm",
    is_flag=True,
    help="send fragments, also to a learner on this machine that could read the workers' memory",
)
@click.option("--affinity", is_flag=True, help="keep each worker on one core, of those that this process may use")
@click.option("--insecure", is_flag=True, help="connect without keys to another machine")
@click.option("--start-method", type=click.Choice(["fork", "spawn"]), default="fork", show_default=True)
def worker_command(
    url: str,
    count: int,
    name: str | None,
    modules: tuple[str, ...],
    env_kwargs: str | None,
    give_up_after: float | None,
    drain_timeout: float,
    logs: Path | None,
    keys: Path | None,
    no_shm: bool,
    affinity: bool,
    insecure: bool,
    start_method: str,
) -> None:
    """Step environments for the learner at URL, in COUNT processes, until it has no more use for them.

    Workers that die are replaced. A learner that is not there yet, or gone, is waited for.
    """
    for module in modules:
        if not _exists(module):
            raise _failure(f"--import: no module {module!r} can be found here", EXIT_USAGE)
    if name is not None and not 0 < len(name.encode()) <= MOST_NAME:
        raise _failure(f"--id: expected 1 to {MOST_NAME} bytes, not {len(name.encode())}", EXIT_USAGE)
    try:
        kwargs = None if env_kwargs is None else value_of("env_kwargs", env_kwargs, "--env-kwargs")
        pair = host_keys_in(keys)
        if pair is None:
            _check_plain(url, insecure)
    except ConfigError as e:
        raise _failure(str(e), EXIT_USAGE) from e
    try:
        cores = cores_to_pin_to(affinity)
    except ConfigError as e:
        raise _failure(f"--{e}", EXIT_USAGE) from e
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = SupervisorOptions(
        url=url,
        name=name or new_name(),
        count=count,
        target="zrl.train.named:work",
        payload=Allowed(modules, kwargs),
        log_dir=logs,
        preload=("zrl.train.named", *modules),
        start_method=start_method,
        give_up_after=give_up_after,
        keys=pair,
        cores=cores,
        shm=not no_shm,
        drain_timeout=drain_timeout,
        insecure=insecure,
    )
    try:
        code = supervise(options, click.echo)
    except ConfigError as e:
        raise _failure(str(e), EXIT_USAGE) from e
    except ZrlError as e:
        raise _failure(str(e), EXIT_FAILED) from e
    raise SystemExit(code)


def new_name() -> str:
    """One for this host, that no other has: containers of one image may share a machine's name, and pids."""
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"


def _check_plain(url: str, insecure: bool) -> None:
    """Raise a `ConfigError` where others could read along, unless that is what was asked for."""
    check_connect(url)
    if is_loopback(url):
        return
    if not insecure:
        raise ConfigError(
            f"--connect: {url} is not on this machine, and nothing would be encrypted: that needs --keys DIR (see zrl "
            "keys), or --insecure to go without"
        )
    click.echo(f"--insecure: whoever is between here and {url} can read and change what is sent", err=True)


def _exists(module: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(module) is not None
    return False


def _failure(message: str, code: int) -> click.ClickException:
    failure = click.ClickException(message)
    failure.exit_code = code  # type: ignore[misc]
    return failure
