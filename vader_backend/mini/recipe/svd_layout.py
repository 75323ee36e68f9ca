"""Writes a Stable Video Diffusion checkpoint as svd.safetensors: the inverse of models._svd_original."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from ...checkpoint import atomic_path
from ...models import _svd_keys as keys


def save_svd(
    unet: UNetSpatioTemporalConditionModel,
    vae: AutoencoderKLTemporalDecoder,
    image_encoder: CLIPVisionModelWithProjection,
    path: Path,
) -> None:
    """Write the networks in float16; what their shapes do not tell goes into the file's metadata."""
    config = {
        "unet": {
            "head_channels": unet.config.block_out_channels[0] // unet.config.num_attention_heads[0],
            "num_frames": unet.config.num_frames,
            "sample_size": unet.config.sample_size,
        },
        "image_encoder": {
            "num_attention_heads": image_encoder.config.num_attention_heads,
            "hidden_act": image_encoder.config.hidden_act,
        },
    }
    tensors = {**_unet(unet), **_vae(vae), **_image_encoder(image_encoder)}
    halves = {key: value.detach().half().contiguous() for key, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(halves, temporary, metadata={"config": json.dumps(config)})


def _unet(unet: UNetSpatioTemporalConditionModel) -> dict[str, Tensor]:
    layers, kinds = unet.config.layers_per_block, unet.config.up_block_types
    plain = frozenset(i for i, kind in enumerate(kinds) if not kind.startswith("CrossAttn"))
    return {keys.UNET + keys.unet_key(name, layers, plain): value for name, value in unet.state_dict().items()}


def _vae(vae: AutoencoderKLTemporalDecoder) -> dict[str, Tensor]:
    """The decoder in its own place; the encoder with its quant_conv once, among the conditioners."""
    tensors = {}
    for name, value in vae.state_dict().items():
        key = keys.vae_key(name, len(vae.config.block_out_channels))
        convolution = ".attn_1." in key and key.endswith("weight") and value.ndim == 2
        prefix = keys.VAE if name.startswith("decoder.") else keys.CONDITIONING_VAE
        tensors[prefix + key] = value[:, :, None, None] if convolution else value
    return tensors


def _image_encoder(image_encoder: CLIPVisionModelWithProjection) -> dict[str, Tensor]:
    """With query, key and value of each layer fused, and the projection transposed."""
    tensors = {keys.image_key(name): value for name, value in image_encoder.state_dict().items()}
    for name in [name for name in tensors if "attn.q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    tensors["proj"] = tensors["proj"].T
    return {keys.IMAGE_ENCODER + name: value for name, value in tensors.items()}
