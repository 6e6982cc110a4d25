"""What TensorBoard will read."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_loop import config
from zrl.errors import PreflightError
from zrl.train.loop import train


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of all event files: records of a length (u64), its checksum (u32), an Event, and its checksum (u32)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        at = 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event: Any = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_every_number_of_the_metrics_is_an_event(tmp_path: Path) -> None:
    result = train(config(tmp_path, workers=0, steps=256, tensorboard=True))
    rows = result.run.metrics()
    found = scalars(result.run.tensorboard)
    for name in ("return_update", "loss/policy", "lag/max", "steps_per_s"):
        expected = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        assert [step for step, _ in found.get(name, [])] == [step for step, _ in expected], name
        assert [x for _, x in found.get(name, [])] == pytest.approx([x for _, x in expected], rel=1e-5), name
    assert len(found["loss/policy"]) == 4


def test_without_the_extra_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kw: Any) -> Any:
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PreflightError, match=r"pip install 'zrl\[tensorboard\]'"):
        train(config(tmp_path, workers=0, tensorboard=True))
