"""Load Video Model: an embedded checkpoint, or a diffusers folder of a known family."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from ..vader_backend import hub, registry
from ..vader_backend.config import InputError
from ..vader_backend.mini import files
from ..vader_backend.models.base import VideoModel
from . import host, schema

_MARKERS = ("model_index.json", "transformer/config.json")  # diffusers' folders, and Open-Sora's
_PATHS = ("folder", "tokenizer", "vae", "text_encoder", "image_encoder")


class VaderLoadVideoModel:
    DESCRIPTION = (
        "Loads a video diffusion model: the embedded mini model, a checkpoint in models/diffusers, or one from the hub."
    )
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("load video model", "video diffusion checkpoint", "text-to-video", "modelscope")
    FUNCTION = "load"
    RETURN_TYPES = ("VADER_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for VADER Train LoRA and Apply LoRA Sample.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Checkpoint: mini/... is embedded in this pack; the others are folders of models/diffusers."
        hub_id = schema.text(
            "",
            "Id of a Hugging Face repository, such as damo-vilab/text-to-video-ms-1.7b. It is downloaded once, into "
            "models/diffusers, and taken instead of the checkpoint.",
        )
        return {
            "required": {"checkpoint": schema.combo(choices(), tooltip)},
            "optional": {"hub_id": hub_id, **_settings()},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, hub_id: str | None = "") -> bool | str:
        return schema.verdict(lambda: hub.check_repository(hub_id) if hub_id else None)

    def load(self, checkpoint: str, hub_id: str = "", unique_id: str | None = None, **values: Any) -> tuple[VideoModel]:
        folder = download(hub_id, unique_id) if hub_id else locate(checkpoint)
        module = family(folder)
        with host.training_mode():
            return (module.build(schema.read(module.Config, {"folder": str(folder), **values})),)


def choices() -> list[str]:
    """The embedded checkpoints, then the folders of models/diffusers that a family recognises."""
    embedded = [f"{files.PREFIX}{path.parent.name}" for path in sorted(files.ROOT.glob(f"*/{_MARKERS[0]}"))]
    found = sorted({name for marker in _MARKERS for name in host.checkpoints("diffusers", marker)})
    return [*embedded, *(name for name in found if _families(host.resolve("diffusers", name)))]


def locate(checkpoint: str) -> Path:
    """The folder of a checkpoint. Raises InputError where there is none."""
    if checkpoint.startswith(files.PREFIX):
        return files.weights(checkpoint.removeprefix(files.PREFIX))
    return host.resolve("diffusers", checkpoint)


def download(repository: str, node_id: str | None) -> Path:
    """The folder of models/diffusers that holds a repository, which is downloaded unless it is there already.

    Raises:
        InputError: it cannot be downloaded.
    """
    folder = host.folder("diffusers") / repository
    with host.progress("Downloading", node_id) as show:

        def tell(done: int, total: int) -> None:
            show(done, total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB of {repository}")

        return hub.download(repository, folder, on_progress=tell)


def family(folder: Path) -> ModuleType:
    """The module of the family that a checkpoint belongs to.

    Raises:
        InputError: no family recognises it.
    """
    found = _families(folder)
    if not found:
        raise InputError(
            f"The checkpoint {folder.name} is of no known family ({', '.join(registry.names('models'))}); "
            f"choose a folder whose {_MARKERS[0]} names one of them."
        )
    return found[0]


def _families(folder: Path) -> list[ModuleType]:
    modules = (registry.load("models", name) for name in registry.names("models"))
    return [module for module in modules if module.matches(folder)]


def _settings() -> dict[str, schema.Input]:
    """The settings of all families, those of a single one folded away; no paths: the checkpoint's name tells them."""
    merged: dict[str, schema.Input] = {}
    for name in registry.names("models"):
        merged = {**merged, **schema.inputs(registry.load("models", name).Config, plain=("dtype",))}
    wanted = sorted(merged.keys() - set(_PATHS), key=lambda name: ("advanced" in merged[name][1], name))
    return {name: merged[name] for name in wanted}
