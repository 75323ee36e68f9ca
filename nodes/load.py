"""Load Video Model: an embedded checkpoint, or a diffusers folder of a known family."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from ..vader_backend import registry
from ..vader_backend.config import InputError
from ..vader_backend.mini import files
from ..vader_backend.models.base import VideoModel
from . import host, schema

_MARKER = "model_index.json"


class VaderLoadVideoModel:
    DESCRIPTION = "Loads a video diffusion model: the embedded mini model, or a checkpoint in models/diffusers."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("load video model", "video diffusion checkpoint", "text-to-video", "modelscope")
    FUNCTION = "load"
    RETURN_TYPES = ("VADER_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for VADER Train LoRA and Apply LoRA Sample.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Checkpoint: mini/... is embedded in this pack; the others are folders of models/diffusers."
        return {"required": {"checkpoint": schema.combo(choices(), tooltip)}, "optional": _settings()}

    def load(self, checkpoint: str, **values: Any) -> tuple[VideoModel]:
        folder = locate(checkpoint)
        module = family(folder)
        with host.training_mode():
            return (module.build(schema.read(module.Config, {"folder": str(folder), **values})),)


def choices() -> list[str]:
    """The embedded checkpoints, then the folders of models/diffusers that a family recognises."""
    embedded = [f"{files.PREFIX}{path.parent.name}" for path in sorted(files.ROOT.glob(f"*/{_MARKER}"))]
    found = host.checkpoints("diffusers", _MARKER)
    return [*embedded, *(name for name in found if _families(host.resolve("diffusers", name)))]


def locate(checkpoint: str) -> Path:
    """The folder of a checkpoint. Raises InputError where there is none."""
    if checkpoint.startswith(files.PREFIX):
        return files.weights(checkpoint.removeprefix(files.PREFIX))
    return host.resolve("diffusers", checkpoint)


def family(folder: Path) -> ModuleType:
    """The module of the family that a checkpoint belongs to.

    Raises:
        InputError: no family recognises it.
    """
    found = _families(folder)
    if not found:
        raise InputError(
            f"The checkpoint {folder.name} is of no known family ({', '.join(registry.names('models'))}); "
            f"choose a folder whose {_MARKER} names one of them."
        )
    return found[0]


def _families(folder: Path) -> list[ModuleType]:
    modules = (registry.load("models", name) for name in registry.names("models"))
    return [module for module in modules if module.matches(folder)]


def _settings() -> dict[str, schema.Input]:
    """The settings of all families but the folder, which the checkpoint's name stands for."""
    merged: dict[str, schema.Input] = {}
    for name in registry.names("models"):
        merged = {**schema.inputs(registry.load("models", name).Config), **merged}
    return {name: entry for name, entry in merged.items() if name != "folder"}
