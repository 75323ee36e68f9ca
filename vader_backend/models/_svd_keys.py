"""Stable Video Diffusion's original layout, told in the names of diffusers and transformers.

Each `*_key` function turns one of our names into the original one, so that one table reads a checkpoint and
names the modules of a LoRA for ComfyUI; each `*_config` derives the architecture from the original's shapes.
Layout: Stability-AI/generative-models, configs/inference/svd.yaml.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._single_file import count_blocks

UNET = "model.diffusion_model."
IMAGE_ENCODER = "conditioner.embedders.0.open_clip.model.visual."
VAE = "first_stage_model."
CONDITIONING_VAE = "conditioner.embedders.3.encoder."

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "spatial_res_block.": "",
    "temporal_res_block.": "time_stack.",
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {
    "temporal_transformer_blocks.": "time_stack.",
    "time_pos_embed.linear_1": "time_pos_embed.0",
    "time_pos_embed.linear_2": "time_pos_embed.2",
}
_UNET_BLOCK = re.compile(
    r"(down|up|mid)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)

_VAE_OUTSIDE = {"time_conv_out": "conv_out.time_mix_conv", "conv_norm_out": "norm_out"}
_VAE_RESNET = {"spatial_res_block.": "", "conv_shortcut": "nin_shortcut", "time_mixer.": ""}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(down|up|mid)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")

_IMAGE = {
    "vision_model.": "",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "self_attn.": "attn.",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "visual_projection.weight": "proj",
}
_IMAGE_HEADS = 16


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def renamed(tensors: Mapping[str, Tensor], names: Iterable[str], original: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors under our names; one that none of our names stands for keeps its original key."""
    ours = {original(name): name for name in names}
    return {ours.get(key, key): tensor for key, tensor in tensors.items()}


def unet_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet with projections around its attentions as linear layers, where they are convolutions of width 1."""
    return {k: v.flatten(1) if k.endswith(("proj_in.weight", "proj_out.weight")) else v for k, v in tensors.items()}


def unet_key(name: str, layers: int = 2, plain: frozenset[int] = frozenset({0})) -> str:
    """The original name of a module or weight of UNetSpatioTemporalConditionModel.

    Args:
        layers: resnets per block. plain: up blocks without attention. The defaults are the published ones.
    """
    found = _UNET_BLOCK.fullmatch(name)
    if found is None:
        return _swapped(name, _OUTSIDE)
    side, block, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    rest = _swapped(rest, {"resnets": _RESNET, "attentions": _ATTENTION}.get(kind, {}))
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 if block in plain else 2}.{rest}"
    attended = int(kind == "attentions")
    if side == "mid":
        return f"middle_block.{2 * index + attended}.{rest}"
    place = f"input_blocks.{first + index + 1}" if side == "down" else f"output_blocks.{first + index}"
    return f"{place}.{attended}.{rest}"


def unet_config(tensors: Mapping[str, Tensor], head_channels: int = 64) -> dict[str, Any]:
    """Arguments of UNetSpatioTemporalConditionModel; shapes do not tell the width of a head.

    Args:
        tensors: the UNet under its original keys, without prefix.

    Raises:
        KeyError: it is no such UNet.
    """
    layers = unet_layers(tensors)
    levels = count_blocks(tensors, "input_blocks.") // (layers + 1)
    first = [f"input_blocks.{1 + level * (layers + 1)}." for level in range(levels)]
    channels = [len(tensors[f"{block}0.out_layers.3.weight"]) for block in first]
    attended = [f"{block}1.norm.weight" in tensors for block in first]
    depths = [count_blocks(tensors, f"{block}1.transformer_blocks.") or 1 for block in first]
    if not attended[-1]:
        depths[-1] = count_blocks(tensors, "middle_block.1.transformer_blocks.")
    added = tensors["label_emb.0.0.weight"].shape[1]
    return {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(tensors["out.2.weight"]),
        "block_out_channels": channels,
        "down_block_types": [_block_type("Down", yes) for yes in attended],
        "up_block_types": [_block_type("Up", yes) for yes in reversed(attended)],
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "num_attention_heads": [width // head_channels for width in channels],
        "cross_attention_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "addition_time_embed_dim": added // 3,
        "projection_class_embeddings_input_dim": added,
    }


def check_conditioning(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a UNet is conditioned on something else than fps, motion and noise."""
    added = tensors["label_emb.0.0.weight"].shape[1]
    if added % 3:
        raise ValueError(f"its added conditioning has {added} channels, not three equal parts")


def unet_layers(tensors: Mapping[str, Tensor]) -> int:
    """Resnets per block of a UNet under its original keys."""
    blocks = count_blocks(tensors, "input_blocks.")
    return next((i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in tensors), blocks) - 1


def vae_key(name: str, levels: int) -> str:
    """The original name of a weight of AutoencoderKLTemporalDecoder with so many resolutions."""
    found = _VAE_BLOCK.fullmatch(name)
    if found is None:
        return _swapped(name, _VAE_OUTSIDE)
    part, side, block, kind, index, rest = found[1], found[2], int(found[3] or 0), found[4], int(found[5]), found[6]
    if kind == "attentions":
        return f"{part}.mid.attn_1.{_swapped(rest, _VAE_ATTENTION)}"
    rest = _swapped(rest, _RESNET if rest.startswith("temporal_res_block") else _VAE_RESNET)
    if side == "mid":
        return f"{part}.mid.block_{index + 1}.{rest}"
    place = f"{part}.{side}.{levels - 1 - block if side == 'up' else block}"
    return f"{place}.block.{index}.{rest}" if kind == "resnets" else f"{place}.{side}sample.{rest}"


def vae_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder, quant_conv and temporal decoder of a whole checkpoint, still under their original names.

    The encoder is the one that conditions on the image, where the file has it: that one keeps its quant_conv apart.
    """
    decoder, own, other = (section(tensors, prefix) for prefix in (VAE + "decoder.", VAE, CONDITIONING_VAE))
    source = other if "encoder.conv_in.weight" in other else own
    found = {key: value for key, value in source.items() if key.startswith(("encoder.", "quant_conv."))}
    found |= {f"decoder.{key}": value for key, value in decoder.items()}
    found |= {
        key: value for key, value in own.items() if key.startswith("post_quant_conv.")
    }  # refused: no place for it
    if "quant_conv.weight" not in found:
        width = len(found["encoder.conv_out.weight"])
        like = found["encoder.conv_out.bias"]
        found["quant_conv.weight"] = torch.eye(width, dtype=like.dtype)[:, :, None, None]
        found["quant_conv.bias"] = torch.zeros_like(like)
    return {key: value.flatten(1) if _is_linear(key, value) else value for key, value in found.items()}


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of AutoencoderKLTemporalDecoder. Raises KeyError where the tensors are of another kind."""
    levels = count_blocks(tensors, "encoder.down.")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "latent_channels": len(tensors["encoder.conv_out.weight"]) // 2,
        "block_out_channels": [len(tensors[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "layers_per_block": count_blocks(tensors, "encoder.down.0.block."),
        "scaling_factor": 0.18215,
    }


def image_key(name: str) -> str:
    """The original name of a weight of CLIPVisionModelWithProjection, after `image_tensors`."""
    return _swapped(name, _IMAGE)


def image_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's vision tower with its fused query, key and value taken apart, and its projection transposed."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        block, fused, kind = key.partition("in_proj_")
        if fused:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                found[f"{block}{part}_proj.{kind}"] = tensor
        else:
            found[key] = value.T if key == "proj" else value
    return found


def image_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of CLIPVisionConfig for open_clip's ViT-H-14, whose heads shapes do not tell."""
    patch = tensors["conv1.weight"].shape[-1]
    return {
        "hidden_size": len(tensors["class_embedding"]),
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        "projection_dim": len(tensors["proj"]),
        "num_hidden_layers": count_blocks(tensors, "transformer.resblocks."),
        "num_attention_heads": _IMAGE_HEADS,
        "image_size": patch * math.isqrt(len(tensors["positional_embedding"]) - 1),
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def _swapped(text: str, table: Mapping[str, str]) -> str:
    for ours, original in table.items():
        text = text.replace(ours, original)
    return text


def _block_type(side: str, attended: bool) -> str:
    return f"{'CrossAttn' if attended else ''}{side}BlockSpatioTemporal"


def _is_linear(key: str, value: Tensor) -> bool:
    """Whether diffusers holds this 1x1 convolution of the middle attention as a linear layer."""
    return ".mid.attn_1." in key and value.ndim == 4
