"""What the benchmarks share: where results go, the embedded world, and what a figure was measured with."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from ..vader_backend import registry
from ..vader_backend.mini.files import ROOT
from ..vader_backend.models.base import VideoModel

RESULTS = Path(__file__).parent / "results"


def modelscope() -> VideoModel:
    """The embedded ModelScope."""
    family = registry.load("models", "modelscope")
    return family.build(family.Config(folder=str(ROOT / "modelscope")))


def known(name: str) -> dict[str, Any]:
    """What an earlier or interrupted run left in results/; empty at first."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def versions() -> dict[str, Any]:
    """Machine and versions."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def told(found: dict[str, Any]) -> str:
    """The line under a table that tells machine and versions."""
    return "Measured with " + ", ".join(f"{name} {value}" for name, value in found.items()) + "."
