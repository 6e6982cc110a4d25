"""Nesting as plain text, so that it can travel: from an `optree` structure to JSON and back, with every check.

A leaf is ``"*"``; a container is a list whose first entry says which: ``["dict", [key, child], …]`` (``"odict"`` for an
`OrderedDict`), ``["list", child, …]``, ``["tuple", child, …]``, ``["namedtuple", name, [field, child], …]``. Keys are
texts or whole numbers. The class of a namedtuple does not travel: who reads makes one of the same name and fields.
"""

from __future__ import annotations

import collections
import functools
import json
from typing import Any

import optree

from zrl.errors import RecordError

MOST_DEPTH = 32
MOST_LEAVES = 10_000


def to_text(tree: optree.PyTreeSpec) -> str:
    """The structure of `tree` as text.

    Raises:
        RecordError: a container or a key that cannot travel.
    """
    return json.dumps(_plain(tree.unflatten([None] * tree.num_leaves)))


def from_text(text: str) -> optree.PyTreeSpec:
    """The structure that `to_text` made a text of; `text` may come from a stranger.

    Raises:
        RecordError: it is no such text.
    """
    try:
        tree = optree.tree_structure(_tree(json.loads(text), MOST_DEPTH), none_is_leaf=True)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as e:
        raise RecordError("a structure that cannot be read", expected="nested containers", found=repr(text[:80])) from e
    if tree.num_leaves > MOST_LEAVES:
        raise RecordError(
            "a structure with too many leaves", expected=f"at most {MOST_LEAVES}", found=str(tree.num_leaves)
        )
    return tree


def _plain(tree: Any) -> Any:
    if tree is None:
        return "*"
    if isinstance(tree, dict):
        if type(tree) not in (dict, collections.OrderedDict) or not all(isinstance(k, (str, int)) for k in tree):
            raise RecordError(
                "a dict that cannot be recorded",
                expected="a dict or OrderedDict with keys that are texts or whole numbers",
                found=f"{type(tree).__name__} with keys {list(tree)}",
            )
        if type(tree) is dict:  # the order in which it was filled does not count: equal ones have equal texts
            keys = sorted(tree, key=lambda key: (isinstance(key, str), key))
            return ["dict", *([key, _plain(tree[key])] for key in keys)]
        return ["odict", *([key, _plain(child)] for key, child in tree.items())]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        named = zip(tree._fields, tree, strict=True)
        return ["namedtuple", type(tree).__name__, *([name, _plain(child)] for name, child in named)]
    if type(tree) in (list, tuple):
        return [type(tree).__name__, *map(_plain, tree)]
    raise RecordError("a container that cannot be recorded", expected="dict, list, tuple", found=type(tree).__name__)


def _tree(plain: Any, depth: int) -> Any:
    if plain == "*":
        return None
    if not depth or not isinstance(plain, list):
        raise ValueError("too deep, or no container")
    kind, *rest = plain
    if kind in ("dict", "odict"):
        pairs = [(_key(key), _tree(child, depth - 1)) for key, child in rest]
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs) if kind == "dict" else collections.OrderedDict(pairs)
    if kind == "namedtuple":
        name, *fields = rest
        made = _namedtuple(name, tuple(_text(field) for field, _ in fields))
        return made(*(_tree(child, depth - 1) for _, child in fields))
    if kind == "list":
        return [_tree(child, depth - 1) for child in rest]
    if kind == "tuple":
        return tuple(_tree(child, depth - 1) for child in rest)
    raise ValueError(f"no container: {kind!r}")


def _key(key: Any) -> str | int:
    if not isinstance(key, (str, int)):
        raise TypeError("a key is neither text nor number")
    return key


def _text(name: Any) -> str:
    """A name of a namedtuple or of one of its fields; ASCII, for Python takes some others for the same."""
    if not isinstance(name, str) or not name.isascii():
        raise TypeError("no text, or not of ASCII")
    return name


@functools.lru_cache(maxsize=256)
def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    """One class for equal names and fields, so that equal structures compare equal."""
    return collections.namedtuple(_text(name), fields)
