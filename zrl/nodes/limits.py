"""What the operating system allows a process."""

from __future__ import annotations

import contextlib
import resource


def raise_descriptor_limit() -> None:
    """Allow this process as many open files as it may have: a worker takes several, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
