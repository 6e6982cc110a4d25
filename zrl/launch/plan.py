"""What is launched, whatever the engine: the words of ``zrl learner`` and of each host's ``zrl worker``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zrl.config import TrainConfig
from zrl.errors import ConfigError
from zrl.train.allowed import foreign_modules

#: The one pair of all hosts in the folder of keys: whoever launches a run is one user, who has all of its machines.
HOSTS_PAIR = "hosts"

#: Files of a folder that learner and hosts find their keys in.
LEARNER_FILES = ("server.secret", "server.public", f"authorized/{HOSTS_PAIR}.public")
HOST_FILES = (f"{HOSTS_PAIR}.secret", f"{HOSTS_PAIR}.public", "server.public")

#: For a shell, whose positional parameters are the learner's words: go on with a run that was interrupted, and left a
#: checkpoint in `$runs`, a folder that is this job's alone.
GO_ON = """\
for run in "$runs"/*/; do
  for checkpoint in "$run"checkpoints/step_*.pt; do
    if [ -e "$checkpoint" ]; then
      set -- "$@" --resume "$run"
      break
    fi
  done
done
"""

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class Plan:
    """A learner, and hosts that keep workers for it.

    Attributes:
        words: of ``zrl learner``, the environment among them, without those that an engine adds: ``--workers``,
            ``--bind``, ``--keys``, ``--runs``.
        hosts, workers_per_host: how many.
        runs: folder for run folders.
        imports: modules that the workers may import.
        env_kwargs: arguments of the environment.
        port: of the learner; it uses the next one, too.
        resumes: whether the words name a run to go on with.

    Raises:
        ConfigError: what cannot be passed on, or cannot be right.
    """

    words: tuple[str, ...]
    hosts: int
    workers_per_host: int
    runs: str = "runs"
    imports: tuple[str, ...] = ()
    env_kwargs: Mapping[str, Any] | None = None
    port: int = 5555
    resumes: bool = False

    def __post_init__(self) -> None:
        for word in self.words:
            one_line("a word for zrl learner", word)
        one_line("--runs", self.runs)
        for module in self.imports:
            matches("--import", module, _MODULE, "the name of a module, such as my_envs or my_pkg.envs")
        if not 1 <= self.port <= 65534:
            raise ConfigError(f"--port: expected 1 to 65534, and the next one free as well, not {self.port}")

    @property
    def workers(self) -> int:
        """Of all hosts."""
        return self.hosts * self.workers_per_host

    @property
    def learner(self) -> tuple[str, ...]:
        """The words of ``zrl learner``, but for addresses and folders."""
        return (*self.words, "--workers", str(self.workers))

    @property
    def worker(self) -> tuple[str, ...]:
        """The words of each ``zrl worker``, but for addresses and folders."""
        imports = [word for module in self.imports for word in ("--import", module)]
        kwargs = ["--env-kwargs", json.dumps(dict(self.env_kwargs), sort_keys=True)] if self.env_kwargs else []
        return ("--count", str(self.workers_per_host), *imports, *kwargs)


def plan_of(
    words: Iterable[str],
    config: TrainConfig,
    *,
    hosts: int,
    workers_per_host: int,
    imports: Iterable[str] = (),
    port: int = 5555,
    resumes: bool = False,
) -> Plan:
    """The plan for a learner that these words have given this config. Workers are allowed what it asks for: whoever
    launches both has named it.

    Raises:
        ConfigError: environments that cannot be shared out to so many workers, or as of `Plan`.
    """
    config.resolved(seed=0)
    modules = dict.fromkeys([*imports, *foreign_modules(config.env, config.actor)])
    return Plan(tuple(words), hosts, workers_per_host, config.runs, tuple(modules), config.env_kwargs, port, resumes)


def one_line(option: str, value: str) -> str:
    """The value, if it may stand in a script.

    Raises:
        ConfigError: it is empty, or holds line breaks, control characters or bytes that are no text.
    """
    if not value or not value.isprintable():
        raise ConfigError(f"{option}: expected one line of text without control characters, not {value!r:.100}")
    return value


def matches(option: str, value: str, pattern: re.Pattern[str], expected: str) -> str:
    """The value, if `pattern` is all of it; raises a `ConfigError` that names the option."""
    if not pattern.fullmatch(value):
        raise ConfigError(f"{option}: expected {expected}, not {value!r:.100}")
    return value
