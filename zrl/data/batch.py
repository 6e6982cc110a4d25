"""A batch: fragments side by side along the columns, as tensors, with what is known about them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch

from zrl.data.fragment import Record, State, map_leaves
from zrl.data.spec import flatten
from zrl.errors import ConfigError, StaleBatchError

Cut = Callable[[torch.Tensor], torch.Tensor]

#: Single steps that are cut out together, before they become minibatches: of small ones the calls are what costs.
_AT_ONCE_NBYTES = 1 << 22


class FragmentMeta(NamedTuple):
    """Where a fragment comes from: weights version it was made with, index of its worker, its number there from 1."""

    version: int
    worker: int
    seq: int


class Episode(NamedTuple):
    """An episode that ended inside a batch: undiscounted return, length in steps, column, whether it was cut short."""

    ret: float
    length: int
    column: int
    truncated: bool


@dataclasses.dataclass
class Batch(Record):
    """``P`` fragments of ``T`` steps side by side: ``[T+1, P*B, ...]`` and so on, see `zrl.data.spec` for every field.

    A batch is valid until the next-but-one ``next()`` of the iterator it came from; `clone` it to keep it longer.

    Attributes:
        meta: one `FragmentMeta` a fragment; fragment ``i`` holds the columns ``i*B`` to ``(i+1)*B - 1``.
        version: the weights version at the yield.
        extra: tensors ``[T, P*B]`` of the user's own (advantages, returns) that `minibatches` cuts like the rest.
    """

    meta: tuple[FragmentMeta, ...] = ()
    version: int = 0
    extra: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_record(cls, record: Record, meta: tuple[FragmentMeta, ...], version: int) -> Batch:
        """A batch whose tensors are those of `record`, in containers of its own: the user may change these."""
        fields = {f.name: map_leaves(lambda x: x, getattr(record, f.name)) for f in dataclasses.fields(Record)}
        return cls(**fields, meta=meta, version=version)

    @property
    def lag(self) -> tuple[int, ...]:
        """Per fragment: the weights version at the yield minus the version that the fragment was made with."""
        return tuple(self.version - m.version for m in self.meta)

    @cached_property
    def n_env_steps(self) -> int:
        """Environment steps really taken: the number of True in ``mask``."""
        return int(self.mask.sum())

    @cached_property
    def episodes(self) -> list[Episode]:
        """The episodes that ended in this batch, in order of time, then column."""
        ended = self.state.fin[1:] & self.mask
        where = ended.nonzero().cpu()
        if not len(where):
            return []
        rows, columns = where[:, 0].to(ended.device), where[:, 1].to(ended.device)
        ret = self.ep_return[1:][rows, columns].tolist()
        length = self.ep_length[1:][rows, columns].tolist()
        term = self.state.term[1:][rows, columns].tolist()
        ends = zip(ret, length, columns.tolist(), term, strict=True)
        return [Episode(r, n, j, not t) for r, n, j, t in ends]

    def clone(self) -> Batch:
        """An independent copy, valid for as long as you keep it."""
        return self._map(torch.clone)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device; tensors that are there already are shared, not copied."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def poison(self) -> None:
        """Overwrite all tensors in place with NaN, the least integer or True, so that late readers notice."""

        def fill(x: torch.Tensor) -> torch.Tensor:
            if x.is_floating_point() or x.is_complex():
                return x.fill_(torch.nan)
            return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).min or torch.iinfo(x.dtype).max)

        self._map(fill)

    def expire(self) -> None:
        """From now on every access to the record is a `StaleBatchError`; clones stay as they are."""
        self.__class__ = ExpiredBatch

    def _map(self, fn: Cut) -> Batch:
        return self._cut(fn, fn, fn, fn)

    def _cut(self, states: Cut, steps: Cut, hx: Cut, bootstrap: Cut) -> Batch:
        """A batch made by one function a kind of field: T+1 rows, T rows, the recurrent state, the bootstrap."""
        new = copy.copy(self)
        for cached in ("n_env_steps", "episodes"):
            new.__dict__.pop(cached, None)
        new.state = State(*(map_leaves(states, tree) for tree in self.state))
        new.final_value, new.ep_return, new.ep_length = map(states, (self.final_value, self.ep_return, self.ep_length))
        if self.final_obs is not None:
            new.final_obs = map_leaves(states, self.final_obs)
        new.actor, new.mask = map_leaves(steps, self.actor), steps(self.mask)
        if self.env is not None:
            new.env = map_leaves(steps, self.env)
        new.extra = {name: steps(x) for name, x in self.extra.items()}
        new.hx = map_leaves(hx, self.hx)
        new.bootstrap = bootstrap(self.bootstrap)
        return new

    def minibatches(
        self,
        size: int,
        *,
        by: str = "column",
        extra: Mapping[str, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Batch]:
        """Cut the batch at random into smaller ones, each entry in exactly one of them; the last may be smaller.

        Args:
            size: columns of a minibatch with ``by="column"``; steps with ``by="step"``.
            by: ``"column"`` keeps whole columns, so it fits recurrent actors. ``"step"`` takes single steps, those with
                a False ``mask`` left out: a minibatch is then a batch of ``T = 1`` with `size` columns, whose rows 0
                and 1 are the rows t and t+1 of the step.
            extra: tensors ``[T, P*B]`` that are cut the same way, then found in ``minibatch.extra``; added to the
                batch's own.
            generator: source of the permutation; torch's default one, if None.

        Yields:
            Batches of tensors that are theirs alone; small ones lie side by side in memory, so `clone` one before it
            is saved. ``meta`` stays that of the whole batch.

        Raises:
            ConfigError: size below 1, an unknown `by`, ``by="step"`` with recurrent state, `extra` of another shape.
        """
        whole = self if extra is None else dataclasses.replace(self, extra={**self.extra, **extra})
        if size < 1:
            raise ConfigError(f"minibatches: size must be at least 1, not {size}")
        for name, x in whole.extra.items():
            if x.shape[:2] != self.mask.shape:
                raise ConfigError(
                    f"minibatches: extra[{name!r}] must start with {list(self.mask.shape)}, not {list(x.shape)}"
                )
        if by == "column":
            return whole._by_column(size, generator)
        if by == "step":
            if flatten(self.hx)[0]:
                raise ConfigError('minibatches: by="step" tears recurrent state apart; use by="column"')
            return whole._by_step(size, generator)
        raise ConfigError(f'minibatches: by must be "column" or "step", not {by!r}')

    def _by_column(self, size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        order = torch.randperm(self.mask.shape[1], generator=generator).to(self.mask.device)
        for columns in torch.split(order, size):

            def cut(x: torch.Tensor, columns: torch.Tensor = columns) -> torch.Tensor:
                return x.index_select(1, columns)

            yield self._cut(cut, cut, cut, cut)

    def _by_step(self, size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        # v(x_{t+1}) of a single step: the actor's value one row on, and the bootstrap behind the last row
        values = torch.cat([self.actor["value"][1:], self.bootstrap])
        rows, columns = self.mask.nonzero(as_tuple=True)
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        n_columns = self.mask.shape[1]
        steps = (rows * n_columns + columns)[order]
        if not len(steps):
            return
        at_once = size * max(1, _AT_ONCE_NBYTES * self.mask.numel() // (self._nbytes() * size))
        for block in torch.split(steps, at_once):
            yield from self._of_steps(block, size, values)

    def _of_steps(self, steps: torch.Tensor, size: int, values: torch.Tensor) -> Iterator[Batch]:
        """Minibatches of `steps`, which are cut out of each tensor at once. They have no version in common: who changes
        one in place changes nothing that autograd keeps of another."""
        n_columns = self.mask.shape[1]
        both = torch.cat([index for at in torch.split(steps, size) for index in (at, at + n_columns)])
        cut: list[list[torch.Tensor]] = []  # the parts of each tensor

        def parts(x: torch.Tensor, index: torch.Tensor, n: int) -> tuple[torch.Tensor, ...]:
            # one index into rows and columns at once: three times as fast as one into each
            return torch.unsafe_split(x.flatten(0, 1).index_select(0, index), n)

        def pairs(x: torch.Tensor) -> torch.Tensor:
            cut.append([part.view(2, -1, *x.shape[2:]) for part in parts(x, both, 2 * size)])
            return x

        def ones(x: torch.Tensor) -> torch.Tensor:
            cut.append([part.unsqueeze(0) for part in parts(x, steps, size)])
            return x

        self._cut(pairs, ones, lambda x: x, lambda _: ones(values))
        for of_one in zip(*cut, strict=True):
            taken = iter(of_one)  # in the order in which they were cut

            def take(_: torch.Tensor, taken: Iterator[torch.Tensor] = taken) -> torch.Tensor:
                return next(taken)

            yield self._cut(take, take, lambda x: x, take)

    def _nbytes(self) -> int:
        sizes: list[int] = []

        def note(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.nbytes)
            return x

        self._map(note)
        return sum(sizes)


class ExpiredBatch(Batch):
    """A batch that was valid once. Where it came from (``meta``, ``version``, ``lag``) can still be asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_RECORD:
            raise StaleBatchError(
                f"batch.{name}: this batch was valid until the next-but-one next(); to keep one longer, clone() it "
                "while it is valid"
            )
        return super().__getattribute__(name)

    def __repr__(self) -> str:
        return f"<a batch of version {self.version}, past its time>"


_OF_RECORD = frozenset(field.name for field in dataclasses.fields(Record))
