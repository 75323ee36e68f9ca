"""Tiny models of the families that core ComfyUI has, and the same latents as each side's denoiser takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_ltx
import tiny_wan
import torch
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from safetensors.torch import save_file
from tiny_flow import original_shapes, original_state, save_folder, text_encoder
from tiny_svd import original_checkpoint, tiny_networks
from tiny_wan import EULER, tiny_image_encoder, tiny_transformer, tiny_vae
from torch import Tensor, nn
from vader_nodes.vader_backend.models import _svd_keys, ltx, svd, wan
from vader_nodes.vader_backend.models.base import VideoModel
from vader_nodes.vader_backend.process import EDM
from vader_nodes.vader_backend.types import VideoSpec

Inputs = tuple[dict[str, Tensor], dict[str, Any]]
PROMPTS = ("a red circle moves left", "the blue square")
_CORE_IMAGE_WIDTH = 1280  # the only width of image states that core's Wan knows


@dataclass(frozen=True)
class Case:
    """A model, and what core's class of the same network needs.

    weights: the denoiser under core's keys. family: class in comfy.supported_models. config: what core does not
    read off the weights. core_inputs: latents and conditioning as arguments of core's apply_model, tensors first.
    spelling: how another program's LoRA file of this family names a weight.
    """

    model: VideoModel
    weights: dict[str, Tensor]
    video: VideoSpec
    family: str
    core_inputs: Callable[[Tensor, dict[str, Tensor]], Inputs]
    spelling: Callable[[str], str]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> tuple[Tensor, ...]:
        """A start image per prompt, where the model needs one."""
        if "image_encoder" not in self.model.parts():
            return ()
        rng = torch.Generator().manual_seed(4)
        return tuple(torch.rand(3, self.video.height, self.video.width, generator=rng) for _ in PROMPTS)

    def modules(self) -> list[str]:
        """Names of the denoiser's layers that a LoRA is put on."""
        ends = tuple(f".{target}" for target in self.model.lora_targets)
        return [name for name, part in self.model.denoiser.named_modules() if name.endswith(ends)]


def denoised(model: VideoModel, z: Tensor, sigma: float, cond: dict[str, Tensor]) -> Tensor:
    """The clean latents that our denoiser sees in z, noised to sigma."""
    alpha, time = (1.0, 0.25 * math.log(sigma)) if isinstance(model.process, EDM) else (1 - sigma, 1000 * sigma)
    prediction = model.predict(model.process.scale_input(z, alpha, sigma), time, cond)
    return model.process.split(z, prediction, alpha, sigma)[0]


def svd_case(folder: Path) -> Case:
    checkpoint = original_checkpoint(tiny_networks())
    save_file(checkpoint, folder / "svd_xt.safetensors")
    model = svd.build(svd.Config(folder=str(folder / "svd_xt.safetensors")))

    def inputs(z: Tensor, cond: dict[str, Tensor]) -> Inputs:
        frames = z.shape[2]
        times = model.denoiser.add_time_proj(cond["time_ids"].flatten()).unflatten(0, cond["time_ids"].shape).flatten(1)
        still = cond["image_latents"].expand(-1, -1, frames, -1, -1)
        each = {name: t.repeat_interleave(frames, dim=0) for name, t in (("c_crossattn", cond["image"]), ("y", times))}
        return {"x": _frames(z), "c_concat": _frames(still), **each}, {"num_video_frames": frames}

    weights = _svd_keys.section(checkpoint, _svd_keys.UNET)
    return Case(model, weights, VideoSpec(5, 16, 24, fps=7.0), "SVD_img2vid", inputs, lambda name: f"unet.{name}")


def wan_case(folder: Path, *, image: bool) -> Case:
    if image:
        transformer = tiny_transformer(in_channels=36, image_dim=_CORE_IMAGE_WIDTH, added_kv_proj_dim=24)
        networks = {"text_encoder": text_encoder(umt5=True), "image_encoder": tiny_image_encoder(_CORE_IMAGE_WIDTH)}
        index = {"_class_name": "WanImageToVideoPipeline"}
        save_folder(folder, index, EULER, transformer=transformer, vae=tiny_vae(), **networks)
    else:
        tiny_wan.save_tiny(folder)
    model = wan.build(wan.Config(folder=str(folder)))

    def inputs(z: Tensor, cond: dict[str, Tensor]) -> Inputs:
        known = {"c_concat": cond["image_latents"], "clip_fea": cond["image"]} if image else {}
        return {"x": z, "c_crossattn": cond["text"], **known}, {}

    item = "wan2.1 i2v 14B" if image else "wan2.1 t2v 1.3B"
    return Case(
        model,
        _published(model.denoiser, item, convert_wan_transformer_to_diffusers),
        VideoSpec(9, 32, 48, fps=16.0),
        "WAN21_I2V" if image else "WAN21_T2V",
        inputs,
        (lambda name: f"transformer.{name}") if image else _kohya(wan.Wan.lora_names.comfy),
        {"num_heads": 2, "freq_dim": 16, "text_dim": 16},
    )


def ltx_case(folder: Path) -> Case:
    tiny_ltx.save_tiny(folder)
    model, video = ltx.build(ltx.Config(folder=str(folder))), VideoSpec(9, 64, 96, fps=12.0)

    def inputs(z: Tensor, cond: dict[str, Tensor]) -> Inputs:
        text = {"c_crossattn": cond["text"], "attention_mask": cond["mask"].long()}
        return {"x": z, **text}, {"frame_rate": video.fps}

    weights = _published(model.denoiser, "ltx 2B", convert_ltx_transformer_checkpoint_to_diffusers)
    sizes = {"in_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "caption_channels": 16}
    return Case(model, weights, video, "LTXV", inputs, lambda name: f"diffusion_model.{name}", sizes)


def _published(
    network: nn.Module, item: str, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The network's tensors under the keys of a published file; `convert` renames such a file for diffusers."""
    beyond = re.compile(r"(transformer_)?blocks\.(?![01]\.)")  # the tiny networks have two blocks
    keys = [key for key in original_shapes(item) if beyond.match(key) is None]
    return original_state(network, {key: next(iter(convert({key: torch.empty(0)}))) for key in keys})


def _kohya(rename: Callable[[str], str] | None) -> Callable[[str], str]:
    assert rename is not None

    def spell(name: str) -> str:
        module, _, side = name.rpartition(".lora_")
        return f"lora_unet_{rename(module).replace('.', '_')}.lora_{'down' if side[0] == 'A' else 'up'}.weight"

    return spell


def _frames(z_BCTHW: Tensor) -> Tensor:
    """All frames of all videos as one batch."""
    return z_BCTHW.transpose(1, 2).flatten(0, 1)
