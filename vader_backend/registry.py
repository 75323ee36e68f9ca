"""Finds models, rewards and objectives by file name: listed without importing, imported on use."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from .config import InputError, suggest

_SHARED = ("base",)


def names(kind: str) -> list[str]:
    """The keys of a kind ("models", "rewards" or "objectives"): its file names, without those that are shared."""
    folder = Path(__file__).parent / kind
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_") and p.stem not in _SHARED)


def load(kind: str, name: str) -> ModuleType:
    """The module of one key; it has a dataclass `Config` and a function `build`.

    Raises:
        InputError: there is no such key.
    """
    if name not in names(kind):
        raise InputError(f"There is no {name!r} among the {kind}: {suggest(name, names(kind))}")
    return importlib.import_module(f".{kind}.{name}", __package__)
