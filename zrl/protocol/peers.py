"""Hosts and workers as the learner knows them: who is welcome, who is alive, who is stale.

A peer is whoever is at the far end of a routing id. What may happen in which state is in the tables of
`zrl.protocol.peer_states`; what it means is here. The learner's own host is a peer like the others, with the routing
id `OWN`: it is an object on the same loop, called instead of written to, and cannot fall silent.

A host lives as long as it beats; a worker as long as its host does and says so. Nothing that a peer sends raises, and
a peer that was not welcomed leaves nothing behind in memory but when it was last answered, for the last 1,024 of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from zrl.protocol import messages as m
from zrl.protocol.peer_states import HOST_TRANSITIONS, WORKER_TRANSITIONS, Event, State
from zrl.protocol.redirect import Redirect

OWN = b""  # routing id of the learner's own host
FETCH_SECONDS = 0.5  # between two answers to a host's Fetch
FETCH_GRACE = 20.0  # seconds for a host to be heard of after its first weights were sent to it
AGAIN_SECONDS = 0.5  # between two HelloAgain to one peer: who goes on regardless costs no answer a message
LEAST_RATE = 125_000  # bytes a second that a remote worker's way is taken to have at least
MOST_TOLD = 1024  # peers whose last HelloAgain is remembered
WAITING = m.PHASES.index("wait")


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to the peer with this routing id; to the own host where that is `OWN`."""

    peer: bytes
    message: m.Message


@dataclass(frozen=True, slots=True)
class Inspect:
    """Look at the ring and the specification of this Attach, then call `accepted` or `refused`."""

    attach: m.Attach


@dataclass(frozen=True, slots=True)
class Deliver:
    """This Ready comes from a worker in good standing; the slots' books decide next."""

    ready: m.Ready


@dataclass(frozen=True, slots=True)
class SendWeights:
    """Answer a host's Fetch."""

    peer: bytes
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """This worker is gone, its slots with it. `report`: what its host knows; `clean`: it said Bye; `again`: that it is
    gone was said before, only the report is new."""

    incarnation: bytes
    worker: int  # index
    reason: str
    clean: bool = False
    report: m.Gone | None = None
    again: bool = False


@dataclass(frozen=True, slots=True)
class HostLost:
    """This host is gone; its workers were reported lost before."""

    incarnation: bytes
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The name of this host, which has been away for long, is remembered no more: another has its indices."""

    name: str


Command = Send | Inspect | Deliver | SendWeights | Lost | HostLost | Forget


@dataclass(slots=True)
class Host:
    """A welcomed host."""

    peer: bytes
    incarnation: bytes
    name: str
    process: bytes
    local: bool
    base: int
    count: int
    deadline: float  # when its silence has been too long
    state: State = State.NEW
    workers: dict[int, Worker] = field(default_factory=dict)  # by index in the run
    unreported: dict[bytes, None] = field(default_factory=dict)  # incarnations lost before it said so, newest last
    wants_weights: bool = False  # it has asked too soon, and is answered with the next tick


@dataclass(slots=True)
class Worker:
    """A welcomed worker.

    Attributes:
        beat: what its host said of it last; None before the first Beat.
        moved: when its calls of environments were last seen to have moved, or it was welcomed.
    """

    peer: bytes
    incarnation: bytes
    host: Host
    index: int
    generation: int
    state: State = State.NEW
    disagree: tuple[int, ...] = ()  # its counts and ours, when they last differed
    disagree_since: float = 0.0
    slack: float = 0.0  # seconds that they may differ longer than others'
    beat: m.ChildBeat | None = None
    moved: float = 0.0

    @property
    def phase(self) -> str:
        """One of `zrl.protocol.messages.PHASES`, as of the last Beat."""
        return m.PHASES[self.beat.phase if self.beat is not None else 0]

    def beats(self, beat: m.ChildBeat, now: float) -> None:
        """Its host says this."""
        if beat.calls != (self.beat.calls if self.beat is not None else 0):
            self.moved = now
        self.beat = beat


#: (Readys accepted, Releases sent) of a live incarnation: `SlotTable.books`.
Books = Callable[[bytes], tuple[int, int] | None]


class Peers:
    """All hosts and workers of a run, by routing id and by incarnation.

    Args:
        welcome: what every Welcome says; its `incarnation` and `index_base` are filled in.
        slots_of: K of the worker with this index; that of `welcome`, if None.
        boot_id: of this machine; a host with the same is local.
        local_silence: seconds after which a silent local host is lost.
        remote_silence: seconds, for the others.
        most_hosts: names of hosts that are remembered, and so hosts; for another one, a name is forgotten whose host is
            away, or it is refused.
        indices: that workers may have. Learners of one run share a seed and have disjoint ones, so that no two
            environments of theirs begin alike.
        redirect: whether a new host is to go to another learner; None: all stay.

    Attributes:
        welcome: replace it when the weights' version has changed.
        counters: what was ignored, by reason.
    """

    def __init__(
        self,
        welcome: m.Welcome,
        *,
        boot_id: str,
        local_silence: float = 5.0,
        remote_silence: float = 15.0,
        most_hosts: int = 1024,
        slots_of: Callable[[int], int] | None = None,
        indices: range = range(1 << 16),
        redirect: Redirect | None = None,
    ) -> None:
        self.welcome = welcome
        self._slots_of = slots_of
        self.hosts: dict[bytes, Host] = {}  # by incarnation, and so the workers
        self.workers: dict[bytes, Worker] = {}
        self.counters: Counter[str] = Counter()
        self.draining = False
        self._boot_id = boot_id
        self._silence = {True: local_silence, False: remote_silence}
        self._most_hosts = most_hosts
        self._peers: dict[bytes, Host | Worker] = {}  # by routing id
        self._bases: dict[str, tuple[int, int]] = {}  # name -> (index base, count); who left last stands last
        self._fetched: dict[str, float] = {}  # name -> when it was last sent weights
        self._told: dict[bytes, float] = {}  # routing id -> when it was last sent a HelloAgain; the latest stand last
        self._next_base, self._end_of_indices = indices.start, indices.stop
        self._redirect = redirect
        self._last_tick: float | None = None

    @property
    def run_id(self) -> bytes:
        return self.welcome.run_id

    # What peers say.

    def receive(self, peer: bytes, message: m.Message, now: float, books: Books | None = None) -> list[Command]:
        """A message of the peer with this routing id; `books` to compare a Beat with.

        Whatever is out of place is counted and has no effect: stale (another run, another incarnation), unexpected
        (not in this state, not from this role), unknown (no Hello was welcomed; it gets a HelloAgain now and then).
        """
        if isinstance(message, m.OtherVersion):
            return self._reject(peer, message, "version", f"protocol {message.protocol}, not {m.PROTOCOL_VERSION}")
        if isinstance(message, m.Hello):
            return self._hello(peer, message, now)
        known = self._peers.get(peer)
        if known is None:
            self.counters["unknown"] += 1
            return self._hello_again(peer, message, now)
        if message.run_id != self.run_id or message.incarnation != known.incarnation:
            return self._ignore("stale")
        if isinstance(known, Host):
            known.deadline = self._deadline(
                known, now
            )  # also where more time was given for weights: it has them, or waits
            return self._from_host(known, message, now, books)
        return self._from_worker(known, message)

    def _hello(self, peer: bytes, hello: m.Hello, now: float) -> list[Command]:
        if hello.run_id not in (m.NO_ID, self.run_id):
            self.counters["stale"] += 1
            return self._hello_again(peer, hello, now)
        known = self._peers.get(peer)
        if known is not None:
            if known.incarnation != hello.incarnation:
                return self._ignore("stale")
            return [self._welcome(known)] if self._step(known, Event.HELLO) else []
        if hello.incarnation == m.NO_ID or hello.incarnation in self.hosts or hello.incarnation in self.workers:
            return self._ignore("unexpected")
        if self.draining:
            return self._reject(peer, hello, "draining", "this run is about to end")
        return self._hello_host(peer, hello, now) if hello.role == "host" else self._hello_worker(peer, hello, now)

    def _hello_host(self, peer: bytes, hello: m.Hello, now: float) -> list[Command]:
        commands: list[Command] = []
        twin = next((h for h in self.hosts.values() if h.name == hello.name), None)
        if twin is not None:
            if twin.process != hello.process or twin.peer == OWN:
                return self._reject(peer, hello, "name_taken", f"a host {hello.name!r} is alive", retry=True)
            commands = self._lose_host(twin, "started over")  # the same process: its old connection is no more
        elif url := self._elsewhere(peer, hello, now):
            return self._reject(peer, hello, "redirect", "another learner has fewer workers", retry=True, url=url)
        base, forgotten = self._base_of(hello.name, hello.count)
        commands += forgotten
        if base is None:
            return [*commands, *self._reject(peer, hello, "full", "no room for more workers")]
        local = peer == OWN or (bool(self._boot_id) and hello.boot_id == self._boot_id)
        host = Host(peer, hello.incarnation, hello.name, hello.process, local, base, hello.count, deadline=0.0)
        host.deadline = self._deadline(host, now)
        self._step(host, Event.HELLO)
        self._peers[peer] = self.hosts[host.incarnation] = host
        return [*commands, self._welcome(host)]

    def _elsewhere(self, peer: bytes, hello: m.Hello, now: float) -> str:
        """Where this newcomer is to go instead; "": nowhere. Who was here before has its indices here."""
        if self._redirect is None or peer == OWN or hello.name in self._bases:
            return ""
        return self._redirect(hello, {host.name: host.count for host in self.hosts.values()}, now)

    def _hello_worker(self, peer: bytes, hello: m.Hello, now: float) -> list[Command]:
        host = self.hosts.get(hello.host)
        if host is None or host.state is not State.WELCOMED:
            return self._reject(peer, hello, "unknown_host", "its host is not welcomed", retry=True)
        if not host.base <= hello.index < host.base + host.count:
            return self._ignore("unexpected")
        if hello.index in host.workers:  # its host has yet to say what became of it
            return self._reject(peer, hello, "name_taken", f"a worker {hello.index} is alive", retry=True)
        worker = Worker(peer, hello.incarnation, host, hello.index, hello.generation, moved=now)
        self._step(worker, Event.HELLO)
        self._peers[peer] = self.workers[worker.incarnation] = host.workers[worker.index] = worker
        return [self._welcome(worker)]

    def _from_host(self, host: Host, message: m.Message, now: float, books: Books | None) -> list[Command]:
        if isinstance(message, m.Beat) and self._step(host, Event.BEAT):
            return self._beat(host, message, now, books)
        if isinstance(message, m.Gone) and self._step(host, Event.REPORT):
            return self._report(host, message)
        if isinstance(message, m.Fetch) and self._step(host, Event.FETCH):
            # each answer is a copy of the weights in the learner's memory, until it is taken
            if now - self._fetched.get(host.name, -math.inf) < FETCH_SECONDS:
                host.wants_weights = True
                return self._ignore("fetch too soon")
            return [self._send_weights(host, now)]
        if isinstance(message, m.Bye):
            commands = self._lose_host(host, "bye", Event.BYE)
            return [*commands, Send(host.peer, m.ByeAck(self.run_id, host.incarnation))]
        return self._ignore("unexpected")

    def _send_weights(self, host: Host, now: float) -> SendWeights:
        host.wants_weights = False
        self._fetched[host.name] = now
        if not host.workers:  # its first weights may take long; later ones are no excuse
            host.deadline = now + FETCH_GRACE  # until it is heard of again
        return SendWeights(host.peer, host.incarnation)

    def _from_worker(self, worker: Worker, message: m.Message) -> list[Command]:
        if isinstance(message, m.Ready) and self._step(worker, Event.READY):
            return [Deliver(message)]
        if isinstance(message, m.Attach) and self._step(worker, Event.ATTACH):
            return [Inspect(message)]
        if isinstance(message, m.Bye):
            lost = self._lose_worker(worker, "bye", Event.BYE, clean=True)
            return [lost, Send(worker.peer, m.ByeAck(self.run_id, worker.incarnation))]
        return self._ignore("unexpected")

    def _beat(self, host: Host, beat: m.Beat, now: float, books: Books | None) -> list[Command]:
        """Revoke the children whose counts have differed from ours for too long with nothing moving on either side. One
        that does not wait does not read either: the Releases in its socket tell nothing, however long it takes."""
        commands: list[Command] = []
        for child in beat.children:
            worker = self.workers.get(child.incarnation)
            if worker is None or worker.host is not host:
                continue
            worker.beats(child, now)
            ours = books(child.incarnation) if books else None
            if ours is None:
                continue
            received = child.received if child.phase == WAITING else ours[1]
            counts = (child.sent, received, *ours)
            if counts[:2] == counts[2:]:
                worker.disagree = ()
            elif counts != worker.disagree:  # messages are on their way
                worker.disagree, worker.disagree_since = counts, now
            elif now - worker.disagree_since >= self._silence[host.local] + worker.slack:
                commands += self.revoke(worker.incarnation, "desync")
        return commands

    def _report(self, host: Host, gone: m.Gone) -> list[Command]:
        worker = self.workers.get(gone.worker)
        if (worker is not None and worker.host is not host) or not host.base <= gone.index < host.base + host.count:
            return self._ignore("unexpected")
        if worker is None:  # it died before its Hello, or was given up before: why is still of interest
            again = gone.worker in host.unreported
            host.unreported.pop(gone.worker, None)
            return [Lost(gone.worker, gone.index, gone.cause, clean=True, report=gone, again=again)]
        return [self._lose_worker(worker, gone.cause, Event.LOSE, report=gone)]

    # What the collator says.

    def accepted(self, incarnation: bytes, *, local: bool, slack: float = 0.0) -> list[Command]:
        """The ring of this worker's Attach is fine; it may be granted slots where it is ATTACHED now. `slack`: seconds
        that its fragments may be on their way, and its counts differ from ours."""
        worker = self.workers.get(incarnation)
        if worker is None or not self._step(worker, Event.ACCEPT):
            return []
        worker.slack = slack
        return [Send(worker.peer, m.Attached(self.run_id, incarnation, local))]

    def refused(self, incarnation: bytes, code: str, text: str) -> list[Command]:
        """This worker's Attach is not accepted: it is told, and forgotten."""
        worker = self.workers.get(incarnation)
        if worker is None:
            return []
        lost = self._lose_worker(worker, f"rejected: {code}", Event.REFUSE)
        reject = m.Reject(self.run_id, incarnation, code, m.clipped(text, 32_000), False, "")
        return [Send(worker.peer, reject), lost]

    def revoke(self, incarnation: bytes, reason: str) -> list[Command]:
        """This worker is of no use any more: its host is to replace it."""
        worker = self.workers.get(incarnation)
        if worker is None:
            return []
        lost = self._lose_worker(worker, reason, Event.LOSE)
        revoke = m.Revoke(self.run_id, worker.host.incarnation, incarnation, m.clipped(reason, 256))
        return [lost, Send(worker.host.peer, revoke)]

    def unreachable(self, peer: bytes) -> list[Command]:
        """The ROUTER has no connection for this routing id any more."""
        known = self._peers.get(peer)
        if isinstance(known, Worker):
            return self.revoke(known.incarnation, "unreachable")
        return self._lose_host(known, "unreachable") if known is not None else []

    def drain(self) -> list[Command]:
        """The run is to end: everybody finishes what is in hand; nobody new is welcomed."""
        self.draining = True
        everybody: list[Host | Worker] = [*self.hosts.values(), *self.workers.values()]
        return [Send(p.peer, m.Drain(self.run_id, p.incarnation)) for p in everybody if self._step(p, Event.DRAIN)]

    def tick(self, now: float, interval: float = 1.0) -> list[Command]:
        """To be called every `interval` seconds. What the learner itself was late by is added to every deadline: it
        may have stood still together with the messages that wait for it."""
        late = 0.0 if self._last_tick is None else max(0.0, now - self._last_tick - interval)
        self._last_tick = now
        for host in self.hosts.values():
            host.deadline += late
        for worker in self.workers.values():
            worker.disagree_since += late
        silent = [host for host in self.hosts.values() if host.peer != OWN and now >= host.deadline]
        lost = [command for host in silent for command in self._lose_host(host, "silent")]
        # one that is not silent at all, but not listened to any more, since its key was revoked, is to know
        again = [Send(host.peer, m.HelloAgain(self.run_id, host.incarnation)) for host in silent]
        weights = [self._send_weights(host, now) for host in self.hosts.values() if host.wants_weights]
        return [*lost, *again, *weights]

    # What all of this is made of.

    def _step(self, peer: Host | Worker, event: Event) -> bool:
        table = HOST_TRANSITIONS if isinstance(peer, Host) else WORKER_TRANSITIONS
        to = table.get((peer.state, event))
        if to is None:
            return False
        peer.state = to
        return True

    def _lose_worker(
        self, worker: Worker, reason: str, event: Event, *, clean: bool = False, report: m.Gone | None = None
    ) -> Lost:
        self._step(worker, event)
        if report is None:
            unreported = worker.host.unreported
            unreported[worker.incarnation] = None
            if len(unreported) > 2 * worker.host.count:  # it does not say so at all
                del unreported[next(iter(unreported))]
        del self._peers[worker.peer], self.workers[worker.incarnation], worker.host.workers[worker.index]
        return Lost(worker.incarnation, worker.index, reason, clean, report)

    def _lose_host(self, host: Host, reason: str, event: Event = Event.LOSE) -> list[Command]:
        why = f"host {reason}"
        lost: list[Command] = [self._lose_worker(w, why, Event.LOSE) for w in list(host.workers.values())]
        self._step(host, event)
        del self._peers[host.peer], self.hosts[host.incarnation]
        if host.name in self._bases:
            self._bases[host.name] = self._bases.pop(host.name)
        return [*lost, HostLost(host.incarnation, host.name, reason)]

    def _welcome(self, peer: Host | Worker) -> Send:
        base = peer.base if isinstance(peer, Host) else peer.host.base
        w = self.welcome
        n_slots = self._slots_of(peer.index) if self._slots_of and isinstance(peer, Worker) else w.n_slots
        return Send(peer.peer, dataclasses.replace(w, incarnation=peer.incarnation, index_base=base, n_slots=n_slots))

    def _reject(
        self, peer: bytes, to: m.Message, code: str, text: str, *, retry: bool = False, url: str = ""
    ) -> list[Command]:
        self.counters[f"rejected: {code}"] += 1
        return [Send(peer, m.Reject(self.run_id, to.incarnation, code, text, retry, url))]

    def _hello_again(self, peer: bytes, to: m.Message, now: float) -> list[Command]:
        if now - self._told.get(peer, -math.inf) < AGAIN_SECONDS:
            return []
        self._told.pop(peer, None)
        self._told[peer] = now
        if len(self._told) > MOST_TOLD:
            del self._told[next(iter(self._told))]
        return [Send(peer, m.HelloAgain(self.run_id, to.incarnation))]

    def _ignore(self, reason: str) -> list[Command]:
        self.counters[reason] += 1
        return []

    def _deadline(self, host: Host, now: float) -> float:
        return now + self._silence[host.local]

    def _base_of(self, name: str, count: int) -> tuple[int | None, list[Command]]:
        """First index of a host's workers; None: no room. A name that comes back gets its indices, and so its seeds,
        again. Where all are given away a new name gets those of the one that has been away for longest."""
        base, reserved = self._bases.get(name, (0, -1))
        if count <= reserved:
            return base, []
        if count < 1:
            return None, []
        if len(self._bases) < self._most_hosts and self._next_base + count <= self._end_of_indices:
            base, self._next_base = self._next_base, self._next_base + count
            self._bases[name] = (base, count)
            return base, []
        here = {host.name for host in self.hosts.values()}
        away = (n for n, (_, least) in self._bases.items() if n not in here and least >= count)
        oldest = next(away, None)
        if oldest is None:
            return None, []
        self._fetched.pop(oldest, None)
        self._bases[name] = self._bases.pop(oldest)
        return self._bases[name][0], [Forget(oldest)]
