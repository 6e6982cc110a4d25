"""Messages to header frames and back: ``msgpack([tag, *fields])``.

What arrives is not trusted. In this order: its length; the tag, from the first bytes, and with it the length and the
number of fields that this message may have; msgpack with limits; then type and range of every field. Whatever is odd
is a `ProtocolError`, and nothing else leaves `decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgpack

from zrl.errors import ProtocolError
from zrl.protocol.messages import (
    LARGE_HEADER,
    MESSAGES,
    MOST_SECONDS,
    PROTOCOL_VERSION,
    Blob,
    Bool,
    Choice,
    Hello,
    Int,
    Kind,
    Message,
    OtherVersion,
    Plain,
    Rows,
    Seconds,
    Text,
    Texts,
    Weights,
    kinds_of,
)

TOPIC_WEIGHTS = b"weights\0"
TOPIC_STATUS = b"status\0\0"

#: From a field as msgpack gives it to the field of the message; raises ValueError.
Check = Callable[[Any], Any]


def encode(message: Message) -> bytes:
    """The header frame of a message.

    Raises:
        ProtocolError: a field that `decode` would refuse, or a message that is too long; names the field.
    """
    try:
        form = _FORMS[message.TAG]
        values = form.values(message)
        for check, value in zip(form.checks, values, strict=True):
            check(value)
        data: bytes = msgpack.packb((message.TAG, *values))
    except _ODD as error:
        raise ProtocolError(f"{type(message).__name__} cannot be sent: {_why(message, error)}") from None
    if len(data) > form.limit:
        raise ProtocolError(f"{type(message).__name__} cannot be sent: {len(data)} bytes, at most {form.limit}")
    return data


def decode(data: bytes) -> Message:
    """The message in a header frame; `OtherVersion` for the Hello of a peer that speaks another version.

    Raises:
        ProtocolError: anything but a message; nothing else is ever raised.
    """
    try:
        tag, arity = _peek(data)
        form = _FORMS[tag]
        if len(data) > form.limit:
            raise ValueError(f"{len(data)} bytes, at most {form.limit}")
        if arity != form.arity and tag != Hello.TAG:  # a Hello of another version may have other fields
            raise ValueError(f"{arity} elements, expected {form.arity}")
        values = _unpack(data, form.limit)
        if tag == Hello.TAG and values[3] != PROTOCOL_VERSION:
            return _other_version(values)
        del values[0]
        return form.make(*[check(value) for check, value in zip(form.checks, values, strict=True)])
    except _ODD as error:
        raise ProtocolError(f"not a message: {type(error).__name__}: {error}"[:300]) from None


def encode_weights(message: Weights, payload: bytes | memoryview) -> bytes:
    """The one frame in which weights are published: topic, length of the header (u16, big-endian), header, payload."""
    header = encode(message)
    return b"".join((TOPIC_WEIGHTS, len(header).to_bytes(2, "big"), header, payload))


def decode_weights(frame: bytes) -> tuple[Weights, memoryview]:
    """What `encode_weights` put together; the payload is not copied.

    Raises:
        ProtocolError: another topic, a damaged header, or a payload of another length than the header says.
    """
    start = len(TOPIC_WEIGHTS)
    if frame[:start] != TOPIC_WEIGHTS or len(frame) < start + 2:
        raise ProtocolError("not a frame of weights: another topic")
    end = start + 2 + int.from_bytes(frame[start : start + 2], "big")
    message = decode(frame[start + 2 : end])
    payload = memoryview(frame)[end:]
    if not isinstance(message, Weights) or message.nbytes != len(payload):
        raise ProtocolError(f"a frame of weights with {len(payload)} bytes of payload, announced: {message}"[:300])
    return message, payload


#: What msgpack, UTF-8 and the checks raise, a full memory included; RecursionError is a RuntimeError.
_ODD = (ValueError, TypeError, LookupError, OverflowError, RuntimeError, MemoryError, msgpack.UnpackException)


def _peek(data: bytes) -> tuple[int, int]:
    """Tag and number of elements, from the first bytes, before anything is unpacked."""
    if not 2 <= len(data) <= LARGE_HEADER:
        raise ValueError(f"{len(data)} bytes")
    first = data[0]
    if 0x90 <= first <= 0x9F:
        return data[1], first & 0x0F
    if first == 0xDC and len(data) > 3:
        return data[3], data[1] << 8 | data[2]
    raise ValueError("no list")


def _unpack(data: bytes, limit: int) -> list[Any]:
    values: list[Any] = msgpack.unpackb(
        data,
        raw=False,
        strict_map_key=True,
        max_str_len=limit,
        max_bin_len=limit,
        max_array_len=len(data),  # an item takes a byte at least; msgpack makes a list of the length that is announced
        max_map_len=0,
        max_ext_len=0,
        ext_hook=_no_extension,
    )
    return values


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError("an extension type")


def _other_version(values: list[Any]) -> OtherVersion:
    checks = (_check_of(kind) for kind in kinds_of(OtherVersion).values())
    return OtherVersion(*[check(value) for check, value in zip(checks, values[1:], strict=False)])


def _why(message: Message, error: Exception) -> str:
    """Which field is at fault: found only once something is."""
    for name, kind in kinds_of(type(message)).items():
        try:
            _check_of(kind)(getattr(message, name))
        except _ODD as found:
            return f"{name}: {found}"
    return str(error)


# One check for every kind of field. Each is made once per field, when this module loads: the limits are in closures,
# where a call finds them fastest.


def _check_of(kind: Kind) -> Check:
    return _MAKERS[type(kind)](kind)


def _int(kind: Int) -> Check:
    least, most = kind.least, kind.most

    def check(x: Any) -> Any:
        if type(x) is int and least <= x <= most:  # not isinstance: True is an int
            return x
        raise ValueError(f"expected a whole number from {least} to {most}, found {_show(x)}")

    return check


def _bool(kind: Bool) -> Check:
    def check(x: Any) -> Any:
        if x is True or x is False:
            return x
        raise ValueError(f"expected true or false, found {_show(x)}")

    return check


def _seconds(kind: Seconds) -> Check:
    def check(x: Any) -> Any:
        if type(x) is float and 0.0 <= x <= MOST_SECONDS:  # both are false for NaN
            return x
        raise ValueError(f"expected a float from 0 to {MOST_SECONDS:g}, found {_show(x)}")

    return check


def _text(kind: Text) -> Check:
    most = kind.most

    def check(x: Any) -> Any:
        if type(x) is str and len(x) <= most and (x.isascii() or len(x.encode()) <= most):
            return x
        raise ValueError(f"expected a text of at most {most} bytes, found {_show(x)}")

    return check


def _choice(kind: Choice) -> Check:
    options = {x: x for x in kind.options}

    def check(x: Any) -> Any:
        if type(x) is str and x in options:
            return options[x]
        raise ValueError(f"expected one of {', '.join(options)}, found {_show(x)}")

    return check


def _blob(kind: Blob) -> Check:
    size = kind.size

    def check(x: Any) -> Any:
        if type(x) is bytes and len(x) == size:
            return x
        raise ValueError(f"expected {size} bytes, found {_show(x)}")

    return check


def _texts(kind: Texts) -> Check:
    each, most = _text(Text(kind.each)), kind.most

    def check(x: Any) -> Any:
        if (type(x) is list or type(x) is tuple) and len(x) <= most:
            return tuple(each(item) for item in x)
        raise ValueError(f"expected a list of at most {most} texts, found {_show(x)}")

    return check


def _plain(kind: Plain) -> Check:
    def check(x: Any) -> Any:
        if type(x) is not list:
            raise ValueError(f"expected a list, found {_show(x)}")
        level, depth = [x], 1
        while level:  # level by level: what is too deep is never descended into
            for item in (item for one in level for item in one):
                if type(item) not in (int, str, list):
                    raise ValueError(f"expected whole numbers, texts and lists, found {_show(item)}")
            level, depth = [item for one in level for item in one if type(item) is list], depth + 1
            if level and depth > kind.depth:
                raise ValueError(f"lists nested more than {kind.depth} deep")
        return x

    return check


def _rows(kind: Rows) -> Check:
    checks = [_check_of(k) for k in kind.kinds]

    def check(x: Any) -> Any:
        if not (isinstance(x, list | tuple) and len(x) <= kind.most):
            raise ValueError(f"expected a list of at most {kind.most} rows, found {_show(x)}")
        return tuple(row(item) for item in x)

    def row(x: Any) -> Any:
        if not (isinstance(x, list | tuple) and len(x) == len(checks)):
            raise ValueError(f"expected a row of {len(checks)}, found {_show(x)}")
        return kind.row(*[one(item) for one, item in zip(checks, x, strict=True)])

    return check


def _show(x: Any) -> str:
    """A little of a value that nobody knows: `repr` alone could be as long as the message."""
    text = ascii(x) if type(x) in (int, float, bool, type(None)) else f"{type(x).__name__} {x[:20]!a}"
    return text[:60]


_MAKERS: dict[type[Any], Callable[[Any], Check]] = {
    Int: _int,
    Bool: _bool,
    Seconds: _seconds,
    Text: _text,
    Choice: _choice,
    Blob: _blob,
    Texts: _texts,
    Plain: _plain,
    Rows: _rows,
}


class _Form:
    """What is needed to pack and unpack one message."""

    __slots__ = ("arity", "checks", "limit", "make", "values")

    def __init__(self, message: type[Message]) -> None:
        kinds = kinds_of(message)
        self.make: Callable[..., Message] = message
        self.limit = message.LIMIT
        self.arity = 1 + len(kinds)
        self.checks = [_check_of(kind) for kind in kinds.values()]
        self.values: Callable[[Message], tuple[Any, ...]] = attrgetter(*kinds)


_FORMS = {message.TAG: _Form(message) for message in MESSAGES}
