"""Files: the LoRA, the videos, and videos side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, get_args

from torch import Tensor

from ..vader_backend.config import InputError, option
from ..vader_backend.evaluation.pictures import contact_sheet, side_by_side
from ..vader_backend.lora import LoraWeights, in_layout, save_lora
from ..vader_backend.lora_formats import Layout
from ..vader_backend.models.base import VideoModel
from ..vader_backend.prompts import PromptSet
from ..vader_backend.runs import check_name
from ..vader_backend.video_file import write_mp4
from . import host, schema
from .images import rows, tiled, to_images, to_videos

_GRID, _SEPARATE = "grid", "one file per video"


def _check_prefix(filename_prefix: str | None) -> bool | str:
    return True if filename_prefix is None else schema.verdict(lambda: check_name(filename_prefix, "filename_prefix"))


@dataclass(frozen=True)
class LoraFile:
    """How a LoRA's tensors are named."""

    layout: str = option(
        "comfyui",
        "comfyui: as ComfyUI's own LoRA loaders read it; diffusers: as load_lora_weights of diffusers does, which "
        "needs the model.",
        choices=get_args(Layout),
    )


class VaderSaveLoRA:
    DESCRIPTION = "Writes a LoRA as safetensors, with metadata on base model, rewards, method, steps, K and rank."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("save lora", "export lora")
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_name",)
    OUTPUT_TOOLTIPS = ("The file's name in the output folder.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = schema.text("loras/vader", "File name in the output folder; a number and .safetensors follow.")
        lora = schema.link("LORA_MODEL", "The LoRA to write.")
        model = schema.link("VADER_MODEL", "The model that the LoRA is for; needed for another layout only.")
        optional = {"filename_prefix": prefix, **schema.inputs(LoraFile), "model": model}
        return {"required": {"lora": lora}, "optional": optional}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = "loras/vader") -> bool | str:
        return _check_prefix(filename_prefix)

    def save(
        self,
        lora: dict[str, Tensor],
        filename_prefix: str = "loras/vader",
        model: VideoModel | None = None,
        **values: Any,
    ) -> dict[str, Any]:
        layout = schema.read(LoraFile, values).layout
        weights = LoraWeights(lora, getattr(lora, "metadata", {"format": "pt"}))
        if model is not None:
            weights = in_layout(model, weights, cast(Layout, layout))
        elif layout != "comfyui":
            raise InputError(f"The layout {layout} names the model's own modules; connect the model to Save LoRA.")
        path = host.new_file(filename_prefix, ".safetensors")
        if host.is_main():
            save_lora(path, weights)
        name = path.relative_to(host.current().output()).as_posix()
        return {"ui": {"text": [f"wrote output/{name}"]}, "result": (name,)}


@dataclass(frozen=True)
class VideoFiles:
    """How videos are written."""

    fps: float = option(8.0, "Frames per second.", low=0.1, high=240.0, step=0.5)
    layout: str = option(_GRID, "All videos tiled in one file, or a file for each.", choices=(_GRID, _SEPARATE))


class VaderSaveVideo:
    DESCRIPTION = "Writes videos as mp4: tiled in one file, or a file for each."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("save video", "mp4", "export video")
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("names",)
    OUTPUT_TOOLTIPS = ("The files' names in the output folder, one per line.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        images = schema.link("IMAGE", "Frames, video after video.")
        prompts = schema.link("VADER_PROMPTS", "The videos' prompts, which say how many there are; without: one video.")
        prefix = schema.text("videos/vader", "File name in the output folder; a number and .mp4 follow.")
        optional = {"prompts": prompts, "filename_prefix": prefix, **schema.inputs(VideoFiles)}
        return {"required": {"images": images}, "optional": optional}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = "videos/vader") -> bool | str:
        return _check_prefix(filename_prefix)

    def save(
        self,
        images: Tensor,
        prompts: PromptSet | None = None,
        filename_prefix: str = "videos/vader",
        **values: Any,
    ) -> dict[str, Any]:
        config = schema.read(VideoFiles, values)
        videos = to_videos(images, len(prompts.texts) if prompts else 1)
        shown = []
        for video in [tiled(videos)] if config.layout == _GRID else videos:
            path = host.new_file(filename_prefix, ".mp4")
            if host.is_main():
                write_mp4(path, video, config.fps)
            shown.append(host.shown(path))
        names = "\n".join(f"{entry['subfolder']}/{entry['filename']}".lstrip("/") for entry in shown)
        return {"ui": {"images": shown, "animated": (True,)}, "result": (names,)}


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    limit: int = option(6, "At most this many videos, evenly spread over the list; 0 takes all.", low=0, high=64)


class VaderCompareVideos:
    DESCRIPTION = "Puts videos before and after the alignment side by side, and writes a picture of their frames."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("side by side", "before after", "compare video")
    FUNCTION = "compare"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("One video: a column per prompt, before above after.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "before": schema.link("IMAGE", "Videos of the base model."),
            "after": schema.link("IMAGE", "Videos of the aligned model for the same prompts."),
            "prompts": schema.link("VADER_PROMPTS", "Their prompts, from the sampling node."),
        }
        prefix = schema.text(
            "compare/vader", "File name of the picture in the output folder; a number and .png follow."
        )
        return {"required": required, "optional": {"filename_prefix": prefix, **schema.inputs(Comparison)}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = "compare/vader") -> bool | str:
        return _check_prefix(filename_prefix)

    def compare(
        self,
        before: Tensor,
        after: Tensor,
        prompts: PromptSet,
        filename_prefix: str = "compare/vader",
        **values: Any,
    ) -> dict[str, Any]:
        texts = prompts.texts
        chosen = rows(len(texts), schema.read(Comparison, values).limit)
        titles = [texts[i] for i in chosen]
        videos = [to_videos(part, len(texts), name)[chosen] for name, part in (("before", before), ("after", after))]
        together = side_by_side(videos[0], videos[1], titles)
        path = host.new_file(filename_prefix, ".png")
        if host.is_main():
            contact_sheet(path, {"base": videos[0], "aligned": videos[1]}, titles)
        return {"ui": {"images": [host.shown(path)]}, "result": (to_images(together[None]),)}
