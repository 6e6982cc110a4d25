"""Which of several learners this process is, as ``torchrun`` says in the environment. Apart from what needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zrl.errors import ConfigError

MOST_INDICES = 1 << 16  # of workers of a run


@dataclass(frozen=True)
class Rank:
    """One of several learners.

    Attributes:
        rank, size: which of how many.
        local, n_local: which of how many on this machine.
        host, port: of torch's store.
        store_is_there: ``torchrun`` keeps it; else learner 0 does.
        attempt: how often ``torchrun`` has started all of them anew.
    """

    rank: int
    size: int
    local: int = 0
    n_local: int = 1
    host: str = "127.0.0.1"
    port: int = 29500
    store_is_there: bool = False
    attempt: int = 0

    @property
    def leads(self) -> bool:
        """Whether it is learner 0, which writes the run folder and sends hosts to the others."""
        return self.rank == 0

    @property
    def indices(self) -> range:
        """Those of its workers; so no two environments of the run begin with one seed."""
        each = MOST_INDICES // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def address(self, url: str) -> str:
        """Where this learner listens, if learner 0 does at `url`: at ``PORT + 2 * rank``, as the port behind each is
        taken too, or at the path with ``.rank``.

        Raises:
            ConfigError: there is no such port.
        """
        if self.leads or url.endswith(":*"):
            return url
        if url.startswith("ipc://"):
            return f"{url}.{self.rank}"
        head, _, port = url.rpartition(":")
        if not port.isascii() or not port.isdigit():
            return url  # which is refused with all that is wrong with it
        if (own := int(port) + 2 * self.rank) > 65534:
            raise ConfigError(
                f"--bind: learner {self.rank} would listen at port {own}, and there are 65535: choose a lower one"
            )
        return f"{head}:{own}"


def rank_in(environment: Mapping[str, str]) -> Rank | None:
    """Which learner an environment says that this is; None, if it is the only one.

    Raises:
        ConfigError: it says so in part only.
    """
    size = _number(environment, "WORLD_SIZE", 1)
    if size <= 1:
        return None
    rank, port = _number(environment, "RANK"), _number(environment, "MASTER_PORT")
    if rank >= size:
        raise ConfigError(f"RANK={rank}: expected less than WORLD_SIZE={size}")
    if not environment.get("MASTER_ADDR"):
        raise ConfigError(_missing("MASTER_ADDR"))
    return Rank(
        rank,
        size,
        _number(environment, "LOCAL_RANK", rank),
        _number(environment, "LOCAL_WORLD_SIZE", 1),
        environment["MASTER_ADDR"],
        port,
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        _number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text:
        raise ConfigError(_missing(name))
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{name}: expected a whole number, not {text!r}; torchrun sets it for several learners")
    return int(text)


def _missing(name: str) -> str:
    return (
        f"{name} is not set, but WORLD_SIZE says that there are several learners: start them with torchrun, or unset "
        "WORLD_SIZE for one"
    )
