"""Whether two spaces are recorded, and acted in, alike: all environments of a run must have the same ones."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


def unlike(first: Any, other: Any, path: str, *, bounds: bool) -> tuple[str, str, str] | None:
    """Where `other` is not like `first`: path of a leaf, what the first one has there, and what the other; or None.

    Args:
        bounds: those of a Box count too.
    """
    if isinstance(first, gym.spaces.Dict) and isinstance(other, gym.spaces.Dict):
        if first.spaces.keys() != other.spaces.keys():
            return path, _keys(first), _keys(other)
        children = [(first[key], other[key], f"{path}[{key!r}]") for key in first.spaces]
    elif any(isinstance(first, kind) and isinstance(other, kind) for kind in (gym.spaces.Tuple, gym.spaces.OneOf)):
        if len(first.spaces) != len(other.spaces):
            return path, f"{len(first.spaces)} spaces", f"{len(other.spaces)} spaces"
        pairs = zip(first.spaces, other.spaces, strict=True)
        children = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(pairs)]
    else:
        return None if _alike(first, other, bounds) else (path, _in_words(first), _in_words(other))
    found = (unlike(*child, bounds=bounds) for child in children)
    return next(filter(None, found), None)


def _alike(first: Any, other: Any, bounds: bool) -> bool:
    """Two leaves; or a leaf and a container, or no space at all."""
    if isinstance(first, gym.spaces.Box) and isinstance(other, gym.spaces.Box) and not bounds:
        return first.shape == other.shape and first.dtype == other.dtype
    return bool(first == other)


def _keys(space: gym.spaces.Dict) -> str:
    return f"keys {sorted(map(str, space.spaces))}"


def _in_words(x: Any) -> str:
    return " ".join(str(x).split())
