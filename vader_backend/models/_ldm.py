"""The image autoencoder of Latent Diffusion under its original keys, applied to a video frame by frame; its schedule.

Source: Rombach et al. 2022. diffusers' AutoencoderKL is the same network under other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..loading import build_frozen, reading

SCHEDULER: Mapping[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
_CHUNK = 16  # frames encoded at a time

_RULES = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def diffusers_key(key: str, levels: int) -> str:
    """AutoencoderKL's name of an original key; the original counts the decoder's levels from the finest one."""
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), key)


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """AutoencoderKL's configuration, read from the shapes of the weights. Raises KeyError where one is missing."""
    levels = _count(tensors, "encoder.down.{}.block.0.conv1.weight")
    attended = ["Attn" if f"encoder.down.{i}.attn.0.norm.weight" in tensors else "" for i in range(levels)]
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [len(tensors[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "layers_per_block": _count(tensors, "encoder.down.0.block.{}.conv1.weight"),
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attended],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attended)],
    }


def build_autoencoder(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, source: Path, *, scaling_factor: float = 0.18215
) -> AutoencoderKL:
    """The frozen network around weights under their original keys.

    Raises:
        InputError: a weight is missing, left over or misshapen.
    """
    with reading("autoencoder", source):
        config = architecture(tensors)
        levels = len(config["block_out_channels"])
        named = {diffusers_key(key, levels): _as_linear(key, tensor) for key, tensor in tensors.items()}
    return build_frozen(
        lambda: AutoencoderKL(**config, scaling_factor=scaling_factor), named, dtype, "autoencoder", source
    )


def encode_frames(vae: AutoencoderKL, video_BTCHW: Tensor) -> Tensor:
    """Means of the latents [B, C, T, h, w], float32 and scaled, of a video in [0, 1]."""
    frames = video_BTCHW.flatten(0, 1).to(vae.device, vae.dtype) * 2 - 1
    means = torch.cat([vae.encode(part).latent_dist.mean for part in frames.split(_CHUNK)])
    return means.unflatten(0, (len(video_BTCHW), -1)).transpose(1, 2).float() * vae.config.scaling_factor


def decode_frames(vae: AutoencoderKL, z_BCTHW: Tensor) -> Tensor:
    """The video [B, T, 3, H, W], float32 in about [-1, 1], of scaled latents; differentiable."""
    latents = z_BCTHW.transpose(1, 2).flatten(0, 1) / vae.config.scaling_factor
    return vae.decode(latents.to(vae.dtype)).sample.float().unflatten(0, (len(z_BCTHW), -1))


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = 0
    while pattern.format(found) in tensors:
        found += 1
    return found


def _as_linear(key: str, tensor: Tensor) -> Tensor:
    """The attention's projections are 1x1 convolutions in the original."""
    return tensor.flatten(1) if ".attn" in key and tensor.ndim > 1 else tensor
