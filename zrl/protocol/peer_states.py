"""What may happen to a host or a worker in which state: all that is not in these tables is ignored, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType


class State(IntEnum):
    """Of a host or a worker."""

    NEW = 0  # unknown to the learner
    WELCOMED = 1  # a host that may start workers; a worker that builds its environments
    ATTACHING = 2  # a worker whose Attach is being looked at
    ATTACHED = 3  # a worker that may be granted slots
    DRAINING = 4  # asked to finish
    GONE = 5


class Event(IntEnum):
    """What a peer says, or what happens to it."""

    HELLO = 0
    ATTACH = 1
    ACCEPT = 2  # the collator accepts an Attach
    REFUSE = 3  # … or does not
    READY = 4
    BEAT = 5
    FETCH = 6
    REPORT = 7  # a host says that a worker is gone
    DRAIN = 8  # the learner wants to end
    BYE = 9
    LOSE = 10  # silence, a broken connection, its host's end


HOST_TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.NEW, Event.HELLO): State.WELCOMED,
        (State.WELCOMED, Event.HELLO): State.WELCOMED,  # the Welcome is sent again
        (State.WELCOMED, Event.BEAT): State.WELCOMED,
        (State.WELCOMED, Event.FETCH): State.WELCOMED,
        (State.WELCOMED, Event.REPORT): State.WELCOMED,
        (State.WELCOMED, Event.DRAIN): State.DRAINING,
        (State.WELCOMED, Event.BYE): State.GONE,
        (State.WELCOMED, Event.LOSE): State.GONE,
        (State.DRAINING, Event.BEAT): State.DRAINING,
        (State.DRAINING, Event.FETCH): State.DRAINING,
        (State.DRAINING, Event.REPORT): State.DRAINING,
        (State.DRAINING, Event.BYE): State.GONE,
        (State.DRAINING, Event.LOSE): State.GONE,
    }
)

WORKER_TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.NEW, Event.HELLO): State.WELCOMED,
        (State.WELCOMED, Event.HELLO): State.WELCOMED,
        (State.WELCOMED, Event.ATTACH): State.ATTACHING,
        (State.WELCOMED, Event.DRAIN): State.DRAINING,
        (State.WELCOMED, Event.BYE): State.GONE,
        (State.WELCOMED, Event.LOSE): State.GONE,
        (State.ATTACHING, Event.ACCEPT): State.ATTACHED,
        (State.ATTACHING, Event.REFUSE): State.GONE,
        (State.ATTACHING, Event.DRAIN): State.DRAINING,
        (State.ATTACHING, Event.BYE): State.GONE,
        (State.ATTACHING, Event.LOSE): State.GONE,
        (State.ATTACHED, Event.READY): State.ATTACHED,
        (State.ATTACHED, Event.DRAIN): State.DRAINING,
        (State.ATTACHED, Event.BYE): State.GONE,
        (State.ATTACHED, Event.LOSE): State.GONE,
        (State.DRAINING, Event.READY): State.DRAINING,
        (State.DRAINING, Event.REFUSE): State.GONE,
        (State.DRAINING, Event.BYE): State.GONE,
        (State.DRAINING, Event.LOSE): State.GONE,
    }
)
