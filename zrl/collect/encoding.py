"""Values that are no arrays: how those of a Text and of a OneOf are recorded, and read back as actions.

======  ==============================================================================================================
Text    int32 ``[max_length]``: each character's place among the sorted ones of the space, and padding behind the
        last one: ``len(character_set)``
OneOf   ``(index, (alternative 0, alternative 1, ...))``: which one was chosen, an int64 scalar, and what is recorded of
        each. Those that were not chosen hold fillers
======  ==============================================================================================================

A *filler* stands where there is no value: zeros, ``start`` of a shifted Discrete or MultiDiscrete, a Text of padding
alone. Inside of a OneOf a Dict gives a dict and a Tuple a tuple, whatever the environment returns for them.

All else is recorded as it is, and spaces without a Text or a OneOf need nothing of this: `obs_writer` and
`action_reader` are what they always were for them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import optree

from zrl.collect.writers import ActionReader, ObsWriter, nesting_of, other_nesting
from zrl.data.fragment import Array, Row, map_leaves
from zrl.data.spec import flatten
from zrl.errors import ActorError, EnvError, RecordError

LEAF_SPACES = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)


class TextCodes(gym.spaces.Space[Array]):
    """What is recorded of a Text: int32 ``[max_length]``, codes of characters and then padding.

    Attributes:
        text: the space.
        padding: the code of no character, and the greatest of all.
    """

    def __init__(self, text: gym.spaces.Text) -> None:
        super().__init__((text.max_length,), np.int32)
        self.text = text
        self.padding = len(text.character_set)

    def __repr__(self) -> str:
        return f"codes of {self.text}"


def filler(space: gym.Space[Any]) -> Array:
    """What stands in a leaf where there is no value, in dtype and shape of its space."""
    value: Any = 0
    if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        value = space.start
    elif isinstance(space, TextCodes):
        value = space.padding
    return np.full(space.shape or (), value, space.dtype)


class Encoder(Protocol):
    """Between the values of one space and what is recorded of them.

    Attributes:
        leaves: tree of the leaf spaces of what is recorded.
    """

    leaves: Any

    def encode(self, value: Any) -> Any:
        """What is recorded of a value, nested like `leaves`; leaves that are arrays anyway are not looked at.

        Raises:
            RecordError: it is not in the space.
        """

    def decode(self, recorded: Any, *, strict: bool = False) -> Any:
        """The value of which this was recorded.

        Args:
            recorded: arrays, nested like `leaves`.
            strict: look at leaves that are arrays anyway, too.

        Raises:
            RecordError: there is none.
        """


def encoder(space: gym.Space[Any], path: str) -> Encoder:
    """What goes between the values of a space and the record, `path` being its place there.

    Raises:
        EnvError: a space without a fixed shape.
    """
    if isinstance(space, gym.spaces.Dict):
        return _Dict({key: encoder(sub, f"{path}[{key!r}]") for key, sub in space.spaces.items()}, path)
    if isinstance(space, gym.spaces.Tuple):
        return _Tuple([encoder(sub, f"{path}[{i}]") for i, sub in enumerate(space.spaces)], path)
    if isinstance(space, gym.spaces.OneOf):
        return _OneOf([encoder(sub, f"{path}[1][{i}]") for i, sub in enumerate(space.spaces)], path)
    if isinstance(space, gym.spaces.Text):
        return _Text(space, path)
    if isinstance(space, LEAF_SPACES):
        return _Leaf(space, path)
    raise EnvError(
        "the space cannot be recorded (it has no fixed shape; pad it to one in a wrapper of the environment)",
        env_index=-1,
        phase="spaces",
        leaf=path,
        expected="Box, Discrete, MultiDiscrete, MultiBinary, Text, or Dict, Tuple and OneOf of them",
        found=type(space).__name__,
    )


def is_encoded(space: Any) -> bool:
    """Whether a space holds a Text or a OneOf."""
    if isinstance(space, gym.spaces.Dict):
        return any(map(is_encoded, space.spaces.values()))
    if isinstance(space, gym.spaces.Tuple):
        return any(map(is_encoded, space.spaces))
    return isinstance(space, (gym.spaces.Text, gym.spaces.OneOf))


def _outside(path: str, expected: str, found: str) -> RecordError:
    return RecordError("a value is outside of its space", leaf=path, expected=expected, found=found)


class _Leaf:
    """An array, as it is."""

    def __init__(self, space: gym.Space[Any], path: str) -> None:
        self.leaves = space
        self._path = path

    def encode(self, value: Any) -> Any:
        return value

    def decode(self, recorded: Any, *, strict: bool = False) -> Any:
        if strict and not self.leaves.contains(recorded):
            raise _outside(self._path, str(self.leaves), str(recorded))
        return recorded


class _Dict:
    def __init__(self, parts: Mapping[Any, Encoder], path: str) -> None:
        self.leaves = {key: part.leaves for key, part in parts.items()}
        self._parts = parts
        self._path = path

    def encode(self, value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict) or value.keys() != self._parts.keys():
            raise _outside(self._path, f"a dict with keys {sorted(map(str, self._parts))}", nesting_of(value))
        return {key: part.encode(value[key]) for key, part in self._parts.items()}

    def decode(self, recorded: Any, *, strict: bool = False) -> dict[Any, Any]:
        return {key: part.decode(recorded[key], strict=strict) for key, part in self._parts.items()}


class _Tuple:
    def __init__(self, parts: Sequence[Encoder], path: str) -> None:
        self.leaves = tuple(part.leaves for part in parts)
        self._parts = parts
        self._path = path

    def encode(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (tuple, list)) or len(value) != len(self._parts):
            raise _outside(self._path, f"a tuple of {len(self._parts)}", nesting_of(value))
        return tuple(part.encode(x) for part, x in zip(self._parts, value, strict=True))

    def decode(self, recorded: Any, *, strict: bool = False) -> tuple[Any, ...]:
        return tuple(part.decode(x, strict=strict) for part, x in zip(self._parts, recorded, strict=True))


class _OneOf:
    def __init__(self, parts: Sequence[Encoder], path: str) -> None:
        self.leaves = (gym.spaces.Discrete(len(parts)), tuple(part.leaves for part in parts))
        self._parts = parts
        self._path = path
        self._fillers: tuple[Any, ...] = map_leaves(filler, self.leaves[1])

    def encode(self, value: Any) -> tuple[int, tuple[Any, ...]]:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise _outside(self._path, "(index, value of that alternative)", nesting_of(value))
        i = self._index(value[0])
        fillers = self._fillers
        return i, (*fillers[:i], self._parts[i].encode(value[1]), *fillers[i + 1 :])

    def decode(self, recorded: Any, *, strict: bool = False) -> tuple[int, Any]:
        i = self._index(recorded[0])
        return i, self._parts[i].decode(recorded[1][i], strict=strict)

    def _index(self, x: Any) -> int:
        try:
            if 0 <= (i := operator.index(x)) < len(self._parts):
                return i
        except TypeError:
            pass
        raise _outside(f"{self._path}[0]", f"an index from 0 to {len(self._parts) - 1}", str(x))


class _Text:
    def __init__(self, space: gym.spaces.Text, path: str) -> None:
        self.leaves = TextCodes(space)
        self._space = space
        self._path = path
        # not `character_index`: before 1.4 it followed the order of a set, which is another one in every process
        self._codes = {c: code for code, c in enumerate(sorted(space.character_set))}
        self._characters = {code: c for c, code in self._codes.items()}

    def encode(self, value: Any) -> Array:
        if not isinstance(value, str):
            raise self._refusal(type(value).__name__)
        if not self._space.min_length <= len(value) <= self._space.max_length:
            raise self._refusal(f"{len(value)} characters, {value!r:.40}")
        row = np.full(self.leaves.shape or (), self.leaves.padding, np.int32)
        try:
            row[: len(value)] = [self._codes[c] for c in value]
        except KeyError as e:
            raise self._refusal(f"the character {e.args[0]!r}") from None
        return row

    def decode(self, recorded: Any, *, strict: bool = False) -> str:
        codes, padding = recorded.tolist(), self.leaves.padding
        n = codes.index(padding) if padding in codes else len(codes)
        try:
            text = "".join(self._characters[code] for code in codes[:n])
        except KeyError as e:
            raise self._refusal(str(codes), f"codes from 0 to {padding - 1}, then padding, {padding}") from e
        if any(code != padding for code in codes[n:]):
            raise self._refusal(str(codes), f"nothing but padding, {padding}, behind the first {padding}")
        if n < self._space.min_length:
            raise self._refusal(f"{n} characters, {text!r}")
        return text

    def _refusal(self, found: str, expected: str = "") -> RecordError:
        least, most = self._space.min_length, self._space.max_length
        usual = f"a text of {least} to {most} characters of {self._space.characters!r:.80}"
        return _outside(self._path, expected or usual, found)


# -- observations ----------------------------------------------------------------------------------------------------


class ObsEncoder:
    """Observations in the containers of the environment, as they are recorded.

    Args:
        space: of the observations.
        specs: tree of what is recorded, in these containers.
    """

    def __init__(self, space: gym.Space[Any], specs: Any) -> None:
        self._encoders, self.tree = flatten(_encoders(space, specs, "state.obs"))

    def __call__(self, obs: Any) -> Any:
        """What is recorded of `obs`, nested.

        Raises:
            RecordError: a value is not in its space.
            ValueError, TypeError: it is nested in another way.
        """
        values = zip(self._encoders, self.tree.flatten_up_to(obs), strict=True)
        return self.tree.unflatten([part.encode(x) for part, x in values])


def _encoders(space: gym.Space[Any], specs: Any, path: str) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return type(specs)((key, _encoders(space[key], sub, f"{path}[{key!r}]")) for key, sub in specs.items())
    if isinstance(space, gym.spaces.Tuple):
        return rebuilt(specs, [_encoders(space[i], sub, f"{path}[{i}]") for i, sub in enumerate(specs)])
    return encoder(space, path)


def rebuilt(like: Any, parts: Sequence[Any]) -> Any:
    """A tuple, list or namedtuple as `like` is one, of other parts."""
    return type(like)(*parts) if optree.is_namedtuple_instance(like) else type(like)(parts)


class EncodedObsWriter(ObsWriter):
    """`ObsWriter` of observations with a Text or a OneOf in them."""

    def __init__(self, specs: Any, space: gym.Space[Any], n: int, *, debug: bool) -> None:
        super().__init__(specs, n, debug=debug, space=space)
        self._encode = ObsEncoder(space, specs)
        self._flat = False

    def write(self, observations: Sequence[Any], row: Row) -> None:
        if self._space is not None:
            super().write(observations, row)
            return
        columns = zip(*(self.split(j, obs) for j, obs in enumerate(observations)), strict=True)
        for leaf, values, a, flat in zip(self.leaves, columns, row.obs, row.obs_flat, strict=True):
            leaf.write(values, a, flat)

    def split(self, j: int, obs: Any, phase: str = "step") -> list[Any]:
        try:
            return self._tree.flatten_up_to(self._encode(obs))
        except RecordError as e:
            what = "an observation is outside of its space"
            where = {"leaf": e.leaf, "expected": e.expected, "found": e.found}
            raise EnvError(what, env_index=j, phase=phase, **where) from e
        except (ValueError, TypeError) as e:
            raise other_nesting(j, obs, phase, self._encode.tree) from e


def obs_writer(specs: Any, space: Any, n: int, *, debug: bool) -> ObsWriter:
    """What writes the observations of `space`, which may be None, as `specs` says."""
    if is_encoded(space):
        return EncodedObsWriter(specs, space, n, debug=debug)
    return ObsWriter(specs, n, debug=debug, space=space)


# -- actions ---------------------------------------------------------------------------------------------------------


class EncodedActionReader(ActionReader):
    """`ActionReader` of an action space with a Text or a OneOf in it: codes and indices are looked at each time."""

    def __init__(self, space: gym.Space[Any]) -> None:
        self._encoder = encoder(space, "state.act")
        super().__init__(self._encoder.leaves)
        # codes as they are: cast to int32, one far outside could pass for another
        readers = zip(self._spaces, self._leaves, strict=True)
        self._leaves = [list if isinstance(space, TextCodes) else read for space, read in readers]

    def __call__(self, arrays: Sequence[Array], wanted: Iterable[int] | None = None) -> list[Any]:
        taken = [read(a) for read, a in zip(self._leaves, arrays, strict=True)]
        values: list[Any] = [None] * len(arrays[0])
        for j in range(len(values)) if wanted is None else wanted:
            values[j] = self._decode(taken, j)
        return values

    def check(self, arrays: Sequence[Array], columns: Iterable[int]) -> None:
        boxes = (isinstance(space, gym.spaces.Box) for space in self._spaces)
        taken = [read(a) if box else a for box, read, a in zip(boxes, self._leaves, arrays, strict=True)]
        for j in columns:
            self._decode(taken, j, strict=True)

    def _decode(self, leaves: Sequence[Any], j: int, *, strict: bool = False) -> Any:
        try:
            return self._encoder.decode(self._tree.unflatten([a[j] for a in leaves]), strict=strict)
        except RecordError as e:
            what = f"the action of column {j} is outside of its space"
            raise ActorError(what, leaf=e.leaf, expected=e.expected, found=e.found) from e


def action_reader(space: gym.Space[Any], leaves: Any) -> ActionReader:
    """What turns recorded actions into those of `space`, whose leaf spaces are `leaves`."""
    return EncodedActionReader(space) if is_encoded(space) else ActionReader(leaves)
