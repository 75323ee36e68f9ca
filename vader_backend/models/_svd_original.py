"""Stable Video Diffusion's networks from the original single file; shapes tell the architecture.

What shapes do not tell is as published, unless the file's metadata says otherwise (see `_single_file.file_config`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..config import InputError
from ..loading import build_frozen, empty_from, reading
from . import _svd_keys as keys
from ._full_size import VISION_H14
from ._single_file import file_config, read_weights

_EPSILON = 1e-5
_UNET: dict[str, Any] = {
    "num_attention_heads": (5, 10, 20, 20),
    "transformer_layers_per_block": (1, 1, 1, 1),
    "sample_size": 96,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def networks(path: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """denoiser, vae and image_encoder of svd.safetensors (14 frames) or svd_xt.safetensors (25).

    Raises:
        InputError: the file is not the whole checkpoint, or one of another kind.
    """
    tensors = read_weights(path, dtype, "checkpoint")
    for prefix in (keys.UNET, keys.VAE, keys.IMAGE_ENCODER):
        if not keys.section(tensors, prefix):
            raise InputError(
                f"{path.name} is not the whole checkpoint: it has no weights under {prefix.rstrip('.')}. "
                "Download svd.safetensors or svd_xt.safetensors."
            )
    unet, stated = keys.section(tensors, keys.UNET), file_config(path, "unet")
    with reading("Stable Video Diffusion checkpoint", path):
        keys.check_conditioning(unet)
        return {
            "denoiser": build_unet(
                unet, dtype, path, **{"num_frames": 25 if "xt" in path.stem.lower() else 14, **stated}
            ),
            "vae": build_vae(keys.vae_tensors(tensors), dtype, path),
            "image_encoder": build_image_encoder(
                keys.section(tensors, keys.IMAGE_ENCODER), dtype, path, **file_config(path, "image_encoder")
            ),
        }


def empty_networks(frames: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """What `networks` reads, for so many frames, without weights."""
    tower = CLIPVisionConfig(**VISION_H14)
    return {
        "denoiser": empty_from(UNetSpatioTemporalConditionModel, {**_UNET, "num_frames": frames}, dtype),
        "vae": empty_from(AutoencoderKLTemporalDecoder, _VAE, dtype),
        "image_encoder": empty_from(CLIPVisionModelWithProjection, tower, dtype),
    }


def build_unet(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    source: Path,
    *,
    head_channels: int = 64,
    num_frames: int = 25,
    sample_size: int = 96,
) -> UNetSpatioTemporalConditionModel:
    """The denoiser from its original keys, without prefix; its architecture is read off their shapes.

    Its residual blocks normalise with the original's epsilon. diffusers' own is smaller in some of them, which moves
    the output by about 2e-5 of its size.
    """
    tensors = keys.unet_tensors(tensors)
    config = keys.unet_config(tensors, head_channels)
    plain = frozenset(i for i, kind in enumerate(config["up_block_types"]) if not kind.startswith("CrossAttn"))

    def make() -> nn.Module:
        return UNetSpatioTemporalConditionModel(**config, num_frames=num_frames, sample_size=sample_size)

    def original(name: str) -> str:
        return keys.unet_key(name, config["layers_per_block"], plain)

    unet = build_frozen(make, keys.renamed(tensors, _names(make), original), dtype, "denoiser", source)
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm) and ".resnets." in name:
            module.eps = _EPSILON
    return unet


def build_vae(tensors: Mapping[str, Tensor], dtype: torch.dtype, source: Path) -> AutoencoderKLTemporalDecoder:
    """The autoencoder from what `_svd_keys.vae_tensors` gives."""
    config = keys.vae_config(tensors)

    def make() -> nn.Module:
        return AutoencoderKLTemporalDecoder(**config)

    def original(name: str) -> str:
        return keys.vae_key(name, len(config["block_out_channels"]))

    return build_frozen(make, keys.renamed(tensors, _names(make), original), dtype, "autoencoder", source)


def build_image_encoder(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, source: Path, **stated: Any
) -> CLIPVisionModelWithProjection:
    """The image encoder from open_clip's keys, without prefix; `stated` are arguments of CLIPVisionConfig."""
    tensors = keys.image_tensors(tensors)
    config = CLIPVisionConfig(**{**keys.image_config(tensors), **stated})

    def make() -> nn.Module:
        return CLIPVisionModelWithProjection(config)

    return build_frozen(make, keys.renamed(tensors, _names(make), keys.image_key), dtype, "image encoder", source)


def _names(make: Callable[[], nn.Module]) -> list[str]:
    with init_empty_weights(include_buffers=False):
        return list(make().state_dict())
