"""VideoCrafter2's denoiser: diffusers' UNet3DConditionModel, told the frames per second beside the time.

Source: Chen et al. 2024 and the published checkpoint's keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet3DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor

from ..loading import build_frozen, reading

_HEADS_OF_FIRST_ATTENTION = 8
_UNTOLD_FPS = 16.0
_PUBLISHED_LAYERS = 2

ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "fps_embedding.0": "time_embedding.fps.linear_1",
    "fps_embedding.2": "time_embedding.fps.linear_2",
    "input_blocks.0.0": "conv_in",
    "init_attn.0": "transformer_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
KINDS = ("resnets", "attentions", "temp_attentions", "upsamplers")


class TimeAndFpsEmbedding(TimestepEmbedding):
    """Embedding of the time plus that of the frames per second, which arrive as the UNet's `timestep_cond` [B]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 4 * width)
        self.fps = TimestepEmbedding(width, 4 * width)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B, 4 width], from the time's sinusoid [B, width]; 16 frames per second where none are given."""
        if condition is None:
            condition = sample.new_full((len(sample),), _UNTOLD_FPS)
        wave = get_timestep_embedding(condition, sample.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return super().forward(sample) + self.fps(wave.to(sample.dtype))


def make_unet(depths: Mapping[str, int] | None = None, **config: Any) -> UNet3DConditionModel:
    """The network, of UNet3DConditionModel's own configuration, with fresh weights.

    Args:
        depths: transformer blocks of the attentions by their names; one in each that is not named.
    """
    unet = UNet3DConditionModel(**config)
    unet.time_embedding = TimeAndFpsEmbedding(unet.config.block_out_channels[0])
    for name, depth in (depths or {}).items():
        blocks = unet.get_submodule(f"{name}.transformer_blocks")
        blocks.extend(deepcopy(blocks[0]) for _ in range(1, depth))
    return unet


def build_unet(tensors: Mapping[str, Tensor], dtype: torch.dtype, source: Path) -> UNet3DConditionModel:
    """The frozen network around weights under their original keys (after `model.diffusion_model.`).

    Raises:
        InputError: a weight is missing, left over or misshapen.
    """
    with reading("denoiser", source):
        config = architecture(tensors)
        layers = config["layers_per_block"]
        named = {diffusers_name(key, layers): _as_linear(key, tensor) for key, tensor in tensors.items()}
        depths = _depths(named)
    return build_frozen(lambda: make_unet(depths, **config), named, dtype, "denoiser", source)


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """UNet3DConditionModel's configuration, read from the shapes of the weights; KeyError where one is missing."""
    levels = _levels(tensors)
    attended = [f"input_blocks.{blocks[0]}.1.proj_in.weight" in tensors for blocks in levels]
    return {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "block_out_channels": [len(tensors[f"input_blocks.{b[0]}.0.out_layers.3.weight"]) for b in levels],
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock3D" if own else "DownBlock3D" for own in attended],
        "up_block_types": ["CrossAttnUpBlock3D" if own else "UpBlock3D" for own in reversed(attended)],
        "cross_attention_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": len(tensors["init_attn.0.proj_in.weight"]) // _HEADS_OF_FIRST_ATTENTION,
    }


def diffusers_name(name: str, layers: int = _PUBLISHED_LAYERS) -> str:
    """The denoiser's name of an original module or weight; a name that is not original stays as it is.

    Args:
        layers: residual layers per level.
    """
    for old, new in ENDS.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    if found := re.fullmatch(r"middle_block\.(\d+)\.(.+)", name):
        layer, part = divmod(int(found[1]), 3)
        return _in_block("mid_block", layer, part, found[2])
    if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([0-3])\.(.+)", name):
        down = found[1] == "input"
        level, layer = divmod(int(found[2]) - down, layers + 1)
        return _in_block(f"{'down' if down else 'up'}_blocks.{level}", layer, int(found[3]), found[4])
    return name


def lora_module(name: str, layers: int = _PUBLISHED_LAYERS) -> str:
    """The denoiser's module for a module of a published VADER LoRA, with or without the original's prefix.

    `model.diffusion_model.input_blocks.1.1.<rest>` becomes `down_blocks.0.attentions.0.<rest>`; the
    denoiser's own names stay as they are.
    """
    return diffusers_name(name.rpartition("diffusion_model.")[2], layers)


def _in_block(block: str, layer: int, part: int, rest: str) -> str:
    head, _, tail = rest.partition(".")
    if head == "op":
        return f"{block}.downsamplers.0.conv.{tail}".rstrip(".")
    if head == "conv":
        return f"{block}.upsamplers.0.{rest}"
    if part == 0 and head == "temopral_conv":
        return f"{block}.temp_convs.{layer}.{tail}"
    if part == 0:
        for old, new in RESNET.items():
            if rest == old or rest.startswith(old + "."):
                rest = new + rest.removeprefix(old)
    return f"{block}.{KINDS[part]}.{layer}.{rest}"


def _levels(tensors: Mapping[str, Tensor]) -> list[list[int]]:
    """Numbers of the residual input blocks, level by level."""
    levels: list[list[int]] = [[]]
    number = 1
    while True:
        if f"input_blocks.{number}.0.op.weight" in tensors:
            levels.append([])
        elif f"input_blocks.{number}.0.out_layers.3.weight" in tensors:
            levels[-1].append(number)
        else:
            break
        number += 1
    if not all(levels):
        raise KeyError(f"input_blocks.{number}.0.out_layers.3.weight")
    return levels


def _depths(named: Iterable[str]) -> dict[str, int]:
    """Transformer blocks of every attention, by the attention's name."""
    depths: dict[str, int] = {}
    for name in named:
        attention, _, rest = name.partition(".transformer_blocks.")
        if rest:
            depths[attention] = max(depths.get(attention, 0), int(rest.partition(".")[0]) + 1)
    return depths


def _as_linear(key: str, tensor: Tensor) -> Tensor:
    """Projections around an attention are convolutions of width 1 in the original."""
    return tensor.flatten(1) if key.endswith(("proj_in.weight", "proj_out.weight")) else tensor
