"""LTX-Video's original file layouts: sizes read from shapes; the keys are renamed by diffusers itself.

Source: the repository Lightricks/LTX-Video and the published configurations of its diffusers versions.
"""

from __future__ import annotations

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
from ._single_file import Shapes, build_from, count_blocks, file_config, read_weights, without_prefix

_MARKS = ("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn2.to_k.weight")
_OTHERS = ("audio_", "pos_embed.")
_HEADS = 32
_VAE = "vae."

_DECODER_0_9_1 = {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
_VAE_0_9_1 = _DECODER_0_9_1 | {
    "decoder_layers_per_block": (5, 6, 7, 8),
    "decoder_inject_noise": (True, True, True, False),
}
_VAE_0_9_5 = _DECODER_0_9_1 | {
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


def is_ltx(shapes: Shapes) -> bool:
    """Whether a file's tensors are those of an LTX-Video transformer, and not of LTX-2 with its sound."""
    keys = without_prefix(shapes)
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
    config = transformer_config(found, file_config(path, "transformer").get("num_attention_heads", _HEADS))
    renamed = convert_ltx_transformer_checkpoint_to_diffusers(dict(own))
    return build_from(LTXVideoTransformer3DModel, config, renamed, dtype, "denoiser", path)


def transformer_config(shapes: Shapes, heads: int) -> dict[str, Any]:
    """Arguments of LTXVideoTransformer3DModel for the original keys; every published size has 32 heads."""
    width, channels = shapes["patchify_proj.weight"]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "num_layers": count_blocks(shapes, "transformer_blocks."),
    }


def read_vae(path: Path, dtype: torch.dtype, tensors: dict[str, Tensor] | None = None) -> AutoencoderKLLTXVideo:
    """An autoencoder of LTX-Video 0.9.0 to 0.9.8 in its original layout, alone or in a file with the transformer.

    Raises:
        InputError: the file is of another kind or cannot be read.
    """
    own = without_prefix(read_weights(path, dtype, "autoencoder") if tensors is None else tensors, (_VAE,))
    if "encoder.conv_out.conv.weight" not in own:
        raise InputError(f"{path.name} holds no LTX-Video autoencoder; set vae to its file or folder.")
    config = vae_config({key: tuple(tensor.shape) for key, tensor in own.items()})
    renamed = convert_ltx_vae_checkpoint_to_diffusers({_VAE + key: tensor for key, tensor in own.items()})
    return build_from(AutoencoderKLLTXVideo, config, renamed, dtype, "autoencoder", path)


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of AutoencoderKLLTXVideo for the original keys: one of the three published architectures."""
    if shapes["encoder.conv_out.conv.weight"][1] == _VAE_0_9_5["block_out_channels"][-1]:  # type: ignore[index]
        return dict(_VAE_0_9_5)
    timed = "decoder.last_time_embedder.timestep_embedder.linear_1.weight" in shapes
    return dict(_VAE_0_9_1) if timed else {}


def comfy_module(name: str) -> str:
    """ComfyUI's (and LTX-Video's own) name of a module of LTXVideoTransformer3DModel."""
    return name.replace("proj_in", "patchify_proj").replace("time_embed", "adaln_single")
