"""Which names of environments and actors a worker follows. Apart from `named`, because hosts need not import torch.

Arguments of an environment travel behind its name, as JSON: ``CartPole-v1 {"sutton_barto_reward": true}``. They are
only compared with those on the worker's own command line.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zrl.errors import ConfigError
from zrl.protocol.messages import printable

_MODULE = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
ENV_NAME = re.compile(rf"(?:(?P<module>{_MODULE}):)?[A-Za-z0-9_./-]+")
ACTOR_NAME = re.compile(rf"(?P<module>{_MODULE}):(?P<function>[A-Za-z_][A-Za-z0-9_]*)")
OURS = "zrl.zoo"


@dataclass(frozen=True)
class Allowed:
    """What a worker's own command line allows.

    Attributes:
        modules: that names may lead to besides `zrl.zoo`, their submodules included; None: all.
        env_kwargs: arguments of the environment.
    """

    modules: Sequence[str] | None = ()
    env_kwargs: Mapping[str, Any] | None = None

    def check(self, module: str, what: str) -> None:
        """Raise a ConfigError unless `module` is allowed."""
        if self.modules is None or any(module == m or module.startswith(m + ".") for m in (OURS, *self.modules)):
            return
        raise ConfigError(
            f"{what}: the learner asks for the module {module!r}, which this worker may not import; if you trust it: "
            f"--import {module}"
        )

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise a ConfigError unless the environment's arguments are those of the worker's own command line."""
        if kwargs != (self.env_kwargs or {}):
            text = json.dumps(kwargs)
            remedy = f"if you trust it: --env-kwargs {shlex.quote(text)}" if kwargs else "leave --env-kwargs out"
            raise ConfigError(f"env: the learner's environment has the arguments {text}; {remedy}")


def env_text(env: str, kwargs: Mapping[str, Any] | None) -> str:
    """Name and arguments of an environment as they travel."""
    return f"{env} {json.dumps(dict(kwargs), sort_keys=True)}" if kwargs else env


def parsed_env(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of what `env_text` made.

    Raises:
        ConfigError: it is nothing of the kind.
    """
    name, _, rest = text.partition(" ")
    try:
        kwargs = json.loads(rest) if rest else {}
    except (ValueError, RecursionError):
        kwargs = None
    if ENV_NAME.fullmatch(name) is None or not isinstance(kwargs, dict):
        raise ConfigError(f"env: expected a Gymnasium id or module:id, not {printable(text)!r}")
    return name, kwargs


def foreign_modules(env: str, actor: str) -> list[str]:
    """The modules that a worker must be allowed to import for these names."""
    ours = Allowed()
    found = []
    for match in (ENV_NAME.fullmatch(env), ACTOR_NAME.fullmatch(actor)):
        module = match["module"] if match else None
        if module and module not in found:
            try:
                ours.check(module, "")
            except ConfigError:
                found.append(module)
    return found
