"""``zrl keys``: who may connect to a learner over the network, and ``--keys`` for the verbs that do."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zrl.cli.failures import EXIT_USAGE, Failure, usage
from zrl.errors import ConfigError

if TYPE_CHECKING:
    from zrl.net.keys import HostKeys

Command = Callable[..., Any]


def keys_option(text: str) -> Callable[[Command], Command]:
    """``--keys DIR``, with this help."""
    return click.option("--keys", type=click.Path(path_type=Path), default=None, metavar="DIR", help=text)


def host_keys_in(folder: Path | None) -> HostKeys | None:
    """What `--keys` of a verb that connects says; raises `ConfigError`."""
    if folder is None:
        return None
    from zrl.net.keys import host_keys

    return host_keys(folder)


_folder = click.option(
    "--keys", "folder", type=click.Path(path_type=Path), required=True, metavar="DIR", help="folder of the keys"
)


@click.group("keys")
def keys_command() -> None:
    """Make keys, and say whose may connect. A learner with --keys encrypts what goes over tcp.

    \b
    on the learner's machine   zrl keys new --server --keys A
    on a worker's machine      zrl keys new one --keys B             prints its public key
                               zrl keys authorize server 'PUBLIC KEY OF THE LEARNER' --keys B
    on the learner's machine   zrl keys authorize one 'PUBLIC KEY OF one' --keys A
    """


@keys_command.command("new")
@click.argument("name", required=False)
@click.option("--server", is_flag=True, help="the learner's pair")
@_folder
def new_command(name: str | None, server: bool, folder: Path) -> None:
    """Make the key pair of host NAME, by default the machine's name, or of the learner; print the public key."""
    if server and name is not None:
        raise Failure("NAME: the learner's pair has none; leave it out, or --server", EXIT_USAGE)
    from zrl.net.keys import SERVER, check_name, new_pair

    with usage():
        if name is not None:
            check_name(name)
        chosen = SERVER if server else name or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
        public = new_pair(folder, chosen)
    click.echo(f"made {folder / chosen}.secret, which stays here, and {folder / chosen}.public:")
    click.echo(public)
    who, where = ("server", "every worker's machine") if server else (chosen, "the learner's machine")
    click.echo(f"on {where}: zrl keys authorize {who} '{public}' --keys DIR")


@keys_command.command("authorize")
@click.argument("name")
@click.argument("public", metavar="PUBLIC|FILE")
@_folder
def authorize_command(name: str, public: str, folder: Path) -> None:
    """Let the host or observer NAME in, whose public key is PUBLIC, or in FILE. A run that goes on heeds it, too.

    With the NAME `server`, on a worker's or observer's machine: PUBLIC is the key of the learner to trust.
    """
    from zrl.net.keys import authorize, read_public

    with usage():
        file = Path(public)
        if file.is_file() and file.suffix == ".secret":  # it looks like a public key, and would be shown as one
            raise ConfigError(f"{file}: that is a secret; its public key is in {file.with_suffix('.public').name}")
        key = read_public(file).decode() if file.is_file() else public
        authorize(folder, name, key)
    click.echo(f"{name} is authorized in {folder}" if name != "server" else f"{folder}: this learner is trusted")


@keys_command.command("revoke")
@click.argument("name")
@_folder
def revoke_command(name: str, folder: Path) -> None:
    """Let NAME in no longer, with its present key. A run that goes on heeds it, too."""
    from zrl.net.keys import revoke

    with usage():
        public = revoke(folder, name)
    click.echo(f"revoked {name}: {public}")


@keys_command.command("list")
@_folder
def list_command(folder: Path) -> None:
    """Print the public keys in the folder: own, learner, authorized, revoked."""
    from zrl.net.keys import entries

    with usage():
        found = entries(folder)
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        click.echo(f"{entry.state:10}  {entry.name:{width}}  {entry.public}")
