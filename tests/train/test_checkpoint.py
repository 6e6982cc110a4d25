from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from zrl.errors import CheckpointError
from zrl.train import checkpoint


def state(x: float) -> dict[str, object]:
    return {"weights": {"w": torch.full((3,), x)}, "step": int(x)}


def test_newest_is_the_last_saved(tmp_path: Path) -> None:
    for step in (1, 20, 300):
        checkpoint.save(tmp_path, step, state(step))
    path, loaded = checkpoint.newest(tmp_path)
    assert path.name == "step_000000000300.pt"
    assert loaded["weights"]["w"].tolist() == [300.0] * 3
    assert (tmp_path / "latest").resolve() == path.resolve()
    assert not list(tmp_path.glob(".*"))


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    last = checkpoint.save(tmp_path, 2, state(2))
    last.write_bytes(last.read_bytes()[:-100])
    path, loaded = checkpoint.newest(tmp_path)
    assert path.name == "step_000000000001.pt"
    assert loaded["step"] == 1


@pytest.mark.parametrize("bits", [16, pytest.param(255, marks=pytest.mark.long)])
def test_a_flipped_byte_is_found(tmp_path: Path, bits: int) -> None:
    """Wherever it is: either the checkpoint is refused, or what is read is what was written. 16 in the list of records
    makes a folder of one, which torch takes for zeros."""
    whole = checkpoint.save(tmp_path, 1, state(1)).read_bytes()
    path = tmp_path / "step_000000000002.pt"
    refused = 0
    for at in range(0, len(whole), 1 if bits == 255 else 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
        try:
            found = checkpoint.load(path)
        except CheckpointError:
            refused += 1
        else:
            assert found["weights"]["w"].tolist() == [1.0] * 3, at
            assert found["step"] == 1, at
    assert refused > 20


def test_a_record_that_is_marked_as_a_folder(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, state(1))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    data[entry + 38] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="data/0 is damaged"):
        checkpoint.load(path)


def test_a_link_to_a_checkpoint_that_is_missing(tmp_path: Path) -> None:
    """It is named, the newest that is there is taken, and the links lead to it again."""
    first, last = (checkpoint.save(tmp_path, step, state(step)) for step in (1, 2))
    checkpoint.name_it(checkpoint.BEST, last)
    last.unlink()
    skipped: list[str] = []
    assert checkpoint.newest(tmp_path, skipped=skipped)[0] == first
    assert skipped == [f"{str(last)!r}, which 'latest' leads to, is missing"]
    checkpoint.set_aside(first)
    assert [(tmp_path / name).resolve(strict=True) for name in ("latest", "best")] == [first.resolve()] * 2


def test_links_to_what_is_set_aside_lead_to_what_was_read(tmp_path: Path) -> None:
    first, last = (checkpoint.save(tmp_path, step, state(step)) for step in (1, 2))
    checkpoint.name_it(checkpoint.BEST, last)
    last.write_bytes(b"")
    checkpoint.set_aside(first)
    assert [(tmp_path / name).resolve(strict=True) for name in ("latest", "best")] == [first.resolve()] * 2


def test_none_valid_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.newest(tmp_path)
    checkpoint.save(tmp_path, 1, state(1)).write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints can be read.*step_000000000001"):
        checkpoint.newest(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weights": Evil()}, tmp_path / "step_000000000001.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.newest(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old = checkpoint.save(tmp_path, 1, state(1))
    (tmp_path / ".step_000000000002.pt.part").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        checkpoint.save(tmp_path, 2, state(2))
    assert checkpoint.newest(tmp_path)[0] == old
    assert not list(tmp_path.glob(".*"))


def test_newer_ones_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.save(tmp_path, 2, state(2)).write_bytes(b"")
    skipped: list[str] = []
    assert checkpoint.newest(tmp_path, skipped=skipped)[1]["step"] == 1
    assert len(skipped) == 1
    assert "step_000000000002.pt" in skipped[0]


def test_a_link_moves_at_once(tmp_path: Path) -> None:
    first, second = (checkpoint.save(tmp_path, step, state(step)) for step in (1, 2))
    for target in (first, second, first):
        checkpoint.name_it(checkpoint.BEST, target)
        assert (tmp_path / "best").readlink() == Path(target.name)
    assert not list(tmp_path.glob(".*"))


def test_old_ones_go_but_not_the_best_or_those_that_are_needed(tmp_path: Path) -> None:
    saved = [checkpoint.save(tmp_path, step, state(step)) for step in range(1, 8)]
    checkpoint.name_it(checkpoint.BEST, saved[1])
    checkpoint.prune(tmp_path, 2, besides=[saved[3]])
    assert sorted(tmp_path.glob("step_*")) == [saved[1], saved[3], saved[5], saved[6]]
    assert checkpoint.newest(tmp_path)[0] == saved[6]


def test_what_a_resume_passed_over_does_not_pass_for_the_newest(tmp_path: Path) -> None:
    first, torn = checkpoint.save(tmp_path, 1, state(1)), checkpoint.save(tmp_path, 9, state(9))
    torn.write_bytes(b"")
    checkpoint.set_aside(first)
    second = checkpoint.save(tmp_path, 2, state(2))
    checkpoint.prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [second.name, "step_000000000009.unreadable"]
    assert checkpoint.newest(tmp_path)[0] == second


def test_what_the_best_one_has_played_is_kept_beside_it(tmp_path: Path) -> None:
    """No checkpoint knows of its own evaluation: whoever goes on from it would take a worse one for better."""
    assert checkpoint.best_score(tmp_path) is None
    first, second = (checkpoint.save(tmp_path, step, {"weights": {}}) for step in (1, 2))
    checkpoint.name_best(first, 200.0)
    assert checkpoint.best_score(tmp_path) == 200.0
    checkpoint.name_it(checkpoint.BEST, second)  # by whoever knows of no score
    assert checkpoint.best_score(tmp_path) is None
    checkpoint.name_best(second, 300.0)
    (tmp_path / checkpoint.SCORE).write_text("{")
    assert checkpoint.best_score(tmp_path) is None
