"""Write ``docs/states.md`` from the tables of transitions in ``zrl.protocol``; ``--print`` shows it instead.

python scripts/make_states.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from zrl.protocol import peer_states, slots

PAGE = Path(__file__).parents[1] / "docs" / "states.md"

HEAD = """# States

<!-- made by scripts/make_states.py from zrl/protocol: do not edit -->

What may happen to a slot, a host and a worker. Anything else that a peer says is counted and has no effect; anything
else that the learner does itself is an error of ours.
"""

SLOTS = """
## Slots

Counted is what a transition adds to; `dropped` also under its reason. `zrl.protocol.slots` says what the events mean.

```text
        GRANT            READY           HOLD
 FREE ─────────► WORKER ───────► READY ───────► HELD
  ▲  ▲                             │ DROP        │ FREE
  │  └─────────────────────────────┘             │
  └──────────────────────────────────────────────┘
 LEAVE or LOSE, when the worker is gone: FREE, WORKER, READY ──► ENDED; HELD stays until FREE, then LEAVE ──► ENDED
 RETIRE, when it said Bye: as LEAVE, but READY stays until HOLD or DROP
```

"""

HOSTS = """
## Hosts

An empty cell: ignored. `REPORT` is a `Gone` message; `LOSE` is silence or a broken connection.

"""

WORKERS = """
## Workers

`ACCEPT` and `REFUSE` are the collator's answer to an `Attach`; `LOSE` also comes with the end of the host.

"""


def page() -> str:
    """The whole page."""
    hosts, workers = grid(peer_states.HOST_TRANSITIONS), grid(peer_states.WORKER_TRANSITIONS)
    return "".join((HEAD, SLOTS, slot_rows(), HOSTS, hosts, WORKERS, workers))


def slot_rows() -> str:
    rows = [
        (state.name, event.name, to.name, counter and f"`{counter}`")
        for (state, event), (to, counter) in slots.TRANSITIONS.items()
    ]
    return table(("state", "event", "next", "counted"), rows)


def grid(transitions: Mapping[tuple[peer_states.State, peer_states.Event], peer_states.State]) -> str:
    """One row a state, one column an event."""
    states = sorted({state for state, _ in transitions})
    events = sorted({event for _, event in transitions})

    def cell(state: peer_states.State, event: peer_states.Event) -> str:
        to = transitions.get((state, event))
        return to.name if to is not None else ""

    rows = [(state.name, *(cell(state, event) for event in events)) for state in states]
    return table(("", *(event.name for event in events)), rows)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(page(), end="")
    else:
        PAGE.write_text(page())
