"""What a worker makes of what it hears, without processes and sockets."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from zrl.errors import ProcessError
from zrl.nodes.page import Page
from zrl.nodes.worker import _Worker
from zrl.protocol import messages as m

RUN, ME = b"R" * 16, b"W" * 16


class Told:
    """A link over which these messages come."""

    def __init__(self, *messages: m.Message) -> None:
        self._messages = list(messages)

    def receive(self, timeout: float) -> m.Message | None:
        return self._messages.pop(0) if self._messages else None


class Job:
    run_id, incarnation = RUN, ME


@contextlib.contextmanager
def worker(*told: m.Message) -> Any:
    job: Any = Job()
    link: Any = Told(*told)
    with contextlib.ExitStack() as opened, Page.create(ME) as page:
        yield _Worker(job, page, link, opened)


def test_why_a_learner_refuses_is_shown_escaped() -> None:
    with (
        worker(m.Reject(RUN, ME, "spec", "\x1b]0;title\x07\nnext", False, "")) as it,
        pytest.raises(ProcessError) as no,
    ):
        it._answer(m.Attached, 1.0)
    assert str(no.value) == r"the learner refused this worker (spec): \x1b]0;title\x07\nnext"


def test_a_slot_that_is_not_there_is_not_granted() -> None:
    with worker(*(m.Release(RUN, ME, slot, 1) for slot in (2, 65534, 1))) as it:
        it._n_slots = 2
        grant = it._next_grant()
        assert grant is not None
        assert grant.slot == 1
        assert it.page.read().releases == 3
