"""Where the embedded weights lie."""

from __future__ import annotations

from pathlib import Path

from ..config import InputError, suggest

ROOT = Path(__file__).parent / "weights"
PREFIX = "mini/"


def weights(name: str) -> Path:
    """The file or folder of one embedded network, such as "clip" or "aesthetic/head.safetensors".

    Raises:
        InputError: there is none of this name.
    """
    path = ROOT / name
    if ".." in Path(name).parts or ROOT not in path.parents or not path.exists():
        known = sorted(p.name for p in ROOT.iterdir()) if ROOT.is_dir() else []
        hint = suggest(name, known) if known else "run `make mini` to train them."
        raise InputError(f"There are no embedded weights {name!r}: {hint}")
    return path


def locate(name: str) -> Path:
    """Embedded weights for "mini/...", else the path as it is."""
    return weights(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(name)
