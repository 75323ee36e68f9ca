"""Prompts: typed, from a file of the input folder, or a built-in set; and the same with start images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..vader_backend.models.base import VideoModel
from ..vader_backend.prompts import Config, PromptSet, build
from ..vader_backend.prompts import images as image_prompts
from . import device, host, schema

_log = logging.getLogger("vader_nodes")


class VaderPrompts:
    DESCRIPTION = "Prompts to train on, and held-out prompts that no training sees."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("prompt list", "training prompts", "prompt dataset")
    FUNCTION = "read"
    RETURN_TYPES = ("VADER_PROMPTS", "STRING")
    RETURN_NAMES = ("prompts", "text")
    OUTPUT_TOOLTIPS = ("The prompts in their two parts.", "The training prompts, then the held-out ones, one per line.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": schema.inputs(Config)}

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        source: str | None = "mini",
        text: str | None = "",
        file: str | None = "",
        held_out_file: str | None = "",
    ) -> bool | str:
        if source is None or text is None or file is None or held_out_file is None:
            return True
        config = Config(source=source, text=text, file=file, held_out_file=held_out_file)
        return schema.verdict(lambda: build(config, host.read_input))

    @classmethod
    def IS_CHANGED(cls, source: str = "mini", file: str = "", held_out_file: str = "", **_: Any) -> str:
        if source != "file":
            return ""
        read = [host.read_input(name) for name in (file, held_out_file) if name]
        return hashlib.sha256(repr(read).encode()).hexdigest()

    def read(self, **values: Any) -> tuple[PromptSet, str]:
        prompts = build(schema.read(Config, values), host.read_input)
        return prompts, "\n".join(prompts.texts)


class VaderImagePrompts:
    DESCRIPTION = "Start images with captions for image-to-video models, and held-out ones that no training sees."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("image-to-video prompts", "start images", "i2v dataset", "first frame")
    FUNCTION = "read"
    RETURN_TYPES = ("VADER_PROMPTS", "STRING")
    RETURN_NAMES = ("prompts", "text")
    OUTPUT_TOOLTIPS = (
        "The images and captions in their two parts.",
        "The training captions, then the held-out ones, one per line.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = {"images": schema.link("IMAGE", "With connected: the start images, such as those of Load Image.")}
        return {"required": {}, "optional": {**own, **schema.inputs(image_prompts.Config)}}

    @classmethod
    def VALIDATE_INPUTS(
        cls, source: str | None = "mini", folder: str | None = "", held_out_folder: str | None = ""
    ) -> bool | str:
        if source != "folder":
            return True

        def attempt() -> None:
            for name in (folder, held_out_folder or None):
                if name is not None:
                    image_prompts.pictures(host.input_folder(name))

        return schema.verdict(attempt)

    @classmethod
    def IS_CHANGED(cls, source: str = "mini", folder: str = "", held_out_folder: str = "", **_: Any) -> str:
        if source != "folder":
            return ""
        folders = [host.input_folder(name) for name in (folder, held_out_folder) if name]
        files = [path for place in folders for path in sorted(place.iterdir())]
        return hashlib.sha256(repr([(str(path), path.stat().st_mtime_ns) for path in files]).encode()).hexdigest()

    def read(self, images: Tensor | None = None, **values: Any) -> tuple[PromptSet, str]:
        with device.training_mode():
            connected = () if images is None else images[..., :3].float().clone().permute(0, 3, 1, 2).unbind()
            prompts = image_prompts.build(schema.read(image_prompts.Config, values), host.input_folder, connected)
        return prompts, "\n".join(prompts.texts)


def warn_long(model: VideoModel, prompts: Iterable[str]) -> None:
    """Warn of prompts that the text encoder does not take whole, and say what it leaves out."""
    for prompt in prompts:
        lost = model.truncated(prompt)
        if lost and host.is_main():
            _log.warning("The prompt %r is too long for %s; its end is not read: %r", prompt, model.name, lost)
