"""The feed: columns where they belong, buffers valid for as long as promised, and nothing that hangs or is left."""

from __future__ import annotations

import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.nodes.streams import Fake
from zrl.data.batch import FragmentMeta
from zrl.data.fragment import Array, Slot
from zrl.data.ring import Ring
from zrl.data.spec import ArraySpec, FragmentSpec
from zrl.errors import ClosedError, WorkerError
from zrl.nodes.buffers import CudaBuffers, HostBuffers, empty_leaves, lay_out, staged_leaves
from zrl.nodes.feed import Feed, Filled

T, B, P = 4, 3, 2
DEADLINE = 10.0
F32 = ArraySpec("float32")
SPEC = FragmentSpec.build(
    T,
    B,
    obs={"image": ArraySpec("uint8", (5, 2)), "rest": (ArraySpec("float64"), [ArraySpec("int16", (3,))])},
    act=ArraySpec("int64"),
    actor={"value": F32, "logits": ArraySpec("float32", (2,))},
    hx=(ArraySpec("float32", (1, 7)), {"c": ArraySpec("float32", (2, 5))}),
    env={"x": ArraySpec("bool")},
    keep_final_obs=True,
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def fragment(seed: int, spec: FragmentSpec = SPEC) -> Slot:
    slot, rng = Slot(spec), np.random.default_rng(seed)
    for a in slot.arrays:
        a[...] = rng.integers(0, 2 if a.dtype == bool else 100, a.shape)
    return slot


def fragments(batch_id: int) -> list[Slot]:
    return [fragment(100 * batch_id + i) for i in range(P)]


def metas(batch_id: int) -> list[FragmentMeta]:
    return [FragmentMeta(1, i, batch_id) for i in range(P)]


def expected(batch_id: int) -> list[Array]:
    """What the user must find: a new copy of the same fragments, side by side along dim 1."""
    leaves = zip(*(slot.arrays for slot in fragments(batch_id)), strict=True)
    return [np.concatenate(parts, axis=1) for parts in leaves]


def found(filled: Filled) -> list[torch.Tensor]:
    record = filled.record
    trees = {f"state.{name}": tree for name, tree in record.state._asdict().items()} | vars(record)
    leaves: list[Any] = []
    for f in SPEC.fields.values():
        leaves += f.tree.flatten_up_to(trees[f.name])
    return leaves


def check(filled: Filled, batch_id: int) -> None:
    assert filled.batch_id == batch_id
    assert filled.metas == tuple(metas(batch_id))
    for x, y in zip(found(filled), expected(batch_id), strict=True):
        np.testing.assert_array_equal(x.cpu().numpy(), y)


class Bench:
    """A feed and what it copied; sources are poisoned as soon as the feed says that it has their bytes."""

    def __init__(self, device: str = "cpu") -> None:
        self.copied: list[int] = []
        self.sources: dict[int, list[Slot]] = {}
        self.feed = Feed(P, torch.device(device), on_copied=self.on_copied)
        self.feed.begin(SPEC)

    def on_copied(self, batch_id: int) -> None:
        assert threading.current_thread().name == "zrl-feed"
        self.copied.append(batch_id)
        for slot in self.sources.pop(batch_id):
            slot.poison()

    def submit(self, batch_id: int) -> None:
        self.sources[batch_id] = fragments(batch_id)
        self.feed.submit(batch_id, self.sources[batch_id], metas(batch_id))

    def take(self) -> Filled:
        filled = self.feed.take(DEADLINE)
        assert filled is not None
        return filled


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.feed.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def test_columns_land_in_their_places_and_sources_may_be_overwritten(bench: Bench) -> None:
    for batch_id in range(1, 8):
        bench.submit(batch_id)
        check(bench.take(), batch_id)
    assert bench.copied == [1, 2, 3, 4, 5, 6, 7]
    stats = bench.feed.stats
    assert (stats.batches, stats.fragments) == (7, 7 * P)
    assert 0 < stats.copy_seconds < DEADLINE


def test_a_batch_is_valid_until_the_next_but_one_take(bench: Bench) -> None:
    for batch_id in range(1, 6):  # more than there is room for: the rest waits, its slots with it
        bench.submit(batch_id)
    wait_until(lambda: len(bench.copied) == 3)
    first, second = bench.take(), bench.take()
    time.sleep(0.05)
    assert bench.copied == [1, 2, 3]
    check(first, 1)
    check(second, 2)
    third = bench.take()
    wait_until(lambda: len(bench.copied) == 4)
    check(second, 2)
    check(third, 3)
    assert found(first)[0].numpy().tobytes() == expected(4)[0].tobytes()


def test_a_recycled_batch_does_not_shorten_the_life_of_others(bench: Bench) -> None:
    for batch_id in range(1, 6):
        bench.submit(batch_id)
    bench.take()
    second, stale = bench.take(), bench.take()
    bench.feed.recycle(stale)
    with pytest.raises(ValueError, match="batch 3 is not the one"):
        bench.feed.recycle(stale)
    fourth = bench.take()
    wait_until(lambda: len(bench.copied) == 5)
    check(second, 2)
    check(fourth, 4)


def test_one_batch_ahead_of_the_user(bench: Bench) -> None:
    def room() -> int:
        return bench.feed.capacity_free()

    assert room() == 1
    bench.submit(1)
    assert room() == 0
    wait_until(lambda: bench.copied == [1])
    assert room() == 0
    bench.take()
    assert room() == 1


def test_what_the_user_does_to_a_batch_ends_with_it(bench: Bench) -> None:
    bench.submit(1)
    batch = bench.take().batch(version=3)
    assert batch.lag == (2,) * P
    batch.actor["advantage"] = batch.actor["value"].requires_grad_()
    batch.actor["value"].sum().backward()
    for batch_id in (2, 3, 4):
        bench.submit(batch_id)
        filled = bench.take()
        assert set(filled.record.actor) == {"value", "logits"}
        assert not any(x.requires_grad or x.is_inference() for x in found(filled))


def test_backward_through_a_batch_taken_in_inference_mode(bench: Bench) -> None:
    bench.submit(1)
    with torch.inference_mode():
        filled = bench.take()
    weight = torch.ones(7, requires_grad=True)
    (filled.record.hx[0] * weight).sum().backward()
    assert weight.grad is not None


def test_take_gives_up_in_time(bench: Bench) -> None:
    begun = time.monotonic()
    assert bench.feed.take(0.05) is None
    assert 0.05 <= time.monotonic() - begun < 5
    assert bench.feed.take(0) is None


def waiting_taker(feed: Feed) -> tuple[threading.Thread, list[BaseException]]:
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            feed.take(DEADLINE)
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    return thread, caught


def test_fail_wakes_a_waiting_taker_and_the_first_error_stays(bench: Bench) -> None:
    thread, caught = waiting_taker(bench.feed)
    error = WorkerError("it broke", worker=3)
    bench.feed.fail(error)
    bench.feed.fail(ValueError("later"))
    thread.join(1)
    assert caught == [error]
    with pytest.raises(WorkerError, match="worker 3"):
        bench.feed.take(DEADLINE)


def test_close_wakes_a_waiting_taker(bench: Bench) -> None:
    thread, caught = waiting_taker(bench.feed)
    begun = time.monotonic()
    bench.feed.close()
    bench.feed.close()
    thread.join(1)
    assert time.monotonic() - begun < 2
    assert isinstance(caught[0], ClosedError)
    bench.submit(1)
    with pytest.raises(ClosedError):
        bench.feed.take(DEADLINE)
    assert bench.copied == []


def test_batches_in_hand_outlive_the_feed(bench: Bench) -> None:
    bench.submit(1)
    filled = bench.take()
    bench.feed.close()
    check(filled, 1)


def test_close_is_bounded_while_a_callback_blocks() -> None:
    gate = threading.Event()

    def blocked(_: int) -> None:
        gate.wait(DEADLINE)

    feed = Feed(P, on_copied=blocked)
    feed.begin(SPEC)
    feed.submit(1, fragments(1), metas(1))
    begun = time.monotonic()
    feed.close(timeout=0.1)
    assert time.monotonic() - begun < 2
    gate.set()
    feed.close()


def test_an_error_of_the_thread_reaches_the_user() -> None:
    def broken(_: int) -> None:
        raise RuntimeError("Event loop is closed")

    feed = Feed(P, on_copied=broken)
    feed.begin(SPEC)
    feed.submit(1, fragments(1), metas(1))
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        feed.take(DEADLINE)
    feed.close()


def test_the_wrong_number_of_fragments_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="2 fragments, not 1"):
        bench.feed.submit(1, fragments(1)[:1], metas(1)[:1])


def test_an_idle_feed_keeps_no_slot_alive(bench: Bench) -> None:
    bench.submit(1)
    slots = [weakref.ref(slot) for slot in bench.sources[1]]
    bench.take()
    wait_until(lambda: all(ref() is None for ref in slots))


def test_slots_of_a_ring(bench: Bench) -> None:
    with Ring.create(SPEC.nbytes, P, run_id=b"r" * 16, incarnation=b"i" * 16, digest=SPEC.digest) as ring:
        assert not bench.feed.register(ring.memory.data)
        slots = [Slot(SPEC, ring.slot(k)) for k in range(P)]
        for slot, source in zip(slots, fragments(1), strict=True):
            slot.memory[:] = source.memory
        bench.sources[1] = slots
        bench.feed.submit(1, slots, metas(1))
        check(bench.take(), 1)
        del slots, slot


def test_the_layout_of_the_device_is_that_of_the_host() -> None:
    """What CUDA does after its copy of whole slots, here on the CPU."""
    staging = torch.from_numpy(np.stack([slot.memory for slot in fragments(1)]))
    targets = empty_leaves(SPEC, P, torch.device("cpu"))
    lay_out(staged_leaves(SPEC, staging), targets)
    for x, y in zip(targets, expected(1), strict=True):
        np.testing.assert_array_equal(x.flatten(1, 2).numpy(), y)


# ── streams: CUDA's where there is a device, and threads in their place everywhere ──────────────────────────────────


@pytest.fixture(params=[0.0, 0.002])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A feed for the CPU has the buffers of CUDA, on streams that are threads, ours slow or not."""
    fake = Fake(delay=request.param)

    def buffers(spec: FragmentSpec, n_per_batch: int) -> CudaBuffers:
        return CudaBuffers(spec, n_per_batch, torch.device("cpu"), fake)

    monkeypatch.setattr("zrl.nodes.feed.HostBuffers", buffers)
    yield fake
    fake.end()


def test_the_streams_of_the_fake_are_late(fake: Fake) -> None:
    """What follows could not fail otherwise."""
    target, gate = torch.zeros(3), threading.Event()
    fake.user.put(gate.wait)
    with fake.stream(fake.user):
        target.copy_(torch.ones(3))
    before = target.clone()
    gate.set()
    fake.user.synchronize()
    assert before.eq(0).all()
    assert target.eq(1).all()


def test_a_slot_is_free_when_its_copy_has_ended(fake: Fake) -> None:
    """`Bench` poisons a slot as soon as it is free: a copy that were still to come would bring that along."""
    bench = Bench()
    for batch_id in range(1, 9):
        bench.submit(batch_id)
    for batch_id in range(1, 9):
        filled = bench.take()
        fake.user.synchronize()
        check(filled, batch_id)
    bench.feed.close()


def test_kernels_of_the_user_find_whole_batches_however_late_they_run(fake: Fake) -> None:
    """The user's stream is behind by two batches and more, while the feed goes on."""
    bench, fake.user.delay = Bench(), 0.02
    results: list[tuple[int, list[Array]]] = []

    def kernel(filled: Filled) -> None:
        results.append((filled.batch_id, [x.numpy().copy() for x in found(filled)]))

    for batch_id in range(1, 13):
        bench.submit(batch_id)
    for _ in range(12):
        filled = bench.take()
        fake.user.put(partial(kernel, filled))
    fake.user.synchronize()
    assert [batch_id for batch_id, _ in results] == list(range(1, 13))
    for batch_id, leaves in results:
        for x, y in zip(leaves, expected(batch_id), strict=True):
            np.testing.assert_array_equal(x, y)
    bench.feed.close()


def test_what_the_user_does_to_a_batch_of_cuda_ends_with_it(fake: Fake) -> None:
    bench, weight = Bench(), torch.ones(1, requires_grad=True)
    for batch_id in range(1, 7):
        bench.submit(batch_id)
        filled = bench.take()
        fake.user.synchronize()
        check(filled, batch_id)
        value = filled.record.actor["value"]
        value.mul_(weight)
        assert value.requires_grad
    bench.feed.close()


def test_a_ring_is_registered_whole_and_let_go(fake: Fake) -> None:
    bench = Bench()
    with Ring.create(SPEC.nbytes, P, run_id=b"r" * 16, incarnation=b"i" * 16, digest=SPEC.digest) as ring:
        data = ring.memory.data
        assert bench.feed.register(data)
        assert fake.registered == [(data.ctypes.data, ring.memory.nbytes, 1)]
        assert data.ctypes.data % 4096 == ring.memory.nbytes % 4096 == 0
        bench.feed.unregister(data)
        assert not fake.registered
        fake.refuse = 712
        with pytest.warns(RuntimeWarning, match="error 712"):
            assert not bench.feed.register(data)
        del data
    bench.feed.close()


@needs_cuda
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("device", [f"cuda:{k}" for k in range(torch.cuda.device_count())])
def test_batches_on_cuda(device: str, registered: bool) -> None:
    """Large fragments in a ring, whose slots are poisoned as soon as they are free."""
    spec = FragmentSpec.build(T, B, obs=ArraySpec("uint8", (1 << 20,)), act=ArraySpec("int64"), actor={"value": F32})
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    n_slots, rounds = 2 * P, 8
    with Ring.create(spec.nbytes, n_slots, run_id=b"r" * 16, incarnation=b"i" * 16, digest=spec.digest) as ring:
        slots = [Slot(spec, ring.slot(k)) for k in range(n_slots)]

        def on_copied(batch_id: int) -> None:
            for k in range(batch_id % 2 * P, batch_id % 2 * P + P):
                slots[k].poison()
            free.put(batch_id)

        feed = Feed(P, torch.device(device), on_copied=on_copied)
        feed.begin(spec)
        if registered:
            assert feed.register(ring.memory.data)
        for batch_id in range(rounds):
            mine = slots[batch_id % 2 * P : batch_id % 2 * P + P]
            for i, slot in enumerate(mine):
                for a in slot.arrays:
                    a[...] = (10 * batch_id + i) % 2 if a.dtype == bool else 10 * batch_id + i
            feed.submit(batch_id, mine, metas(batch_id))
            filled = feed.take(DEADLINE)
            assert filled is not None
            assert filled.record.state.obs.device == torch.device(device)
            for i in range(P):
                assert filled.record.state.obs[:, i * B : (i + 1) * B].eq(10 * batch_id + i).all()
            assert free.get(timeout=DEADLINE) == batch_id
        feed.close()
        if registered:
            feed.unregister(ring.memory.data)
        slots.clear()
        del mine, slot, a


@needs_cuda
def test_batches_of_many_leaves_on_cuda() -> None:
    bench = Bench("cuda")
    for batch_id in range(1, 9):
        bench.submit(batch_id)
    kept: list[Filled] = []
    for batch_id in range(1, 9):
        kept = [*kept[-1:], bench.take()]
        for i, filled in enumerate(reversed(kept)):
            check(filled, batch_id - i)
    assert bench.copied == [1, 2, 3, 4, 5, 6, 7, 8]
    bench.feed.close()


@needs_cuda
def test_a_registered_ring_and_one_that_cuda_refuses() -> None:
    bench = Bench("cuda")
    memory = Slot(SPEC).memory
    assert bench.feed.register(memory)
    bench.feed.unregister(memory)
    nothing = np.empty(0, np.uint8)
    with pytest.warns(RuntimeWarning, match="pageable"):
        assert not bench.feed.register(nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bench.feed.register(nothing)
    bench.feed.close()


def seconds_to_gather(spec: FragmentSpec, n_per_batch: int, repeats: int) -> tuple[float, float]:
    """Seconds a fragment, the best of `repeats`: copied into its columns of a batch, and as one plain memory copy."""
    buffers = HostBuffers(spec, n_per_batch)
    sources = [fragment(i, spec) for i in range(n_per_batch)]
    plain = [fragment(i, spec).memory for i in range(n_per_batch)]

    def gather() -> None:
        buffers.fill(0, sources)

    def memcpy() -> None:
        for to, source in zip(plain, sources, strict=True):
            to[...] = source.memory

    def best(fn: Callable[[], None]) -> float:
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - begun)
        return min(seconds) / n_per_batch

    best(gather)  # touches the pages
    return best(gather), best(memcpy)


def test_gathering_costs_little_more_than_copying() -> None:
    pixels = FragmentSpec.build(
        64, 2, obs=ArraySpec("uint8", (4, 84, 92)), act=ArraySpec("int64"), actor={"value": F32}
    )
    gather, memcpy = seconds_to_gather(pixels, n_per_batch=4, repeats=10)
    assert gather < 3 * memcpy, f"{gather / memcpy:.2f} times a plain copy"


def test_large_and_empty_leaves() -> None:
    large = {"large": ArraySpec("float32", (64, 64)), "none": ArraySpec("float32", (0,))}
    spec = FragmentSpec.build(T, B, obs=large, act=ArraySpec("int64"), actor={"value": F32})
    sources, buffers = [fragment(i, spec) for i in range(P)], HostBuffers(spec, P)
    buffers.fill(1, sources)
    for x, *parts in zip(buffers.leaves(1), *(slot.arrays for slot in sources), strict=True):
        np.testing.assert_array_equal(x.numpy(), np.concatenate(parts, axis=1))
    staging = torch.from_numpy(np.stack([slot.memory for slot in sources]))
    for x, view in zip(buffers.leaves(1), staged_leaves(spec, staging), strict=True):
        assert torch.equal(x, view.flatten(1, 2))
