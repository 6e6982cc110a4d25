"""Hosts as actors of a Ray cluster, and the learner on this machine or, where it needs a GPU, on a node that has one.

    zrl launch ray ─┬─► child: zrl learner                              or: actor ─► child: zrl learner
                    └─► actor, one a host, on a node with CPUs for it ─► child: zrl worker ─► its workers

What an actor keeps is a child process, the same ``zrl worker`` as by hand, which has signals, a zygote and sockets to
itself. The child dies with its actor, an actor with its node or with this program; Ray starts actors again elsewhere.
Only words travel through Ray: keys stay where they are, in a folder that every node has under the same path.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zrl.errors import ConfigError, MissingExtraError, ProcessError
from zrl.launch import tied
from zrl.launch.plan import Plan
from zrl.train.stop import Stopped, StopSignals

TICK = 0.5  # seconds between two looks at everybody
DELAY = 5.0  # seconds before a host that failed is started again
LEARNER_GRACE = 60.0  # seconds for a last checkpoint, and for saying so to the hosts
HOST_GRACE = 10.0  # seconds for the end of a host's workers
PLACEMENT = 300.0  # seconds until a node with a GPU must have been found
PENDING = 15.0  # seconds without a place for a host after which to say so

#: Statuses of zrl worker that another start would not change: wrong words, and what cannot be made there.
HOPELESS = (2, 5)


@dataclass(frozen=True)
class RayOptions:
    """What to do with which cluster.

    Attributes:
        address: of the cluster, as `ray.init` takes it.
        hosts: how many; None: one on every node with enough CPUs, also on nodes that join later.
        cpus_per_host: that each host takes from Ray's books.
        gpus: of the learner; it is started on a node that has them.
        connect: URL of a learner that is there already; "": start one.
        keys: folder of the keys, the same path on every node.
        insecure: whether to do without keys though nodes are on several machines.
    """

    address: str = "auto"
    hosts: int | None = None
    cpus_per_host: float = 1.0
    gpus: float = 0.0
    connect: str = ""
    keys: Path | None = None
    insecure: bool = False

    @property
    def secured(self) -> list[str]:
        """The words of learner and workers that say how they trust each other."""
        return [
            *([] if self.keys is None else ["--keys", str(self.keys.absolute())]),
            *(["--insecure"] if self.insecure else []),
        ]


@dataclass(frozen=True)
class State:
    """Of a process: which it is, and its exit status if it has ended."""

    node: str
    pid: int
    code: int | None


class Process:
    """A ``zrl`` command as the child of an actor, which is this class on a node.

    Args:
        folder: where to run it, if there is such a folder on this node.
        words: of the command; without any it waits for `start`.
    """

    def __init__(self, folder: str, *words: str) -> None:
        self._folder = folder if os.path.isdir(folder) else None
        self._child: subprocess.Popen[bytes] | None = None
        if words:
            self.start(*words)

    def start(self, *words: str) -> None:
        """Start ``zrl WORDS``."""
        self._child = tied.start(words, self._folder)

    def address(self) -> str:
        """Of this node, for others."""
        return str(_ray().util.get_node_ip_address())

    def state(self) -> State:
        """What it is doing."""
        assert self._child is not None
        return State(self.address(), self._child.pid, tied.status(self._child))

    def stop(self, grace: float) -> int | None:
        """Have it end; its exit status, or None if it was never started."""
        return None if self._child is None else tied.stop(self._child, grace)


def launch(
    options: RayOptions, plan_for: Callable[[int], Plan], say: Callable[[str], None], signals: StopSignals
) -> int:
    """Run it until the learner or the hosts are done; the exit status.

    Args:
        options: what to do.
        plan_for: the plan for so many hosts.
        say: gets a line whenever something changes.
        signals: those that have come so far.

    Raises:
        Stopped: before anything was started.
        MissingExtraError: Ray is not installed.
        ConfigError: no such cluster, or one on several machines without keys; or as `plan_for`.
        ProcessError: no node has what the learner needs.
    """
    ray = _ray()
    _check_address(options.address)
    say(f"joining the Ray cluster at {options.address}")
    try:
        ray.init(address=options.address, logging_level="warning")
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"--address: no Ray cluster at {options.address!r} ({error}); start one with `ray start --head`"
        ) from None
    try:
        with StopSignals() as from_now_on:  # Ray has taken SIGTERM for itself
            signals.check()
            return _run(ray, options, plan_for, say, from_now_on)
    finally:
        ray.shutdown()  # ends what is left of the actors


def _check_address(address: str) -> None:
    """Raise a `ConfigError` where nobody listens: Ray itself tries for minutes, and cannot be interrupted meanwhile."""
    host, _, port = (os.environ.get("RAY_ADDRESS", "") if address == "auto" else address).rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return  # not an address, but a way to one
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5.0).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--address: nobody answers at {host}:{port} ({error}); see `ray status` there") from None


def _run(
    ray: Any, o: RayOptions, plan_for: Callable[[int], Plan], say: Callable[[str], None], signals: StopSignals
) -> int:
    fitting = sum(1 for _ in _nodes(ray, o.cpus_per_host))
    plan = plan_for(o.hosts or max(1, fitting))
    say(f"{plan.hosts} hosts with {plan.workers_per_host} workers each; nodes with CPUs for one: {fitting}")
    learner = _learner(ray, o, plan, say, signals)
    hosts = _Hosts(ray, o, [*plan.worker, "--connect", learner.url, *o.secured], say)
    try:
        while True:
            signals.check()
            code = learner.code()
            if code is None:
                code = hosts.look(time.monotonic())
            if code is not None:
                return code
            time.sleep(TICK)
    except Stopped as stopped:
        say(f"stopped by {signal.Signals(stopped.signum).name}")
        code = learner.stop()
        return 128 + stopped.signum if code is None else code
    finally:
        learner.stop()
        hosts.stop()


def _nodes(ray: Any, cpus: float) -> Iterator[tuple[str, str]]:
    """Nodes that have so many CPUs, whether they are free or not: id and address."""
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus:
            yield node["NodeID"], node["NodeManagerAddress"]


# ── the learner ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Learner:
    """One that is not ours: it is reached, and that is all."""

    def __init__(self, url: str) -> None:
        self.url = url

    def code(self) -> int | None:
        """Its exit status, if it has ended."""
        return None

    def stop(self) -> int | None:
        """Have it save and end, if it has not; its exit status."""
        return None


class _LearnerHere(_Learner):
    """A child of this program."""

    def __init__(self, url: str, words: list[str]) -> None:
        super().__init__(url)
        self._child = tied.start(words)

    def code(self) -> int | None:
        return tied.status(self._child)

    def stop(self) -> int | None:
        return tied.stop(self._child, LEARNER_GRACE)


class _LearnerThere(_Learner):
    """A child of an actor."""

    def __init__(self, url: str, ray: Any, actor: Any) -> None:
        super().__init__(url)
        self._ray, self._actor = ray, actor
        self._code: int | None = None

    def code(self) -> int | None:
        if self._code is None:
            self._code = self._ask(self._actor.state.remote(), 30.0).code
        return self._code

    def stop(self) -> int | None:
        if self._code is None:
            self._code = self._ask(self._actor.stop.remote(LEARNER_GRACE), LEARNER_GRACE + 30.0)
        return self._code

    def _ask(self, reference: Any, timeout: float) -> Any:
        try:
            return self._ray.get(reference, timeout=timeout)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError) as error:
            self._code = 1  # nobody is asked again
            raise ProcessError(
                f"the learner's node is gone: {error}; if its run folder is not, go on with --resume RUN"
            ) from None


def _learner(ray: Any, o: RayOptions, plan: Plan, say: Callable[[str], None], signals: StopSignals) -> _Learner:
    if o.connect:
        return _Learner(o.connect)
    if not o.gpus:
        url = learner_url(o, ray.nodes(), ray.util.get_node_ip_address(), plan.port)
        return _LearnerHere(url, ["learner", *plan.learner, "--bind", url, *o.secured])
    say(f"looking for a node with {o.gpus:g} GPUs for the learner")
    actor = ray.remote(Process).options(num_cpus=1, num_gpus=o.gpus).remote(os.getcwd())
    asked, deadline = actor.address.remote(), time.monotonic() + PLACEMENT
    while not ray.wait([asked], timeout=TICK)[0]:
        signals.check()
        if time.monotonic() > deadline:
            raise ProcessError(
                f"--gpus: within {PLACEMENT:.0f} s no node had {o.gpus:g} GPUs and a CPU to spare; see `ray status`"
            )
    url = learner_url(o, ray.nodes(), ray.get(asked), plan.port)
    ray.get(actor.start.remote("learner", *plan.learner, "--bind", url, *o.secured))
    say(f"learner at {url}")
    return _LearnerThere(url, ray, actor)


def learner_url(o: RayOptions, nodes: Sequence[Mapping[str, Any]], address: str, port: int) -> str:
    """Where a learner listens whose node has this address, in a cluster of these nodes, as `ray.nodes` has them.

    Raises:
        ConfigError: on the loopback interface others would not find it, and nothing says how else it may.
    """
    if o.keys is None and not o.insecure:
        if {node["NodeManagerAddress"] for node in nodes if node["Alive"]} != {address}:
            raise ConfigError(
                "--keys: this cluster has several machines, and nothing would be encrypted: that needs --keys DIR, a "
                "folder that every node has (docs/launch.md says how to make it), or --insecure to go without"
            )
        address = "127.0.0.1"
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


# ── the hosts ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Host:
    name: str
    actor: Any
    node: str = ""  # the one that it is for, if it is for one
    asked: Any = None  # reference to its next state
    state: State | None = None
    again: float | None = None  # when to start it again
    waits: float | None = None  # since when it has had no place; inf: that was said


@dataclass
class _Hosts:
    ray: Any
    o: RayOptions
    words: list[str]
    say: Callable[[str], None]
    hosts: list[_Host] = field(default_factory=list)
    started: int = 0
    prefix: str = field(default_factory=lambda: f"ray-{secrets.token_hex(3)}")

    def look(self, now: float) -> int | None:
        """Start whom there is a place for, hear of everybody; the exit status, if they are done."""
        self._place()
        for host in self.hosts:
            if host.asked is None and host.again is None:
                host.asked = host.actor.state.remote()
            self._say_if_pending(host, now)
        asked = [host.asked for host in self.hosts if host.asked is not None]
        if asked:
            ready, _ = self.ray.wait(asked, num_returns=len(asked), timeout=0)
            for host in list(self.hosts):
                if host.asked in ready:
                    self._hear(host, now)
        for host in self.hosts:
            if host.again is not None and now >= host.again:
                host.again = host.state = None
                self.ray.kill(host.actor, no_restart=False)
        codes = [host.state.code if host.state else None for host in self.hosts]
        hopeless = [code for code in codes if code in HOPELESS]
        if hopeless:
            return hopeless[0]
        return 0 if self.o.connect and codes and all(code == 0 for code in codes) else None

    def stop(self) -> None:
        """Have all of them end; who does not is killed by the end of this program's job."""
        asked = {host.actor.stop.remote(HOST_GRACE): host for host in self.hosts if host.state is not None}
        if asked:
            ready, _ = self.ray.wait(list(asked), num_returns=len(asked), timeout=HOST_GRACE + 5.0)
            for reference in ready:
                with contextlib.suppress(self.ray.exceptions.RayActorError):  # it ended by itself, or with its node
                    host = asked[reference]
                    self._say_if_ended(host, self.ray.get(reference), host.state)
        for host in self.hosts:
            self.ray.kill(host.actor)

    def _say_if_pending(self, host: _Host, now: float) -> None:
        if host.state is not None:
            host.waits = None
        elif host.waits is None:
            host.waits = now
        elif now - host.waits > PENDING:
            host.waits = math.inf
            self.say(f"{host.name}: Ray has no place with {self.o.cpus_per_host:g} CPUs for it yet; see `ray status`")

    def _place(self) -> None:
        if self.o.hosts is not None:
            while self.started < self.o.hosts:
                self._add("SPREAD")
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = dict(_nodes(self.ray, self.o.cpus_per_host))
        for host in [host for host in self.hosts if host.node not in there]:
            self.say(f"{host.name}: its node is gone")
            self.ray.kill(host.actor)
            self.hosts.remove(host)
        for node in there.keys() - {host.node for host in self.hosts}:
            self._add(NodeAffinitySchedulingStrategy(node, soft=False), node)

    def _add(self, strategy: Any, node: str = "") -> None:
        name = f"{self.prefix}-{self.started}"  # kept when it is started again: its workers keep their indices
        self.started += 1
        where = self.ray.remote(Process).options(
            num_cpus=self.o.cpus_per_host, max_restarts=-1, scheduling_strategy=strategy, name=name
        )
        self.hosts.append(_Host(name, where.remote(os.getcwd(), "worker", "--id", name, *self.words), node))

    def _hear(self, host: _Host, now: float) -> None:
        before, asked, host.asked = host.state, host.asked, None
        try:
            host.state = state = self.ray.get(asked)
        except self.ray.exceptions.ActorUnavailableError:
            if before is not None:
                self.say(f"{host.name}: lost; Ray starts it again where there is a place")
            host.state = None
            return
        except self.ray.exceptions.RayActorError as error:
            if host.node:  # that is gone; the next look notices, or has a new host there
                self.hosts.remove(host)
                return
            raise ProcessError(f"{host.name} cannot be started: {error}") from None
        if before is None or before.pid != state.pid:
            self.say(f"{host.name}: process {state.pid} on {state.node}")
        self._say_if_ended(host, state.code, before)
        if state.code not in (None, 0, *HOPELESS):
            host.again = now + DELAY

    def _say_if_ended(self, host: _Host, code: int | None, before: State | None) -> None:
        if code is not None and (before is None or before.code is None):
            self.say(f"{host.name}: ended with {code}")


def _ray() -> Any:
    try:
        import ray
    except ImportError as e:
        raise MissingExtraError("zrl launch ray needs Ray: pip install 'zrl[ray]'") from e
    return ray
