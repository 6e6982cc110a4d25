"""Random streams: every worker's own torch, NumPy and random states, and the seeds of its environments.

The states derive from ``numpy.random.SeedSequence(entropy, spawn_key=(index, generation, stream))``: stream 0 is torch,
1 NumPy's legacy global state, 2 the `random` module, 3 the generator that an actor's ``setup`` is given.

Seeds of environments have 31 bits, too few to draw them and hope that no two are the same. So every environment of a
run has a *number* of its own, whichever worker makes it and how often that worker was replaced before; its seed is
where a permutation of 0 to 2^31 - 1, which follows from the entropy, takes that number.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

SEED_BITS = 31  # what every environment takes: some pass their seed on as an int32
N_SEEDS = 1 << SEED_BITS
ROUNDS = 4  # of the permutation
MOST_WORKERS = 1 << 16  # indices of workers are below


def _words(entropy: int, index: int, generation: int, stream: int, n: int) -> list[int]:
    seq = np.random.SeedSequence(entropy, spawn_key=(index, generation, stream))
    return [int(w) for w in seq.generate_state(n, np.uint64)]


def env_seeds(entropy: int, index: int, generation: int, n: int) -> list[int]:
    """Seeds of the environments of one worker, each below 2**31.

    No two environments of a run have the same one, as long as ``block(index, generation) * n + n`` is at most 2**31.
    That is the case for 65,536 workers with 127 environments each and a scratch one which are replaced 63 times, or
    for 64 workers with 1,023 environments which are replaced 511 times. Beyond that they begin to repeat.

    Args:
        entropy: of the run.
        index, generation: which worker, and how often it was replaced.
        n: number of environments that a worker makes, the same for all workers of the run.
    """
    return _permuted(entropy, block(index, generation) * n, n)


def seed_of_new(entropy: int, index: int, generation: int, n: int, column: int, k: int) -> int:
    """Seed of the environment that takes the place of the one in `column`, as the `k`-th one, from 1, that this worker
    makes anew in this life of it: that of a worker with an index that none has."""
    return env_seeds(entropy, index + k * MOST_WORKERS, generation, n)[column]


def evaluation_seeds(entropy: int, n: int) -> list[int]:
    """Seeds for `n` environments that nobody trains with: of the last numbers, while workers begin with the first."""
    return _permuted(entropy, -n, n)


def block(index: int, generation: int) -> int:
    """A number for each pair, no two the same: 0 for the first worker at first, and growing with both.

    From the right: the generation in digits of three bits, each with a bit that says whether another one follows; then
    the index. So generations cost little room where they are few, as they mostly are, and have no limit.
    """
    if generation < 8:
        return index << 4 | generation << 1
    return block(index, generation >> 3) << 4 | (generation & 7) << 1 | 1


def _permuted(entropy: int, first: int, n: int) -> list[int]:
    """Where the permutation takes the numbers `first` to ``first + n - 1``, modulo 2**31.

    Every step of every round can be undone, which is why no two numbers end at the same place: to multiply with an odd
    number, to add, and to change low bits by high ones.
    """
    keys = np.random.SeedSequence(entropy, spawn_key=(0,)).generate_state(2 * ROUNDS, np.uint64)
    x = (np.arange(n, dtype=np.uint64) + np.uint64(first % N_SEEDS)) % N_SEEDS
    for factor, summand in keys.reshape(ROUNDS, 2):
        x = (x * (factor | np.uint64(1)) + summand) % N_SEEDS  # 2**64 is a multiple of 2**31: overflow does no harm
        x ^= x >> np.uint64(16)
    return [int(seed) for seed in x]


def setup_generator(entropy: int, index: int, generation: int) -> torch.Generator:
    """What an actor's ``setup`` may draw from."""
    return torch.Generator().manual_seed(_words(entropy, index, generation, 3, 1)[0] >> 1)


class RandomStreams:
    """The global random states of one worker, kept aside while it does not run.

    Inside ``with streams.active():`` the worker's states are the process's; on leaving, the process has its own back,
    and neither has moved the other. For an actor on a GPU that device's state is swapped too.

    Args:
        entropy, index, generation: as in the module's docstring.
        device: of the actor.
    """

    def __init__(self, entropy: int, index: int = 0, generation: int = 0, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        torch_seed = _words(entropy, index, generation, 0, 1)[0] >> 1
        numpy_seed = np.random.SeedSequence(entropy, spawn_key=(index, generation, 1))
        self._states: tuple[Any, ...] = (
            torch.Generator().manual_seed(torch_seed).get_state(),
            random.Random(_words(entropy, index, generation, 2, 1)[0]).getstate(),
            torch.Generator(self._device).manual_seed(torch_seed).get_state() if self._device else None,
        )
        self._numpy = np.random.MT19937(numpy_seed)
        self._resident = False

    def stay(self) -> None:
        """Swap the worker's states in for good: in a process of its own nobody else draws, and swapping takes some
        150 µs a fragment."""
        self._set(self._states)
        self._resident = True

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Swap the worker's states in, and out again."""
        if self._resident:
            np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]  # forgets a deviate, as below
            yield
            return
        outside, numpy = self._get(), np.random.get_state(legacy=False)
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        entered = False
        try:
            self._set(self._states)
            # Swapping generators costs nothing, copying their states 50 µs each way; but it forgets a normal deviate
            # that NumPy keeps for the next call. Ours may go, the process's own must come back.
            np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]
            entered = True
            yield
        finally:
            if entered:  # not if a signal came in between
                self._states = self._get()
            self._set(outside)
            np.random.set_bit_generator(generator)  # type: ignore[attr-defined]
            if numpy["has_gauss"]:
                np.random.set_state(numpy)

    def _get(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device else None
        return torch.get_rng_state(), random.getstate(), cuda

    def _set(self, states: tuple[Any, ...]) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if self._device:
            torch.cuda.set_rng_state(states[2], self._device)


@contextlib.contextmanager
def undrawn(device: torch.device | None = None) -> Iterator[None]:
    """Leave torch's random streams as they were found: what is drawn inside is drawn again outside."""
    on_gpu = device is not None and device.type == "cuda"
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu and device else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device or "cuda")
