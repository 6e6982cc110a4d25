"""Weights: every parameter and buffer travels, whatever its dtype and however the module is wrapped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zrl.data.board import Board
from zrl.data.weights import DTYPES, WeightsManifest, WeightsPacker, unwrap
from zrl.errors import WeightsError


class Mixed(nn.Module):
    """All that a module can hold."""

    scale: torch.Tensor
    cache: torch.Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draws)

        self.core = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)  # num_batches_tracked: an int64 scalar
        self.frozen = nn.Parameter(draw(2, 7), requires_grad=False)
        self.scalar = nn.Parameter(draw())
        self.brief = nn.Parameter(draw(9).bfloat16())
        self.absent = nn.Parameter(torch.empty(0, 4))
        self.register_parameter("none", None)
        self.register_buffer("scale", draw(3).double())
        self.register_buffer("cache", torch.arange(6).view(2, 3) * seed, persistent=False)
        self.register_buffer("flags", torch.tensor([True, False, True]) ^ bool(seed % 2))
        self.register_buffer("wave", torch.complex(draw(2), draw(2)))
        self.register_buffer("turned", draw(4, 3).T)
        self.register_buffer("nothing", None)
        self.actor_head = nn.Linear(5, 5, bias=False)
        self.value_head = nn.Linear(5, 5, bias=False)
        self.value_head.weight = self.actor_head.weight  # tied
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draws))
            assert self.norm.num_batches_tracked is not None
            self.norm.num_batches_tracked.fill_(1000 + seed)


def flat_for(module: nn.Module) -> Any:
    return np.zeros(WeightsManifest.of(module).nbytes, np.uint8)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def copied(source: nn.Module, target: nn.Module) -> None:
    flat = flat_for(source)
    WeightsPacker(source).pack(flat)
    WeightsPacker(target).unpack(flat)


def test_everything_makes_the_round_trip() -> None:
    source, target = Mixed(1), Mixed(2)
    before = state(source)
    copied(source, target)
    assert_same(state(target), before)
    assert_same(state(source), before)
    assert target.value_head.weight is target.actor_head.weight
    assert [p.requires_grad for p in target.parameters()] == [p.requires_grad for p in source.parameters()]


def test_manifest_says_what_lies_where() -> None:
    manifest = WeightsManifest.of(Mixed(1))
    names = [entry.name for entry in manifest.entries]
    assert names == sorted(state(Mixed(1)))
    assert {"cache", "norm.num_batches_tracked", "actor_head.weight", "value_head.weight", "absent"} <= set(names)
    assert all(entry.offset % 64 == 0 for entry in manifest.entries)
    assert manifest.nbytes % 64 == 0
    ends = [entry.offset + entry.nbytes for entry in manifest.entries]
    following = [*(entry.offset for entry in manifest.entries[1:]), manifest.nbytes]
    assert all(end <= start < end + 64 for end, start in zip(ends, following, strict=True))
    scalar = next(entry for entry in manifest.entries if entry.name == "scalar")
    assert (scalar.dtype, scalar.shape, scalar.nbytes) == ("float32", (), 4)


def test_manifest_depends_on_names_dtypes_and_shapes_alone() -> None:
    assert WeightsManifest.of(Mixed(1)) == WeightsManifest.of(Mixed(2))
    assert len(WeightsManifest.of(Mixed(1)).digest) == 16
    other_order = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    assert WeightsManifest.of(other_order) == WeightsManifest.of(
        nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    )
    digests = {
        WeightsManifest.of(module).digest
        for module in (nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3).double(), nn.Linear(2, 3, bias=False))
    }
    assert len(digests) == 4


def test_module_without_state() -> None:
    manifest = WeightsManifest.of(nn.ReLU())
    assert (manifest.entries, manifest.nbytes) == ((), 0)
    copied(nn.ReLU(), nn.ReLU())
    assert WeightsManifest.from_plain(manifest.to_plain()) == manifest


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_table(name: str) -> None:
    def module(value: int) -> nn.Module:
        holder = nn.Module()
        holder.register_buffer("x", torch.full((3,), value).to(DTYPES[name]))
        return holder

    source, target = module(1), module(0)
    copied(source, target)
    assert_same(state(target), state(source))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]  # says that it is a callable


def wrapped(module: Mixed, how: str) -> nn.Module:
    match how:
        case "compile":
            return compiled(module)
        case "parallel":
            return nn.DataParallel(module)
        case "both":
            return compiled(nn.DataParallel(compiled(module)))
    wrapper = compiled if how == "part" else nn.DataParallel
    module.core = wrapper(module.core)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("how", ["compile", "parallel", "both", "part", "parallel part"])
def test_wrappers_do_not_show(how: str) -> None:
    plain, source = Mixed(2), wrapped(Mixed(1), how)
    assert any(".module." in f".{name}" or "_orig_mod." in name for name in state(source))
    assert WeightsManifest.of(source) == WeightsManifest.of(plain)
    copied(source, plain)
    assert_same(state(plain), state(Mixed(1)))
    copied(Mixed(3), source)
    copied(source, plain)
    assert_same(state(plain), state(Mixed(3)))


def test_a_submodule_that_is_called_module_keeps_its_name() -> None:
    holder = nn.Module()
    holder.module = nn.Linear(2, 2)
    assert [entry.name for entry in WeightsManifest.of(holder).entries] == ["module.bias", "module.weight"]
    assert unwrap(holder) is holder


# ── the module changes under the packer ─────────────────────────────────────────────────────────────────────────────


def replace_data(module: Mixed) -> None:
    module.core.weight.data = torch.full((5, 3), 8.0)


def replace_parameter(module: Mixed) -> None:
    module.core.weight = nn.Parameter(torch.full((5, 3), 8.0))


def replace_buffer(module: Mixed) -> None:
    module.scale = torch.full((3,), 8.0, dtype=torch.float64)


def replace_part(module: Mixed) -> None:
    module.core = nn.Linear(3, 5)


def assign_state(module: Mixed) -> None:
    module.load_state_dict(Mixed(8).state_dict(), assign=True)


def to_and_back(module: Mixed) -> None:
    for part in (module.core, module.norm):
        part.to(torch.float64).to(torch.float32)


@pytest.mark.parametrize(
    "change", [replace_data, replace_parameter, replace_buffer, replace_part, assign_state, to_and_back]
)
def test_replaced_tensors_are_seen(change: Callable[[Mixed], None]) -> None:
    source, target = Mixed(1), Mixed(2)
    packer, flat = WeightsPacker(source), flat_for(source)
    packer.pack(flat)
    change(source)
    packer.pack(flat)
    receiver = WeightsPacker(target)
    receiver.unpack(flat)
    assert_same(state(target), state(source))
    flat_3 = flat_for(target)
    WeightsPacker(Mixed(3)).pack(flat_3)
    packer.unpack(flat_3)  # and the new tensors are written
    assert_same(state(source), state(Mixed(3)))


@pytest.mark.parametrize(
    ("name", "tensor", "found"),
    [
        ("frozen", torch.zeros(2, 7).double(), "torch.float32.*float64"),
        ("frozen", torch.zeros(2, 1), r"\(2, 7\).*\(2, 1\)"),  # would broadcast
        ("frozen", torch.zeros(7, 2), r"\(2, 7\).*\(7, 2\)"),
        ("extra", torch.zeros(1), "no such tensor"),
        ("extra", torch.zeros(()), "no such tensor"),
        ("frozen", torch.zeros(2, 7, device="meta"), "meta"),
        ("frozen", None, "in the manifest, but not in the module"),
    ],
)
def test_module_that_no_longer_fits_is_named_and_left_alone(name: str, tensor: Any, found: str) -> None:
    module = Mixed(1)
    packer, flat = WeightsPacker(module), flat_for(module)
    WeightsPacker(Mixed(2)).pack(flat)
    before = flat.copy()
    setattr(module, name, nn.Parameter(tensor, requires_grad=False) if tensor is not None else None)
    kept = module.core.weight.detach().clone()
    for use in (packer.pack, packer.unpack):
        with pytest.raises(WeightsError, match=rf"'{name}'.*{found}"):
            use(flat)
    np.testing.assert_array_equal(flat, before)
    assert torch.equal(module.core.weight, kept)


def lazy() -> nn.Module:
    return nn.LazyLinear(3)


def sparse() -> nn.Module:
    module = nn.Module()
    module.register_buffer("adjacency", torch.eye(3).to_sparse())
    return module


def odd_dtype() -> nn.Module:
    module = nn.Module()
    module.register_buffer("tiny", torch.zeros(3, dtype=torch.float8_e4m3fn))
    return module


def doubled() -> nn.Module:
    module = nn.Module()
    module._parameters["a.b"] = nn.Parameter(torch.zeros(1))
    module.a = nn.Module()
    module.a.b = nn.Parameter(torch.zeros(1))
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lazy, "'(bias|weight)': is not initialised"),
        (sparse, "'adjacency': expected a dense tensor"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight': expected a dense tensor with data"),
        (odd_dtype, "'tiny': torch.float8_e4m3fn cannot travel"),
        (doubled, r"two tensors are called 'a\.b'"),
    ],
)
def test_what_cannot_travel_is_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        WeightsManifest.of(make())


@pytest.mark.parametrize("wrong", ["size", "dtype", "shape", "stride", "read-only"])
def test_flat_buffer_must_fit(wrong: str) -> None:
    packer = WeightsPacker(nn.Linear(3, 3))
    n = packer.manifest.nbytes
    flats: dict[str, Any] = {
        "size": np.zeros(n + 64, np.uint8),
        "dtype": np.zeros(n, np.int8),
        "shape": np.zeros((1, n), np.uint8),
        "stride": np.zeros(2 * n, np.uint8)[::2],
        "read-only": np.frombuffer(bytes(n), np.uint8),
    }
    for use in (packer.pack, packer.unpack):
        with pytest.raises(WeightsError, match=f"expected {n} contiguous"):
            use(flats[wrong])


# ── autograd and inference mode ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pack_inside", [False, True])
@pytest.mark.parametrize("unpack_inside", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
def test_inside_and_outside_of_inference_mode(pack_inside: bool, unpack_inside: bool, made_inside: bool) -> None:
    source = Mixed(1)
    with torch.inference_mode(made_inside):
        target = Mixed(2)
    sender, receiver, flat = WeightsPacker(source), WeightsPacker(target), flat_for(source)
    for _ in range(2):
        for inside in (pack_inside, not pack_inside):  # the views that one made are written by the other
            with torch.inference_mode(inside):
                sender.pack(flat)
        for inside in (unpack_inside, not unpack_inside):
            with torch.inference_mode(inside):
                receiver.unpack(flat)
    assert_same(state(target), state(source))


def test_gradients_and_training_are_left_alone() -> None:
    module = nn.Linear(3, 3)
    packer, flat = WeightsPacker(module), flat_for(module)
    module(torch.ones(2, 3)).sum().backward()
    assert module.weight.grad is not None
    gradient = module.weight.grad.clone()
    packer.pack(flat)
    packer.unpack(flat)
    assert torch.equal(module.weight.grad, gradient)
    assert module.weight.is_leaf
    assert module.weight.requires_grad
    module(torch.ones(2, 3)).sum().backward()
    assert torch.equal(module.weight.grad, 2 * gradient)


def test_backward_through_overwritten_weights_is_an_error_not_a_wrong_gradient() -> None:
    module = nn.Linear(3, 3)
    packer, flat = WeightsPacker(module), flat_for(module)
    packer.pack(flat)
    loss = module(torch.ones(2, 3, requires_grad=True)).sum()
    packer.unpack(flat)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_moves_through_the_board() -> None:
    learner, worker = Mixed(1), Mixed(2)
    sender, receiver = WeightsPacker(learner), WeightsPacker(worker)
    flat = flat_for(worker)
    manifest = sender.manifest
    optimizer = torch.optim.SGD(learner.core.parameters(), lr=0.1)
    with Board.create(manifest.nbytes, run_id=bytes(16), digest=manifest.digest, shared=False) as board:
        for version in (1, 2, 3):
            board.publish(version, sender.pack)
            assert board.read(flat, version - 1) == version
            receiver.unpack(flat)
            assert_same(state(worker), state(learner))
            optimizer.zero_grad()
            learner.core(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            assert not torch.equal(worker.core.weight, learner.core.weight)
        del sender


@pytest.mark.parametrize("inside", [False, True])
def test_by_way_of_a_stage_the_bytes_are_the_same(inside: bool) -> None:
    """What is done for a module on CUDA, here on the CPU; also twice, and after a change."""
    module = Mixed(1)
    packer, direct, staged = WeightsPacker(module), flat_for(module), flat_for(module)
    for _ in range(2):
        packer.pack(direct)
        staged[:] = 255
        with torch.inference_mode(inside):
            packer._pack_by_stage(torch.device("cpu"), staged)
        np.testing.assert_array_equal(direct, staged)
        with torch.no_grad():
            module.core.weight.add_(1)
    module.frozen = nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(WeightsError, match="frozen"):
        packer._pack_by_stage(torch.device("cpu"), staged)
    np.testing.assert_array_equal(direct, staged)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", [f"cuda:{k}" for k in range(torch.cuda.device_count())])
def test_a_module_on_cuda_is_packed_as_it_will_be(device: str) -> None:
    """Its last change is still to come when `pack` is called, on a stream of the user's own."""
    module = Mixed(1)
    packer, expected, found = WeightsPacker(module), flat_for(module), flat_for(module)
    with torch.no_grad():
        module.core.weight.fill_(7)
    packer.pack(expected)
    module.to(device)
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        module.core.weight.fill_(0)
        torch.cuda._sleep(10**8)  # type: ignore[no-untyped-call]
        module.core.weight.fill_(7)
        packer.pack(found)
    np.testing.assert_array_equal(found, expected)


def test_views_of_many_buffers() -> None:
    """More buffers than are remembered, in turn and after their end: never the wrong one."""
    packer = WeightsPacker(Mixed(1))
    receiver = WeightsPacker(Mixed(2))
    flats = [flat_for(packer.module) for _ in range(7)]
    for round_ in range(3):
        for flat in flats:
            flat[:] = 0
            packer.pack(flat)
            receiver.unpack(flat)
            assert_same(state(receiver.module), state(packer.module))
        flats[round_] = flat_for(packer.module)
    assert len(packer._views) <= 4


# ── manifests from peers ────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_round_trip() -> None:
    manifest = WeightsManifest.of(Mixed(1))
    plain = manifest.to_plain()
    assert WeightsManifest.from_plain(plain) == manifest
    assert WeightsManifest.from_plain(tuple(plain)) == manifest
    assert WeightsManifest.from_plain(plain, max_nbytes=manifest.nbytes) == manifest
    with pytest.raises(WeightsError, match="at most"):
        WeightsManifest.from_plain(plain, max_nbytes=manifest.nbytes - 1)


def test_difference_is_named() -> None:
    ours = WeightsManifest.of(nn.Linear(2, 3))
    ours.require(WeightsManifest.of(nn.Linear(2, 3)))
    for other, message in (
        (nn.Linear(2, 4), r"'bias': expected float32 \(3,\), found float32 \(4,\)"),
        (nn.Linear(2, 3, bias=False), "'bias': expected float32 .*, found no such tensor"),
        (nn.Sequential(nn.Linear(2, 3)), "'0.bias': expected no such tensor, found float32"),
    ):
        with pytest.raises(WeightsError, match=message):
            ours.require(WeightsManifest.of(other))


def at(*path: int, value: Any) -> Callable[[list[Any]], None]:
    def change(plain: list[Any]) -> None:
        target = plain
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        at(0, value=0),
        at(0, value=127),
        at(0, value=1 << 60),
        at(0, value=-128),
        at(0, value=128.0),
        at(0, value=None),
        at(1, value=bytes(16)),
        at(1, value=b""),
        at(1, value="0" * 16),
        at(2, value={}),
        at(2, value=[]),
        at(2, value=[[]] * 70000),
        at(2, 0, value=[]),
        at(2, 0, 0, value=b"bias"),
        at(2, 0, 0, value=""),
        at(2, 0, 0, value="x" * 2000),
        at(2, 0, 0, value="weight"),  # twice the same name
        at(2, 0, 0, value="\ud800\x1b[2J"),
        at(2, 0, 1, value="object"),
        at(2, 0, 1, value="float8_e4m3fn"),
        at(2, 0, 1, value=["float32"]),
        at(2, 0, 1, value="float64"),
        at(2, 0, 2, value=[-3]),
        at(2, 0, 2, value=[3.0]),
        at(2, 0, 2, value=[True]),
        at(2, 0, 2, value=[1 << 50]),
        at(2, 0, 2, value=[(1 << 48) - 1] * 64),
        at(2, 0, 2, value=[1] * 65),
        at(2, 0, 2, value=7),
        at(2, 0, 2, value="3"),
        at(2, 0, 3, value=4),
        at(2, 1, 3, value=0),  # overlaps
        at(2, 1, 3, value=128),  # beyond
        at(2, 1, 3, value=10**5000),
    ],
)
def test_forged_manifests_are_refused(change: Callable[[list[Any]], None]) -> None:
    plain = WeightsManifest.of(nn.Linear(2, 3)).to_plain()
    assert plain[0] == 128
    change(plain)
    with pytest.raises(WeightsError):
        WeightsManifest.from_plain(plain)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(max_size=20),
    st.text(max_size=20),
    st.sampled_from(["float32", "weight", 0, 64, 1 << 47, math.inf]),
)
GARBAGE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
ROWS = st.lists(
    st.tuples(
        st.one_of(st.text(max_size=5), SCALARS),
        st.one_of(st.sampled_from(sorted(DTYPES)), SCALARS),
        st.one_of(st.lists(st.integers(0, 100), max_size=4), st.lists(SCALARS, max_size=3), SCALARS),
        st.one_of(st.integers(0, 10).map(lambda i: 64 * i), SCALARS),
    ),
    max_size=4,
)


@settings(max_examples=300)
@given(st.one_of(GARBAGE, st.tuples(SCALARS, SCALARS, GARBAGE | ROWS)))
def test_garbage_is_refused_and_nothing_else_happens(plain: Any) -> None:
    try:
        manifest = WeightsManifest.from_plain(plain)
    except WeightsError:
        return
    assert WeightsManifest.from_plain(manifest.to_plain()) == manifest  # a manifest by chance


@settings(max_examples=200)
@given(st.data())
def test_a_manifest_with_one_value_changed_is_refused(data: st.DataObject) -> None:
    manifest = WeightsManifest.of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    plain = copy.deepcopy(manifest.to_plain())
    place = data.draw(st.integers(0, 2 + 4 * len(plain[2])))
    value = data.draw(GARBAGE)
    if place < 3:
        plain[place] = value
    else:
        row, column = divmod(place - 3, 4)
        plain[2][row][column] = value
    if plain != manifest.to_plain():
        with pytest.raises(WeightsError):
            WeightsManifest.from_plain(plain)
