"""The learner's own random states, as plain values that a checkpoint can hold and that are read back without pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from zrl.errors import CheckpointError


def random_states() -> dict[str, Any]:
    """The global states of torch (all devices in use), NumPy and `random`, as tensors, numbers and lists of them."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            cached,
        ],
        "random": [version, list(words), gauss],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on drawing where `random_states` was taken. Devices that are not there any more are left out.

    Raises:
        CheckpointError: these are no random states.
    """
    try:
        torch.set_rng_state(states["torch"].cpu())
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), device)
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
        version, words, gauss = states["random"]
        random.setstate((version, tuple(words), gauss))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise CheckpointError(f"the random states of the checkpoint cannot be used: {type(e).__name__}: {e}") from e
