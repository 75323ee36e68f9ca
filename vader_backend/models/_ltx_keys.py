"""LTX-Video's original file layouts: sizes read from shapes; the keys are renamed by diffusers itself.

Source: the repository Lightricks/LTX-Video and the published configurations of its diffusers versions.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_ltx_vae_checkpoint_to_diffusers,
)
from torch import Tensor

from ..config import InputError
from ..loading import reading
from ._single_file import Part, Shapes, build_from, count_blocks, file_config, read_weights, shapes, without_prefix
from ._t5 import lacking_text

_MARKS = ("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn2.to_k.weight")
_OTHERS = ("audio_", "pos_embed.")
_HEADS = 32
_VAE = "vae."
_VAE_MARK, _VAE_STATISTICS = "encoder.conv_out.conv.weight", "per_channel_statistics.mean-of-means"

_DECODER_0_9_1 = {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
VAE_0_9_0: dict[str, Any] = {}  # AutoencoderKLLTXVideo's own defaults
_VAE_0_9_1 = _DECODER_0_9_1 | {
    "decoder_layers_per_block": (5, 6, 7, 8),
    "decoder_inject_noise": (True, True, True, False),
}
VAE_0_9_5: dict[str, Any] = _DECODER_0_9_1 | {
    "decoder_layers_per_block": (5, 5, 5, 5),
    "decoder_inject_noise": (False,) * 4,
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "layers_per_block": (4, 6, 6, 2, 2),
    "spatio_temporal_scaling": (True,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


def is_ltx(found: Shapes) -> bool:
    """Whether a file's tensors are those of an LTX-Video transformer, and not of LTX-2 with its sound."""
    keys = without_prefix(found)
    return all(mark in keys for mark in _MARKS) and not any(key.startswith(_OTHERS) for key in keys)


def read_transformer(path: Path, dtype: torch.dtype, tensors: dict[str, Tensor]) -> LTXVideoTransformer3DModel:
    """The transformer of a file in LTX-Video's own layout, with or without a prefix, alone or with its autoencoder.

    Raises:
        InputError: the file is of another kind.
    """
    own = {key: tensor for key, tensor in without_prefix(tensors).items() if not key.startswith(_VAE)}
    found = {key: tuple(tensor.shape) for key, tensor in own.items()}
    if not is_ltx(found):
        raise InputError(f"{path.name} is no LTX-Video transformer; choose another file.")
    with reading("denoiser", path):
        config = transformer_config(found, file_config(path, "transformer").get("num_attention_heads", _HEADS))
        renamed = convert_ltx_transformer_checkpoint_to_diffusers(dict(own))
    return build_from(LTXVideoTransformer3DModel, config, renamed, dtype, "denoiser", path)


def lacking_part(path: Path, *, vae: str, text_encoder: str, tokenizer: str) -> Part | None:
    """What is still to be named of the parts that a file does not hold itself; empty is what is not named yet."""
    found = shapes(path)
    if not vae and not _holds_vae(path):
        return Part("vae", "LTX-Video's autoencoder", _holds_vae)
    width = without_prefix(found)["caption_projection.linear_1.weight"][1]
    return lacking_text(text_encoder, tokenizer, width, umt5=False)


def _holds_vae(path: Path) -> bool:
    """Whether a file holds an autoencoder in its original layout, alone or with the transformer."""
    return _is_vae(without_prefix(shapes(path), (_VAE,)))


def _is_vae(keys: Collection[str]) -> bool:
    return _VAE_MARK in keys and _VAE_STATISTICS in keys


def transformer_config(found: Shapes, heads: int) -> dict[str, Any]:
    """Arguments of LTXVideoTransformer3DModel for the original keys; every published size has 32 heads."""
    width, channels = found["patchify_proj.weight"]
    return {
        "in_channels": channels,
        "out_channels": found["proj_out.weight"][0],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": found["transformer_blocks.0.attn2.to_k.weight"][1],
        "caption_channels": found["caption_projection.linear_1.weight"][1],
        "num_layers": count_blocks(found, "transformer_blocks."),
    }


def read_vae(path: Path, dtype: torch.dtype, tensors: dict[str, Tensor] | None = None) -> AutoencoderKLLTXVideo:
    """An autoencoder of LTX-Video 0.9.0 to 0.9.8 in its original layout, alone or in a file with the transformer.

    Raises:
        InputError: the file is of another kind or cannot be read.
    """
    own = without_prefix(read_weights(path, dtype, "autoencoder") if tensors is None else tensors, (_VAE,))
    if not _is_vae(own):
        raise InputError(f"{path.name} holds no LTX-Video autoencoder; set vae to its file or folder.")
    with reading("autoencoder", path):
        config = vae_config({key: tuple(tensor.shape) for key, tensor in own.items()})
        renamed = convert_ltx_vae_checkpoint_to_diffusers({_VAE + key: tensor for key, tensor in own.items()})
    return build_from(AutoencoderKLLTXVideo, config, renamed, dtype, "autoencoder", path)


def vae_config(found: Shapes) -> dict[str, Any]:
    """Arguments of AutoencoderKLLTXVideo for the original keys: one of the three published architectures."""
    if found[_VAE_MARK][1] == VAE_0_9_5["block_out_channels"][-1]:
        return dict(VAE_0_9_5)
    timed = "decoder.last_time_embedder.timestep_embedder.linear_1.weight" in found
    return dict(_VAE_0_9_1 if timed else VAE_0_9_0)


def comfy_module(name: str) -> str:
    """ComfyUI's (and LTX-Video's own) name of a module of LTXVideoTransformer3DModel."""
    return name.replace("proj_in", "patchify_proj").replace("time_embed", "adaln_single")
