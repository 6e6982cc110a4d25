"""Messages survive the way to bytes and back; whatever else arrives is a ProtocolError and nothing more."""

from __future__ import annotations

import dataclasses
import math
import random
import time

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zrl.errors import ProtocolError
from zrl.net.codec import decode, decode_weights, encode, encode_weights
from zrl.protocol import messages as m

RUN, ME = b"R" * 16, b"M" * 16


def values_of(kind: m.Kind, long: bool = False) -> st.SearchStrategy[object]:
    """Values that a kind allows; with `long` only what takes most bytes."""
    match kind:
        case m.Int(least, most):
            return st.just(most) if long else st.integers(least, most)
        case m.Bool():
            return st.booleans()
        case m.Seconds():
            return st.floats(0.0, m.MOST_SECONDS)
        case m.Text(most):
            return st.just("x" * most) if long else st.text(max_size=most // 4)
        case m.Choice(options):
            return st.just(max(options, key=len)) if long else st.sampled_from(options)
        case m.Blob(size):
            return st.binary(min_size=size, max_size=size)
        case m.Texts(most, each):
            if long:
                return st.just(("x" * each,) * most)
            return st.lists(st.text(max_size=each // 4), max_size=most).map(tuple)
        case m.Plain():
            leaves = NUMBERS | st.text(max_size=9)
            tree = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=9)
            return st.just([]) if long else st.lists(tree.filter(lambda x: depth(x) < kind.depth), max_size=4)
        case m.Rows(row, kinds, most):
            one = st.tuples(*(values_of(k, long) for k in kinds)).map(lambda values: row(*values))
            return st.lists(one, min_size=most if long else 0, max_size=most if long else 3).map(tuple)


def depth(tree: object) -> int:
    return 1 + max(map(depth, tree), default=0) if isinstance(tree, list) else 0


def any_message(long: bool = False) -> st.SearchStrategy[m.Message]:
    def one(kind: type[m.Message]) -> st.SearchStrategy[m.Message]:
        fields = {name: values_of(k, long) for name, k in m.kinds_of(kind).items()}
        if kind is m.Hello:
            fields["protocol"] = st.just(m.PROTOCOL_VERSION)
        return st.builds(kind, **fields)

    return st.sampled_from(m.MESSAGES).flatmap(one)


SAMPLES = [
    m.Hello(m.NO_ID, ME, m.PROTOCOL_VERSION, "host", "left", ("zrl 0.1",), m.NO_ID, "boot", m.NO_ID, 0, 0, 4),
    m.Attach(RUN, ME, [1, [["a", 2, [3]]]], ME, 2, 64, 1, 3, 8192, "boot", ""),
    m.Release(RUN, ME, 3, 7),
    m.Ready(RUN, ME, 3, 9, 7, 0.1, 0.2, 0.3, 0.4, 0.5, 1.5, 1024),
    m.Beat(RUN, ME, (m.ChildBeat(ME, 1, 2, 3, 4),)),
    m.Gone(RUN, ME, ME, 0, "error", 1, -1, "ValueError: ü", "Traceback"),
    m.Reject(RUN, ME, "spec", "text", False, ""),
    m.Bye(RUN, ME),
]


def refuses(data: bytes) -> bool:
    try:
        decode(data)
    except ProtocolError:
        return True
    return False


@given(any_message())
def test_there_and_back(message: m.Message) -> None:
    assert decode(encode(message)) == message


@given(any_message(long=True))
@settings(max_examples=60)
def test_the_longest_message_fits_its_header(message: m.Message) -> None:
    assert len(encode(message)) <= message.LIMIT


def test_tags_are_unique_small_and_dense() -> None:
    assert [message.TAG for message in m.MESSAGES] == list(range(1, len(m.MESSAGES) + 1))
    assert {m.Attach, m.Gone, m.Reject} == {x for x in m.MESSAGES if x.LIMIT == m.LARGE_HEADER}


def test_a_child_takes_64_bytes_at_most() -> None:
    most = m.ChildBeat(ME, (1 << 63) - 1, 3, (1 << 63) - 1, (1 << 63) - 1)
    one, two = (len(encode(m.Beat(RUN, ME, (most,) * n))) for n in (1, 2))
    assert two - one <= 64


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    refuses(data)


@given(st.sampled_from(SAMPLES), st.data())
def test_a_damaged_message(message: m.Message, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    refuses(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


def test_seeded_fuzz() -> None:
    rng = random.Random(3)
    samples = [encode(message) for message in SAMPLES]
    for _ in range(20_000):
        raw = bytearray(rng.choice(samples))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        refuses(bytes(raw))
        refuses(bytes([0x90 | rng.randrange(16), rng.randrange(20)]) + rng.randbytes(rng.randrange(90)))


NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1)
JSONS = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | NUMBERS, inner),
    max_leaves=20,
)


def test_lists_that_announce_more_than_follows_cost_nothing() -> None:
    """msgpack makes a list as long as it is announced to be, before it looks for what is in it."""
    data = b"\x93\x0f" + b"\xdc\xff\xff" * 1000
    started = time.process_time()
    for _ in range(100):
        refuses(data)
    assert time.process_time() - started < 2.0  # it would be 6 s


@given(st.integers(0, 20), st.lists(JSONS, max_size=16))
def test_well_formed_msgpack_that_is_no_message(tag: int, fields: list[object]) -> None:
    refuses(msgpack.packb([tag, *fields]))


def _changed(message: m.Message, **changes: object) -> bytes:
    values = {name: getattr(message, name) for name in m.kinds_of(type(message))} | changes
    return bytes(msgpack.packb([message.TAG, *values.values()]))


RELEASE, READY, ATTACH = SAMPLES[2], SAMPLES[3], SAMPLES[1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91",
        b"\xc0\xc0",
        msgpack.packb([]),
        msgpack.packb([99, RUN, ME]),
        msgpack.packb([0, RUN, ME]),
        msgpack.packb([255, RUN, ME]),
        msgpack.packb({7: 1}),
        msgpack.packb([7.0, RUN, ME, 0, 1]),
        encode(RELEASE) + b"\0",
        encode(RELEASE)[:-1],
        msgpack.packb([7, RUN, ME, 0]),
        msgpack.packb([7, RUN, ME, 0, 1, 2]),
        _changed(RELEASE, slot=True),
        _changed(RELEASE, slot=-1),
        _changed(RELEASE, slot=1.0),
        _changed(RELEASE, slot=65535),
        _changed(RELEASE, least_version=0),
        _changed(RELEASE, least_version=1 << 63),
        _changed(RELEASE, run_id=RUN + b"x"),
        _changed(RELEASE, run_id="R" * 16),
        _changed(RELEASE, run_id=None),
        _changed(READY, total=1),
        _changed(READY, total=-0.5),
        _changed(READY, total=math.nan),
        _changed(READY, total=math.inf),
        _changed(READY, total=2 * m.MOST_SECONDS),
        _changed(ATTACH, boot_id=b"boot"),
        _changed(ATTACH, boot_id="x" * 65),
        _changed(ATTACH, boot_id="ü" * 33),
        _changed(ATTACH, spec=[1.5]),
        _changed(ATTACH, spec=[True]),
        _changed(ATTACH, spec=[[[[[[[]]]]]]]),
        _changed(ATTACH, spec={}),
        _changed(ATTACH, spec=[{}]),
        _changed(ATTACH, spec=[msgpack.ExtType(1, b"")]),
        _changed(ATTACH, spec=[msgpack.Timestamp(1)]),
        _changed(ATTACH, boot_id=msgpack.ExtType(1, b"x")),
        b"\x9c\x05" + b"\x91" * 60_000,  # deep
        b"\x9c\x05" + b"\xdd\xff\xff\xff\xff" * 3,  # a list of 2**32 - 1
        b"\x9c\x05" + b"\xdb\xff\xff\xff\xff" + b"x" * 9,  # a text of that length
        b"\x9c\x05" + b"\xc6\xff\xff\xff\xff" + b"x" * 9,
        b"\x9c\x05" + b"\xdf\xff\xff\xff\xff" + b"x" * 9,
        b"\x9c\x05" + b"\xc9\xff\xff\xff\xff" + b"x" * 9,
        _changed(ATTACH).replace(b"boot", b"\xff\xfe\xfd\xfc"),  # no UTF-8
        _changed(SAMPLES[4], children=[[ME, 1, 4, 0, 0]]),
        _changed(SAMPLES[4], children=[[ME, 1, 1, 0]]),
        _changed(SAMPLES[4], children=[[ME, 1, 1, 0, 0]] * 61),
        _changed(SAMPLES[5], cause="boredom"),
        _changed(SAMPLES[5], cause=["error"]),
    ],
)
def test_odd_ones_are_refused_quickly(data: bytes) -> None:
    begin = time.perf_counter()
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert len(str(caught.value)) <= 300
    assert time.perf_counter() - begin < 0.5


def test_a_header_beyond_its_limit_is_not_unpacked() -> None:
    with pytest.raises(ProtocolError, match="at most 4096"):
        decode(_changed(RELEASE, slot="x" * 5000))
    with pytest.raises(ProtocolError, match="bytes"):
        decode(bytes(m.LARGE_HEADER + 1))


def test_a_hello_of_another_version_is_understood_as_such() -> None:
    raw = msgpack.packb([m.Hello.TAG, RUN, ME, 77, "new", "fields", 1.5])
    assert decode(raw) == m.OtherVersion(RUN, ME, 77)
    with pytest.raises(ProtocolError):
        decode(msgpack.packb([m.Hello.TAG, RUN, ME]))


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (m.Release(RUN, ME, -1, 1), "slot"),
        (m.Release(b"", ME, 0, 1), "run_id"),
        (m.Release(RUN, ME, True, 1), "slot"),
        (m.Reject(RUN, ME, "spec", "\ud800", False, ""), "text"),
        (m.OtherVersion(RUN, ME, 2), "OtherVersion"),
        (dataclasses.replace(SAMPLES[1], spec=["x" * 70_000]), "at most"),  # type: ignore[call-arg]
    ],
)
def test_what_would_be_refused_is_not_sent(message: m.Message, word: str) -> None:
    with pytest.raises(ProtocolError, match=word):
        encode(message)


def test_clipped_text_fits_and_keeps_the_end() -> None:
    assert m.clipped("Traceback … ValueError", 10) == "ValueError"
    assert m.clipped("ü" * 9, 5) == "üü"
    assert m.clipped("a\ud800b", 9) == "a?b"


def test_published_weights_are_one_frame() -> None:
    payload = bytes(range(200))
    message = m.Weights(RUN, m.NO_ID, 5, 200, bytes(16), 1, 1)
    frame = encode_weights(message, payload)
    found, bytes_found = decode_weights(frame)
    assert (found, bytes(bytes_found)) == (message, payload)
    for bad in (frame[:-1], frame + b"x", b"status\0\0{}", b"", frame[:8], frame[:9], frame[:12]):
        with pytest.raises(ProtocolError):
            decode_weights(bad)


@pytest.mark.parametrize("message", [RELEASE, READY])
def test_the_messages_of_the_hot_loop_take_no_detours(message: m.Message) -> None:
    """15 µs there and back on the machine it was measured on; of CPU time, ten times as many say more of the code than
    of the machine."""
    n, best = 2000, math.inf
    for _ in range(7):
        begin = time.process_time()
        for _ in range(n):
            decode(encode(message))
        best = min(best, (time.process_time() - begin) / n)
    assert best < 150e-6
