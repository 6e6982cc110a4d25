from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zrl.errors import CheckpointError
from zrl.train.rng import random_states, set_random_states


def draws() -> list[float]:
    return [float(torch.rand(())), random.gauss(0, 1), float(np.random.normal()), random.random(), np.random.random()]


def test_what_was_drawn_is_drawn_again(tmp_path: Path) -> None:
    """Through a file that is read without pickle, and with a normal deviate kept for the next call in either module."""
    random.gauss(0, 1)
    np.random.normal()
    torch.save(random_states(), tmp_path / "states")
    first = [draws() for _ in range(700)]  # a Mersenne Twister has 624 words
    set_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert [draws() for _ in range(700)] == first


@pytest.mark.parametrize("change", [{"numpy": ["MT19937"]}, {"random": None}, {"torch": torch.zeros(3)}])
def test_states_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the random states of the checkpoint cannot be used"):
        set_random_states({**random_states(), **change})
