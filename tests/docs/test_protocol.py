"""docs/protocol.md names every message, tag, field, type and limit as the code has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from zrl.net import sockets
from zrl.protocol import messages as m

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def described(kind: m.Kind) -> str:
    match kind:
        case m.Int(least, most):
            return f"int {least} … {most}"
        case m.Bool():
            return "bool"
        case m.Seconds():
            return f"float, 0 … {m.MOST_SECONDS:g}"
        case m.Text(most):
            return f"str ≤ {most}"
        case m.Choice(options):
            return "one of " + ", ".join(f"`{x}`" for x in options)
        case m.Blob(size):
            return f"bin {size}"
        case m.Texts(most, each):
            return f"array ≤ {most} of str ≤ {each}"
        case m.Plain(depth):
            return f"array of int, str and such arrays, ≤ {depth} deep"
        case m.Rows(_, kinds, most):
            return f"array ≤ {most} of [{'; '.join(described(k) for k in kinds)}]"


def section(message: type[m.Message]) -> str:
    """The heading of a message and the table of its own fields."""
    lines = [f"### {message.TAG} {message.__name__}"]
    own = list(m.kinds_of(message).items())[2:]
    rows = [f"| {at} | `{name}` | {described(kind)} |" for at, (name, kind) in enumerate(own, start=3)]
    head = ["| element | field | type |", "| --- | --- | --- |"] if rows else []
    return "\n".join([*lines, "", *head, *rows])


@pytest.mark.parametrize("message", m.MESSAGES)
def test_the_page_has_every_message_as_it_is(message: type[m.Message]) -> None:
    assert section(message).rstrip() in PAGE


def test_the_page_has_the_version_and_the_limits() -> None:
    assert f"Version **{m.PROTOCOL_VERSION}**" in PAGE
    assert f"at most {sockets.MAX_FRAME} bytes" in PAGE
    for limit in (m.SMALL_HEADER, m.LARGE_HEADER):
        assert f"{limit} bytes" in PAGE
    assert ", ".join(f"`{i}` {name}" for i, name in enumerate(m.PHASES)) in PAGE
