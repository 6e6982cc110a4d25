"""Every message of the wire, as plain values: what its fields are, and the limits of each.

A message is a frozen dataclass with an integer `TAG`. Its fields, in order, are what stands in the header frame after
the tag (`zrl.net.codec`); the kind of each field (`Int`, `Text`, …) says what a receiver accepts. ``docs/protocol.md``
is the specification for people who write the other side.

Every message names the run and the incarnation it is about: that of the worker or host at the far end from the
learner. Both are 16 bytes, zeros where not yet known.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

PROTOCOL_VERSION = 1
ID_NBYTES = 16
NO_ID = bytes(ID_NBYTES)

SMALL_HEADER = 4 << 10  # bytes
LARGE_HEADER = 64 << 10  # bytes: the messages that carry a specification, a traceback or a diff

_MOST_SLOTS = (1 << 16) - 1
_MOST_COUNT = (1 << 63) - 1
MOST_SECONDS = 1e9  # 31 years: sums of them stay finite
_MOST_TEXT = 60_000  # bytes of a traceback: leaves room for the other fields of a large header


@dataclass(frozen=True, slots=True)
class Int:
    """A whole number from `least` to `most`; a bool is none."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Bool:
    """True or False; 0 and 1 are neither."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """A float from 0 to `MOST_SECONDS`; a whole number is none."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text of at most `most` bytes of UTF-8."""

    most: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blob:
    """Exactly `size` bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class Texts:
    """At most `most` texts of at most `each` bytes."""

    most: int
    each: int


@dataclass(frozen=True, slots=True)
class Plain:
    """Whole numbers, texts and lists of them, lists in lists at most `depth` deep. Means something elsewhere."""

    depth: int


@dataclass(frozen=True, slots=True)
class Rows:
    """At most `most` rows, each a `row` (a NamedTuple) of these kinds."""

    row: type[Any]
    kinds: tuple[Kind, ...]
    most: int


Kind = Int | Bool | Seconds | Text | Choice | Blob | Texts | Plain | Rows


def _is(kind: Kind) -> Any:
    return field(metadata={"kind": kind})


def _id() -> Any:
    return _is(Blob(ID_NBYTES))


def kinds_of(message: type[Message]) -> dict[str, Kind]:
    """The kind of every field of a message, in the order of the wire."""
    return {f.name: f.metadata["kind"] for f in dataclasses.fields(message)}


#: What a worker is doing, as its host sees it on their shared page.
PHASES = ("build", "wait", "collect", "adopt")
ROLES = ("host", "worker")
WORKER_MODES = ("train", "eval")

#: Why a Hello or an Attach was refused.
REJECT_CODES = (
    "version",  # another version of this protocol
    "name_taken",  # a host of that name, or a worker of that index, is alive
    "unknown_host",  # a worker whose host has not been welcomed (yet)
    "spec",  # fragments unlike those of the run; the text says in which fields
    "ring",  # another number or size of slots than the run's
    "full",  # no room for another host or worker
    "draining",  # the run is about to end
    "redirect",  # go to `url`
)

#: Why a worker is no more, as its host knows.
GONE_CAUSES = (
    "drained",  # it was asked to end, and did
    "error",  # an exception; error and traceback say which
    "exit",  # it ended with `status`
    "signal",  # it was ended by signal `-status`
    "stalled",  # it stood still in `collect` and was killed
    "start_timeout",  # it stood still in `build` and was killed
    "revoked",  # killed on the learner's word
    "disconnected",  # its connection broke, so that its incarnation ended
)


@dataclass(frozen=True, slots=True)
class Message:
    """What all messages begin with."""

    TAG: ClassVar[int] = -1
    LIMIT: ClassVar[int] = SMALL_HEADER  # bytes of the header frame

    run_id: bytes = _id()
    incarnation: bytes = _id()


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Host or worker → learner, first of all. The fields up to `protocol` stay as they are in every version.

    `process` are random bytes that the sender's process keeps for its life. `host` is the incarnation of the worker's
    host, zeros in a host's own Hello; `index` is that of the worker in the run, `generation` counts its restarts;
    `count` is how many workers a host will keep, 0 in a worker's Hello.
    """

    TAG: ClassVar[int] = 1
    protocol: int = _is(Int(0, 1 << 31))
    role: str = _is(Choice(ROLES))
    name: str = _is(Text(64))
    versions: tuple[str, ...] = _is(Texts(16, 64))
    process: bytes = _id()
    boot_id: str = _is(Text(64))
    host: bytes = _id()
    index: int = _is(Int(0, _MOST_SLOTS))
    generation: int = _is(Int(0, 1 << 31))
    count: int = _is(Int(0, 4096))


@dataclass(frozen=True, slots=True)
class OtherVersion(Message):
    """What is understood of a Hello of another version. Never sent."""

    protocol: int = _is(Int(0, 1 << 31))


@dataclass(frozen=True, slots=True)
class HelloAgain(Message):
    """Learner → a peer that it does not know: a worker exits, a host starts over."""

    TAG: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Learner → host or worker: the run. `entropy` is an unsigned big-endian number; `n_slots` is K."""

    TAG: ClassVar[int] = 3
    n_steps: int = _is(Int(1, 1 << 31))
    n_columns: int = _is(Int(1, 1 << 31))
    n_slots: int = _is(Int(1, _MOST_SLOTS))
    sticky: bool = _is(Bool())
    keep_final_obs: bool = _is(Bool())
    info_keys: tuple[str, ...] = _is(Texts(24, 64))
    worker_mode: str = _is(Choice(WORKER_MODES))
    entropy: bytes = _id()
    index_base: int = _is(Int(0, _MOST_SLOTS))
    env: str = _is(Text(256))
    actor: str = _is(Text(256))
    version: int = _is(Int(1, _MOST_COUNT))
    pub_url: str = _is(Text(256))


@dataclass(frozen=True, slots=True)
class Reject(Message):
    """Learner → host or worker: no. `retry` says whether the same may succeed later; `url` is for a redirect.

    Its layout is the same in every version, so that a peer of another one can read why it was refused.
    """

    TAG: ClassVar[int] = 4
    LIMIT: ClassVar[int] = LARGE_HEADER
    code: str = _is(Choice(REJECT_CODES))
    text: str = _is(Text(_MOST_TEXT))
    retry: bool = _is(Bool())
    url: str = _is(Text(256))


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """Worker → learner: my fragments look like this, and my ring is here; `nbytes` 0: nobody can open it. `spec` is
    `FragmentSpec.to_plain()`."""

    TAG: ClassVar[int] = 5
    LIMIT: ClassVar[int] = LARGE_HEADER
    spec: list[Any] = _is(Plain(6))  # noqa: RUF009 - a field, as all the others
    digest: bytes = _id()
    n_slots: int = _is(Int(1, _MOST_SLOTS))
    slot_nbytes: int = _is(Int(1, 1 << 47))
    pid: int = _is(Int(0, 1 << 31))
    fd: int = _is(Int(-1, 1 << 20))
    nbytes: int = _is(Int(0, 1 << 62))
    boot_id: str = _is(Text(64))
    path: str = _is(Text(256))


@dataclass(frozen=True, slots=True)
class Attached(Message):
    """Learner → worker: your fragments are read from your ring (`local`), or are to be sent as payloads."""

    TAG: ClassVar[int] = 6
    local: bool = _is(Bool())


@dataclass(frozen=True, slots=True)
class Release(Message):
    """Learner → worker: slot `slot` is yours; begin its fragment with weights of at least `least_version`."""

    TAG: ClassVar[int] = 7
    slot: int = _is(Int(0, _MOST_SLOTS - 1))
    least_version: int = _is(Int(1, _MOST_COUNT))


@dataclass(frozen=True, slots=True)
class Ready(Message):
    """Worker → learner: slot `slot` holds a fragment. Its bytes follow as payload where the worker is remote.

    `seq` counts the fragments of this incarnation from 1; `version` is that of the weights; the times are seconds
    spent in the stages of this fragment, `wait` before it began, `total` all of it. `rebuilt` counts the environments
    that were made anew since the last Ready: for each a fragment was begun and thrown away.
    """

    TAG: ClassVar[int] = 8
    slot: int = _is(Int(0, _MOST_SLOTS - 1))
    seq: int = _is(Int(1, _MOST_COUNT))
    version: int = _is(Int(1, _MOST_COUNT))
    env: float = _is(Seconds())
    actor: float = _is(Seconds())
    write: float = _is(Seconds())
    reset: float = _is(Seconds())
    wait: float = _is(Seconds())
    total: float = _is(Seconds())
    n_env_steps: int = _is(Int(0, _MOST_COUNT))
    rebuilt: int = field(default=0, metadata={"kind": Int(0, _MOST_SLOTS)})


class ChildBeat(NamedTuple):
    """One child in a Beat: environment calls done, phase (index into `PHASES`), last seq sent, Releases received."""

    incarnation: bytes
    calls: int
    phase: int
    sent: int
    received: int


_COUNT = Int(0, _MOST_COUNT)


@dataclass(frozen=True, slots=True)
class Beat(Message):
    """Host → learner, once a second: all is well, and this is what my children say. Several messages for many."""

    TAG: ClassVar[int] = 9
    children: tuple[ChildBeat, ...] = _is(
        Rows(ChildBeat, (Blob(ID_NBYTES), _COUNT, Int(0, len(PHASES) - 1), _COUNT, _COUNT), 60)
    )


@dataclass(frozen=True, slots=True)
class Gone(Message):
    """Host → learner: `worker` (an incarnation) is no more. `env_index` is -1 where no environment is to blame."""

    TAG: ClassVar[int] = 10
    LIMIT: ClassVar[int] = LARGE_HEADER
    worker: bytes = _id()
    index: int = _is(Int(0, _MOST_SLOTS))
    cause: str = _is(Choice(GONE_CAUSES))
    status: int = _is(Int(-128, 255))
    env_index: int = _is(Int(-1, 1 << 31))
    error: str = _is(Text(2048))
    traceback: str = _is(Text(_MOST_TEXT))


@dataclass(frozen=True, slots=True)
class Revoke(Message):
    """Learner → host: kill `worker` (an incarnation) and start another in its place."""

    TAG: ClassVar[int] = 11
    worker: bytes = _id()
    reason: str = _is(Text(256))


@dataclass(frozen=True, slots=True)
class Fetch(Message):
    """Host → learner: send me the newest weights."""

    TAG: ClassVar[int] = 12


@dataclass(frozen=True, slots=True)
class Weights(Message):
    """Learner → host, in answer to Fetch; `n_chunks` raw frames of `nbytes` bytes in all follow. Also on PUB.

    `digest` is that of the weights' manifest: names, dtypes, shapes. A host hands it on; its workers compare.
    """

    TAG: ClassVar[int] = 13
    version: int = _is(Int(1, _MOST_COUNT))
    nbytes: int = _is(Int(0, 1 << 47))
    digest: bytes = _id()
    crc32: int = _is(Int(0, (1 << 32) - 1))
    n_chunks: int = _is(Int(0, 1 << 31))


@dataclass(frozen=True, slots=True)
class Drain(Message):
    """Learner → host and worker: finish what you have in hand, then leave."""

    TAG: ClassVar[int] = 14


@dataclass(frozen=True, slots=True)
class Bye(Message):
    """Host or worker → learner: nothing more will come from me."""

    TAG: ClassVar[int] = 15


@dataclass(frozen=True, slots=True)
class ByeAck(Message):
    """Learner → host or worker: all that you sent has arrived; close."""

    TAG: ClassVar[int] = 16


MESSAGES: tuple[type[Message], ...] = (
    *(Hello, HelloAgain, Welcome, Reject, Attach, Attached, Release, Ready),
    *(Beat, Gone, Revoke, Fetch, Weights, Drain, Bye, ByeAck),
)


def clipped(text: str, most: int) -> str:
    """`text` as valid UTF-8 of at most `most` bytes; of a longer one the end is kept (a traceback ends with why)."""
    data = text.encode("utf-8", "replace")
    return data[-most:].decode("utf-8", "ignore") if len(data) > most else data.decode("utf-8")


def printable(text: str) -> str:
    """A peer's text for a terminal or a log: one line, with everything that is not printable escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
