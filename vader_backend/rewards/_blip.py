"""BLIP in the original layout of salesforce/BLIP, as THUDM/ImageReward's checkpoint holds it, on transformers' classes.

The text tower reads the picture by cross-attention in every layer. Layouts and sizes come from those repositories;
the picture tower is their ViT, with an epsilon of 1e-6 and heads of 64 channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ..loading import build_empty, build_frozen, reading

_HEAD_DIM = 64
_VISION_EPSILON = 1e-6
_TEXT_FIELDS = (
    "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "pad_token_id", "vocab_size",
)  # fmt: skip
_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


# ImageReward's towers: ViT-L-16, and BERT base with a few more words.
_VISION: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                           "num_attention_heads": 16, "image_size": 224, "patch_size": 16}  # fmt: skip
_TEXT: dict[str, Any] = {"hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "vocab_size": 30524,
                         "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
                         "layer_norm_eps": 1e-12, "pad_token_id": 0}  # fmt: skip


def empty_towers() -> tuple[Any, Any]:
    """The published picture and text towers without weights."""
    vision = BlipVisionConfig(**_VISION, layer_norm_eps=_VISION_EPSILON)
    text = text_config(_TEXT, vision.hidden_size)
    return (
        build_empty(lambda: BlipVisionModel(vision), torch.float32),
        build_empty(lambda: BlipTextModel(text, add_pooling_layer=False), torch.float32),
    )


def build_vision(tensors: Mapping[str, Tensor], source: Path) -> Any:
    """The picture tower of `visual_encoder.*`, given without that prefix; its sizes come from the tensors.

    Raises:
        InputError: tensors are missing, left over or of another shape.
    """
    what = "BLIP picture encoder"
    with reading(what, source):
        config = _vision_config(tensors)
    return build_frozen(
        lambda: BlipVisionModel(config),
        {_renamed(name): tensor for name, tensor in tensors.items()}, torch.float32, what, source,
    )  # fmt: skip


def build_text(tensors: Mapping[str, Tensor], told: Mapping[str, Any], vision_width: int, source: Path) -> Any:
    """The text tower of `text_encoder.*`, given without that prefix.

    Args:
        told: med_config.json, whose own encoder_width is not that of the network.

    Raises:
        InputError: tensors are missing, left over or of another shape than the configuration says.
    """
    what = "BLIP text encoder"
    with reading(what, source):
        config = text_config(told, vision_width)
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    return build_frozen(lambda: BlipTextModel(config, add_pooling_layer=False), own, torch.float32, what, source)


def text_config(told: Mapping[str, Any], vision_width: int) -> BlipTextConfig:
    """The text tower's configuration; see `build_text`."""
    known = {name: told[name] for name in _TEXT_FIELDS if name in told}
    return BlipTextConfig(**known, encoder_hidden_size=vision_width, is_decoder=True, bos_token_id=None)


def _vision_config(tensors: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        num_attention_heads=max(1, width // _HEAD_DIM),
        image_size=round((tensors["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=_VISION_EPSILON,
    )


def _renamed(name: str) -> str:
    for old, new in _NAMES:
        name = re.sub(old, new, name)
    return name
