"""Wrappers around a method that may be put on and taken off in any order, each at its own depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

Method = Callable[..., Any]
Wrapper = Callable[[Method], Method]


class Depth(IntEnum):
    """Which wrapper lies inside which, innermost first; whoever recomputes must lie outside whoever lends weights."""

    COMPILE = -1
    UNPACK = 0
    FETCH = 1
    RECOMPUTE = 2
    SLICE = 3
    DIVIDE = 4
    PLACE = 5
    WATCH = 6


@contextmanager
def wrapped(owner: Any, name: str, depth: Depth, wrapper: Wrapper) -> Iterator[None]:
    """`owner.name` becomes wrapper(method), around the wrappers of lower depth and inside those of higher depth.

    Raises:
        ValueError: there is a wrapper of this depth already.
    """
    layers: dict[Depth, Wrapper] = owner.__dict__.setdefault(f"_wrappers_of_{name}", {})
    if depth in layers:
        raise ValueError(f"{name} of {type(owner).__name__} has a wrapper of the kind {depth.name} already")
    layers[depth] = wrapper
    _compose(owner, name, layers)
    try:
        yield
    finally:
        del layers[depth]
        _compose(owner, name, layers)


def _compose(owner: Any, name: str, layers: dict[Depth, Wrapper]) -> None:
    owner.__dict__.pop(name, None)
    if not layers:
        del owner.__dict__[f"_wrappers_of_{name}"]
        return
    method = getattr(owner, name)
    for depth in sorted(layers):
        method = layers[depth](method)
    owner.__dict__[name] = method
