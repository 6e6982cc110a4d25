"""What the operating system allows a process."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from zrl.errors import ConfigError

OWN, EACH = 32, 5  # descriptors of a learner or a host, and for each of its workers, at most


def raise_descriptor_limit(n_workers: int = 0) -> None:
    """Allow this process as many open files as it may have: a worker takes several, and the usual limit is 1024.

    Args:
        n_workers: of this process.

    Raises:
        ConfigError: it may have too few for them. libzmq ends the whole process where it cannot accept a connection.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if not os.path.isdir("/proc/self/fd"):
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = len(os.listdir("/proc/self/fd")) + OWN + EACH * n_workers
    if most != resource.RLIM_INFINITY and needed > most:
        raise ConfigError(
            f"{n_workers} workers take up to {needed} open files, and this process may have {most}: raise the limit "
            f"(ulimit -n {needed}, LimitNOFILE= of a service), or take fewer workers"
        )


def cores_to_pin_to(wanted: bool) -> tuple[int, ...]:
    """The cores that this process may run on, for its workers to be kept on one each, in turn; none, if not `wanted`.

    Raises:
        ConfigError: this system cannot keep a process on a core.
    """
    if not wanted:
        return ()
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError("affinity: this system cannot keep a process on a core; leave it out")
    return tuple(sorted(os.sched_getaffinity(0)))


def kills_for_memory(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """How many processes of our control group the kernel has killed for want of memory, as far as Linux tells."""
    with contextlib.suppress(OSError):
        for line in Path(proc, "self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):  # version 2; version 1
                file = "memory/{}/memory.oom_control" if controllers else "{}/memory.events"
                with contextlib.suppress(OSError):
                    words = Path(cgroups, file.format(group.strip("/"))).read_text().split()
                    if "oom_kill" in words:
                        return int(words[words.index("oom_kill") + 1])
    return 0
