"""Machines of a test: network namespaces, each with one interface at a switch, which is a bridge in another one. They
share everything else with this machine, the boot id and ``/proc`` too."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

TIMEOUT = 10.0  # seconds for a command


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Machine:
    """A namespace and its place at the switch."""

    name: str
    address: str
    switch: str

    @property
    def prefix(self) -> list[str]:
        """Words before those of a command that shall run there; the command keeps the process id."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """From here on what it sends and what it would get is lost, and nobody is told: the cable is out elsewhere."""
        ip("-n", self.switch, "link", "set", self.name, "nomaster")

    def mend(self) -> None:
        ip("-n", self.switch, "link", "set", self.name, "master", "switch")

    def limit(self, rate: str) -> None:
        """What it sends leaves at this rate."""
        words = [
            "tc",
            "qdisc",
            "replace",
            "dev",
            "eth",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "64kb",
            "latency",
            "400ms",
        ]
        subprocess.run([*self.prefix, *words], check=True, timeout=TIMEOUT)


@contextlib.contextmanager
def machines(n: int) -> Iterator[list[Machine]]:
    """`n` machines that reach each other. Needs root."""
    tag = secrets.token_hex(3)
    switch = f"zrl-{tag}-s"
    made: list[str] = []
    try:
        ip("netns", "add", switch)
        made.append(switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        found = []
        for i in range(n):
            machine = Machine(f"zrl-{tag}-{i}", f"10.77.0.{i + 1}", switch)
            ip("netns", "add", machine.name)
            made.append(machine.name)
            ip("-n", switch, "link", "add", machine.name, "type", "veth", "peer", "name", "eth", "netns", machine.name)
            ip("-n", switch, "link", "set", machine.name, "master", "switch", "up")
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth")
            for device in ("lo", "eth"):
                ip("-n", machine.name, "link", "set", device, "up")
            found.append(machine)
        yield found
    finally:
        for name in made:
            ip("netns", "del", name)


def why_not() -> str:
    """Why there can be no machines here; empty, where there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "no ip and tc (iproute2)"
    try:
        with machines(1) as (machine,):
            machine.limit("20mbit")
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespaces here: {error}"
    return ""


needs_machines = pytest.mark.skipif(bool(_why := why_not()), reason=_why or "there can be")
