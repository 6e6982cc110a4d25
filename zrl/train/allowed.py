"""Which names of environments and actors a worker follows. Apart from `named`, because hosts need not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from zrl.errors import ConfigError

_MODULE = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
ENV_NAME = re.compile(rf"(?:(?P<module>{_MODULE}):)?[A-Za-z0-9_./-]+")
ACTOR_NAME = re.compile(rf"(?P<module>{_MODULE}):(?P<function>[A-Za-z_][A-Za-z0-9_]*)")
OURS = "zrl.zoo"


@dataclass(frozen=True)
class Allowed:
    """Modules that names may lead to besides `zrl.zoo`, their submodules included; None: all."""

    modules: Sequence[str] | None = ()

    def check(self, module: str, what: str) -> None:
        """Raise a ConfigError unless `module` is allowed."""
        if self.modules is None or any(module == m or module.startswith(m + ".") for m in (OURS, *self.modules)):
            return
        raise ConfigError(
            f"{what}: the learner asks for the module {module!r}, which this worker may not import; if you trust it: "
            f"--import {module}"
        )


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
