"""Options made from a config dataclass, and the types of their values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import click

from zrl.config import ALGORITHMS

Command = Callable[..., Any]


class Count(click.ParamType[Any]):
    """A whole number, with k or M for thousands or millions: ``500k``, ``1.5M``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().replace("_", "")
        factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
        try:
            number = float(text[:-1] if factor > 1 else text) * factor
        except ValueError:
            number = 0.5
        if not number.is_integer():
            self.fail(f"{value!r} is not a whole number such as 500000, 500k or 1.5M", param, ctx)
        return int(number)


def config_options(cls: type, *, skip: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """A decorator that adds one option a field of the config; options not given are left out of the arguments."""
    hints = typing.get_type_hints(cls)

    def add(command: Command) -> Command:
        for field in reversed(dataclasses.fields(cls)):
            if field.name in skip:
                continue
            default = "" if field.default is None else f"  [default: {field.default}]"
            command = click.option(
                "--envs" if field.name == "n_envs" else "--" + field.name.replace("_", "-"),
                field.name,
                type=_type_of(field.name, hints[field.name]),
                default=None,
                help=field.metadata["help"] + default,
            )(command)
        return command

    return add


def _type_of(name: str, hint: Any) -> click.ParamType[Any]:
    if name == "algo":
        return click.Choice(ALGORITHMS)
    kinds = [t for t in typing.get_args(hint) if t is not types.NoneType] or [hint]
    return {int: Count(), float: click.FLOAT, str: click.STRING}[kinds[0]]
