"""Wan's original file layouts: sizes read from shapes, and the keys of the Wan 2.2 autoencoder.

Sources: the repositories Wan-Video/Wan2.1 and Wan2.2; the published configurations of their diffusers versions.
Transformers and the Wan 2.1 autoencoder are renamed by diffusers itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

from ..config import InputError
from ..loading import reading
from ._clip_image import is_image_encoder
from ._single_file import Part, Shapes, build_from, count_blocks, read_weights, shapes, without_prefix
from ._t5 import lacking_text

_HEAD_DIM = 128
_CHANNELS_2_1 = 16
_VAE_PREFIXES = ("vae.", "first_stage_model.")
_MARK = "head.modulation"
_VARIANTS = ("vace_", "face_adapter.", "motion_encoder.", "control_adapter.", "audio_", "casual_audio", "ref_conv",
             "img_emb.emb_pos", "patch_embedding_")  # fmt: skip

_MEAN_2_2 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_2_2 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

VAE_2_1: dict[str, Any] = {}  # AutoencoderKLWan's own defaults
VAE_2_2: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": list(_MEAN_2_2),
    "latents_std": list(_STD_2_2),
}

_VAE_PARTS = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.(resample|time_conv)", r".down_blocks.\1.downsampler.\3"),
    (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.(resample|time_conv)", r".up_blocks.\1.upsampler.\3"),
    (r"\.downsamples\.(\d+)\.downsamples\.", r".down_blocks.\1.resnets."),
    (r"\.upsamples\.(\d+)\.upsamples\.", r".up_blocks.\1.resnets."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def is_wan(found: Shapes) -> bool:
    """Whether a file's tensors are those of a Wan text- or image-to-video transformer."""
    keys = without_prefix(found)
    return _MARK in keys and not any(key.startswith(_VARIANTS) for key in keys)


def read_transformer(path: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer file in Wan's own layout, with or without ComfyUI's prefix.

    Raises:
        InputError: the file is of another kind or cannot be read.
    """
    tensors = without_prefix(read_weights(path, dtype, "denoiser"))
    if not is_wan({key: tuple(tensor.shape) for key, tensor in tensors.items()}):
        raise InputError(f"{path.name} is no Wan text- or image-to-video transformer; choose another file.")
    with reading("denoiser", path):
        config = transformer_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        renamed = convert_wan_transformer_to_diffusers(dict(tensors))
    return build_from(WanTransformer3DModel, config, renamed, dtype, "denoiser", path)


def lacking_part(path: Path, *, vae: str, text_encoder: str, tokenizer: str, image_encoder: str) -> Part | None:
    """What is still to be named of the parts that a transformer file needs; empty is what is not named yet."""
    config = transformer_config(without_prefix(shapes(path)))
    if not vae:
        version = "2.2" if config["out_channels"] > _CHANNELS_2_1 else "2.1"
        return Part("vae", f"the Wan {version} autoencoder", lambda file: _vae_channels(file) == config["out_channels"])
    if config["image_dim"] and not image_encoder:
        what = "the CLIP vision encoder ViT-H"
        return Part("image_encoder", what, partial(is_image_encoder, width=config["image_dim"]))
    return lacking_text(text_encoder, tokenizer, config["text_dim"], umt5=True)


def transformer_config(found: Shapes) -> dict[str, Any]:
    """Arguments of WanTransformer3DModel for the original keys; every published size has heads of 128 channels."""
    width, channels, *patch = found["patch_embedding.weight"]
    image = found.get("img_emb.proj.0.weight")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": width // _HEAD_DIM,
        "attention_head_dim": _HEAD_DIM,
        "in_channels": channels,
        "out_channels": found["head.head.weight"][0] // math.prod(patch),
        "text_dim": found["text_embedding.0.weight"][1],
        "freq_dim": found["time_embedding.0.weight"][1],
        "ffn_dim": found["blocks.0.ffn.0.weight"][0],
        "num_layers": count_blocks(found, "blocks."),
        "cross_attn_norm": "blocks.0.norm3.weight" in found,
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": width if "blocks.0.cross_attn.k_img.weight" in found else None,
    }


def read_vae(path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    """A Wan 2.1 or Wan 2.2 autoencoder file in its original layout.

    Raises:
        InputError: the file is of another kind or cannot be read.
    """
    tensors = without_prefix(read_weights(path, dtype, "autoencoder"), _VAE_PREFIXES)
    if not _is_vae(tensors):
        raise InputError(f"{path.name} is no Wan autoencoder in its original layout; choose another file as vae.")
    with reading("autoencoder", path):
        config = vae_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        newer = config.get("is_residual", False)
        renamed = {vae_key(k): v for k, v in tensors.items()} if newer else convert_wan_vae_to_diffusers(dict(tensors))
    return build_from(AutoencoderKLWan, config, renamed, dtype, "autoencoder", path)


def _is_vae(keys: Collection[str]) -> bool:
    return "encoder.conv1.weight" in keys and "conv2.weight" in keys


def _vae_channels(path: Path) -> int | None:
    """Latent channels of an autoencoder file; None for any other file."""
    found = without_prefix(shapes(path), _VAE_PREFIXES)
    return found["conv2.weight"][0] if _is_vae(found) else None


def vae_config(found: Shapes) -> dict[str, Any]:
    """Arguments of AutoencoderKLWan for the original keys; what does not show in a shape is as published."""
    config: dict[str, Any] = {
        "base_dim": found["encoder.conv1.weight"][0],
        "decoder_base_dim": found["decoder.head.2.weight"][1],
        "z_dim": found["conv2.weight"][0],
    }
    if not any(key.startswith("decoder.upsamples.0.upsamples.") for key in found):
        return config
    return {**VAE_2_2, **config}


def vae_key(key: str) -> str:
    """Wan 2.2's name of an autoencoder's tensor as AutoencoderKLWan has it."""
    for pattern, name in _VAE_PARTS:
        key = re.sub(pattern, name, key)
    return key


def comfy_module(name: str) -> str:
    """ComfyUI's (and Wan's own) name of a module of WanTransformer3DModel that a LoRA may sit on."""
    for diffusers, original in _MODULES:
        name = name.replace(diffusers, original)
    return name


_MODULES = (
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0", ".o"),
    (".add_k_proj", ".k_img"),
    (".add_v_proj", ".v_img"),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("proj_out", "head.head"),
)
