"""Options made from the config dataclass, and the settings that come of them and of all other sources."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from zrl.config import (
    ALGORITHMS,
    TrainConfig,
    from_environment,
    from_toml,
    kind_of,
    layered,
    misspelt,
    name_of,
    whole_number,
)
from zrl.errors import ConfigError
from zrl.train.run_folder import RunFolder

Command = Callable[..., Any]

#: A resumed run is still the same run: these it keeps.
KEPT = ("env", "env_kwargs", "algo", "actor", "seed")


class Count(click.ParamType[Any]):
    """A whole number, with k or M for thousands or millions: ``500k``, ``1.5M``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return whole_number(str(value))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a whole number such as 500000, 500k or 1.5M", param, ctx)


def config_options(command: Command) -> Command:
    """A decorator that adds ENV and one option a setting; those not given are None."""
    for field in reversed(dataclasses.fields(TrainConfig)):
        if field.name == "env":
            continue
        default = "" if field.default is None else f"  [default: {_shown(field.default)}]"
        name = name_of(field).replace("_", "-")
        command = click.option(
            f"--{name}/--no-{name}" if field.type == "bool" else f"--{name}",
            field.name,
            type=_type_of(field.name),
            default=None,
            help=field.metadata["help"] + default,
        )(command)
    for option in (
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE", help="any setting by its name in the run's config.json"
        ),
        click.option(
            "--config", "file", type=click.Path(path_type=Path), metavar="FILE.toml", help="settings, a key each"
        ),
        click.argument("env", required=False, metavar="[ENV|FILE.toml]"),
    ):
        command = option(command)
    return command


def _shown(default: Any) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


def _type_of(field: str) -> click.ParamType[Any]:
    if field == "algo":
        return click.Choice(ALGORITHMS)
    return {int: Count(), float: click.FLOAT, str: click.STRING, bool: click.BOOL, dict: click.STRING}[kind_of(field)]


def settings_of(
    flags: Mapping[str, Any], sets: tuple[str, ...], file: Path | None, resumed: RunFolder | None
) -> TrainConfig:
    """The config that all sources together ask for: flags, then ``ZRL_*``, then the TOML file, then the run that is
    resumed, then the defaults.

    Args:
        flags: by field, ``env`` among them; None where not given. An ``env`` that ends in ``.toml`` is the file.
        sets: ``KEY=VALUE``, on the same footing as flags.

    Raises:
        ConfigError: a setting or source that will not do, or none that names the environment.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if str(given.get("env", "")).endswith(".toml"):
        if file is not None:
            raise ConfigError(f"--config: {given['env']} is a config already; give one of them")
        file = Path(given.pop("env"))
    for warning in misspelt(os.environ):
        click.echo(f"warning: {warning}", err=True)
    settings = layered(
        [
            (lambda name: "ENV" if name == "env" else "--" + name.replace("_", "-"), given),
            (lambda name: f"--set {name}", _pairs(sets, given)),
            (lambda name: f"ZRL_{name.upper()}", from_environment(os.environ)),
            (lambda name: f"{file}: {name}", {} if file is None else from_toml(file)),
            (lambda name: f"{resumed and resumed.path / 'config.json'}: {name}", _of_run(resumed)),
        ]
    )
    if "env" not in settings:
        raise ConfigError("ENV: expected a Gymnasium id such as CartPole-v1, a config FILE.toml, or --resume RUN")
    if resumed is not None:
        before = resumed.config()
        for name in KEPT:
            if settings.get(name) != getattr(before, name):
                raise ConfigError(
                    f"{name}: a resumed run keeps its own, {getattr(before, name)!r}, and cannot go on with "
                    f"{settings.get(name)!r}; start a new run for that"
                )
    return TrainConfig(**settings)


def _pairs(sets: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    fields = {name_of(f): f.name for f in dataclasses.fields(TrainConfig)}
    seen = set(given)
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set: expected KEY=VALUE, not {text!r}")
        plain = key.replace("-", "_")
        if (field := fields.get(plain, plain)) in seen:
            raise ConfigError(f"--set {key}: given twice")
        seen.add(field)
        pairs[key] = value
    return pairs


def _of_run(resumed: RunFolder | None) -> dict[str, Any]:
    if resumed is None:
        return {}
    values = resumed.config().as_dict()
    if values["batch"] == max(1, values["workers"]):
        del values["batch"]  # it was the default, and is so again for another number of workers
    return values
