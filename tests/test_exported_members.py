"""The public names, written down: one more or less is a decision, not an accident."""

from __future__ import annotations

import importlib
import inspect

import pytest

import zrl

PUBLIC = {
    "zrl": [
        "ActorError",
        "BaseActorModule",
        "Batch",
        "CheckpointError",
        "ClosedError",
        "ConfigError",
        "EnvError",
        "Episode",
        "FragmentMeta",
        "MissingExtraError",
        "PreflightError",
        "ProcessError",
        "ProtocolError",
        "RecordError",
        "SharedMemoryError",
        "StaleBatchError",
        "StarvationError",
        "State",
        "WeightsError",
        "WorkerError",
        "ZrlError",
        "__version__",
        "end_prestarted",
        "evaluate",
        "prestart",
    ],
    "zrl.algo": [
        "Actor",
        "Batch",
        "Info",
        "State",
        "VTrace",
        "a2c",
        "advantages",
        "categorical",
        "gae",
        "impala",
        "mix_uniform",
        "n_step",
        "ppo",
        "reinforce",
        "returns",
        "td_error",
        "unroll",
        "vtrace",
    ],
    "zrl.zoo": [
        "AtariFrames",
        "CNNActor",
        "ChainMDP",
        "GRUActor",
        "MLPActor",
        "MissionWords",
        "NarrowPath",
        "default_actor",
        "make_atari",
        "make_minigrid",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_list_is_complete(module: str) -> None:
    assert sorted(importlib.import_module(module).__all__) == PUBLIC[module]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_every_name_can_be_imported_and_is_documented(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert (thing.__doc__ or "").strip()
        assert not (thing.__doc__ or "").startswith(f"{name}(")  # what dataclasses and namedtuples make by themselves


@pytest.mark.parametrize("module", [*PUBLIC, "zrl.rollout", "zrl.rollout.same", "zrl.errors"])
def test_every_module_is_documented(module: str) -> None:
    assert (importlib.import_module(module).__doc__ or "").strip()


def test_the_methods_of_public_classes_are_documented() -> None:
    """But for those of `Protocol`s and containers that say what a class says."""
    missing = [
        f"{cls.__name__}.{name}"
        for cls in (zrl.BaseActorModule, zrl.Batch, zrl.State, importlib.import_module("zrl.rollout.same").SameRollout)
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not name.startswith("_") and not (member.__doc__ or "").strip()
    ]
    assert missing == []


def test_all_errors_are_exported() -> None:
    errors = importlib.import_module("zrl.errors")
    own = {name for name, x in vars(errors).items() if inspect.isclass(x) and issubclass(x, zrl.ZrlError)}
    assert own <= set(zrl.__all__)
    assert "ConfigError" in own
    assert issubclass(zrl.ConfigError, ValueError)


def test_the_version() -> None:
    assert zrl.__version__.count(".") >= 2
