"""Load Video Model: an embedded checkpoint, a folder or a file of a known family, or one from the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..vader_backend import hub, registry
from ..vader_backend.config import InputError
from ..vader_backend.loading import SUFFIXES
from ..vader_backend.models.base import VideoModel
from . import device, host, schema
from .sources import AUTO, PARTS, checkpoints, configured, family, locate, part, parts


class VaderLoadVideoModel:
    DESCRIPTION = (
        "Loads a video diffusion model: an embedded mini model, a checkpoint in models/diffusers, models/checkpoints "
        "or models/diffusion_models, or one from the hub."
    )
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("load video model", "video diffusion checkpoint", "text-to-video", "modelscope")
    FUNCTION = "load"
    RETURN_TYPES = ("VADER_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for VADER Train LoRA and Apply LoRA Sample.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "Checkpoint: mini/... is embedded in this pack, checkpoints/... and diffusion_models/... are files there; "
            "the others are folders of models/diffusers."
        )
        hub_id = schema.text(
            "",
            "Id of a Hugging Face repository, such as damo-vilab/text-to-video-ms-1.7b. It is downloaded once, into "
            "models/diffusers, and taken instead of the checkpoint.",
        )
        return {
            "required": {"checkpoint": schema.combo(checkpoints(), tooltip)},
            "optional": {"hub_id": hub_id, **_settings(), **_part_inputs()},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        checkpoint: str | None = None,
        hub_id: str | None = "",
        vae: str | None = AUTO,
        text_encoder: str | None = AUTO,
        image_encoder: str | None = AUTO,
        tokenizer: str | None = AUTO,
    ) -> bool | str:
        chosen = {"vae": vae, "text_encoder": text_encoder, "image_encoder": image_encoder, "tokenizer": tokenizer}
        return schema.verdict(lambda: _check(checkpoint, hub_id, chosen))

    def load(self, checkpoint: str, hub_id: str = "", unique_id: str | None = None, **values: Any) -> tuple[VideoModel]:
        path = download(hub_id, unique_id, accept=family) if hub_id else locate(checkpoint)
        module = family(path)
        config = configured(module, path, values)
        with device.training_mode():
            return (module.build(config),)


def download(
    repository: str,
    node_id: str | None,
    category: str = "diffusers",
    accept: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """The folder of a category of models that holds a repository, which is downloaded unless it is there already.

    What was put there by hand is taken where nothing can be downloaded.

    Args:
        accept: see `hub.download`.

    Raises:
        InputError: it cannot be downloaded, and is not there.
    """
    folder = host.folder(category) / repository
    with host.progress("Downloading", node_id) as show:

        def tell(done: int, total: int) -> None:
            show(done, total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB of {repository}")

        try:
            return hub.download(repository, folder, on_progress=tell, accept=accept)
        except InputError:
            if not _filled(folder):
                raise
            return folder


def _filled(folder: Path) -> bool:
    """Whether a folder holds weights, and no download that was cut short."""
    kinds = {path.suffix for path in folder.rglob("*")}
    return not kinds.isdisjoint((*SUFFIXES, ".bin")) and ".incomplete" not in kinds


def _check(checkpoint: str | None, hub_id: str | None, chosen: dict[str, str | None]) -> None:
    """Raises InputError where a named file is missing, or no family knows the checkpoint; nothing is loaded."""
    if hub_id:
        hub.check_repository(hub_id)
    elif checkpoint and hub_id is not None:
        family(locate(checkpoint))
    for field, name in chosen.items():
        if name is not None:
            part(field, name)


def _settings() -> dict[str, schema.Input]:
    """The settings of all families, those of a single one folded away; its name tells where a checkpoint lies."""
    merged: dict[str, schema.Input] = {}
    for name in registry.names("models"):
        merged = {**merged, **schema.inputs(registry.load("models", name).Config, plain=("dtype",))}
    wanted = sorted(merged.keys() - {"folder", *PARTS}, key=lambda name: ("advanced" in merged[name][1], name))
    return {name: merged[name] for name in wanted}


def _part_inputs() -> dict[str, schema.Input]:
    """The separate parts. They come last: canvas files count inputs, and these came after the others."""
    found = {
        name: schema.combo([AUTO, *parts(name)], f"{own.purpose}, of models/{own.category}. auto: the one that fits.")
        for name, own in PARTS.items()
    }
    return {name: (kind, {**options, "advanced": True}) for name, (kind, options) in found.items()}
