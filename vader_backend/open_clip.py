"""CLIP checkpoints in open_clip's layout as transformers' networks, and the tokenizer that belongs to them.

Source: mlfoundations/open_clip for the keys. CLIPModel is the same network under other names; its text
pooling by the highest token id is what eos_token_id 2 stands for there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer

from .config import InputError
from .loading import reading

_HEAD_WIDTH = 64
_MOST_VISION_HEADS = 16  # ViT-H and the larger ones have wider heads instead
_HIGHEST_ID = 2
_START = '"<|startoftext|>"'
_PACKED = re.compile(r"(.+)\.in_proj_(weight|bias)")
_RULES = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^temporal_positional_embedding$", "embeddings.temporal_embedding"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What lies under a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def tower_weights(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tower's weights under transformers' names, the packed attention projections taken apart."""
    named = {}
    for key, tensor in tower.items():
        name = key
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        if packed := _PACKED.fullmatch(name):
            for part, projection in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{packed[1]}.{part}_proj.{packed[2]}"] = projection
        else:
            named[name] = tensor
    return named


def clip_weights(vision: Mapping[str, Tensor], text: Mapping[str, Tensor], logit_scale: Tensor) -> dict[str, Tensor]:
    """Both towers under CLIPModel's names.

    Raises:
        KeyError: a tower has no projection.
    """
    towers = {f"vision_model.{name}": tensor for name, tensor in tower_weights(vision).items()}
    towers |= {f"text_model.{name}": tensor for name, tensor in tower_weights(text).items()}
    return {
        "visual_projection.weight": towers.pop("vision_model.proj").T,
        "text_projection.weight": towers.pop("text_model.text_projection").T,
        "logit_scale": logit_scale,
        **towers,
    }


def clip_config(
    vision: Mapping[str, Tensor],
    text: Mapping[str, Tensor],
    *,
    activation: str = "gelu",
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> CLIPConfig:
    """The sizes that the weights have.

    Args:
        activation: open_clip's own is exact GELU; OpenAI's weights and ViCLIP take "quick_gelu".
        vision_heads: by default the width / 64, at most 16: so in all published sizes from ViT-B to ViT-bigG.
        text_heads: by default the width / 64.

    Raises:
        KeyError: a weight that tells a size is missing.
    """
    patch = vision["conv1.weight"].shape[-1]
    side = round((len(vision["positional_embedding"]) - 1) ** 0.5)
    vocabulary, width = text["token_embedding.weight"].shape
    vision_heads = vision_heads or min(len(vision["class_embedding"]) // _HEAD_WIDTH, _MOST_VISION_HEADS)
    return CLIPConfig(
        vision_config={
            **_tower_config(vision, vision_heads), "hidden_act": activation, "patch_size": patch,
            "image_size": side * patch,
        },
        text_config={
            **_tower_config(text, text_heads or width // _HEAD_WIDTH), "hidden_act": activation,
            "vocab_size": vocabulary, "max_position_embeddings": len(text["positional_embedding"]),
            "bos_token_id": vocabulary - 2, "eos_token_id": _HIGHEST_ID,
        },
        projection_dim=vision["proj"].shape[-1],
    )  # fmt: skip


def _tower_config(tower: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    return {
        "hidden_size": len(tower["transformer.resblocks.0.ln_1.weight"]),
        "intermediate_size": len(tower["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers(tower),
        "num_attention_heads": max(heads, 1),
    }


def layers(tower: Mapping[str, Tensor]) -> int:
    """The number of a tower's blocks."""
    numbers = {int(found[1]) for key in tower if (found := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    return max(numbers, default=-1) + 1


def tokenizer_beside(checkpoint: Path) -> Path | None:
    """The tokenizer's folder that comes with a checkpoint, if any does: one named tokenizer, or the same folder."""
    return next(filter(is_tokenizer, (checkpoint.parent / "tokenizer", checkpoint.parent)), None)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds CLIP's tokenizer, which other models' files of the same names are not."""
    try:
        return (folder / "merges.txt").is_file() and _START in (folder / "vocab.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def read_tokenizer(checkpoint: Path, folder: Path | None, vocabulary: int, owner: str) -> CLIPTokenizer:
    """The tokenizer of a folder, or of the one beside the checkpoint.

    Args:
        folder: None to look beside the checkpoint, in a folder named tokenizer first.
        vocabulary: number of tokens that the text encoder knows.
        owner: what the messages call the network that needs it.

    Raises:
        InputError: there is none, or it is another model's.
    """
    found = folder or tokenizer_beside(checkpoint)
    if found is None or not is_tokenizer(found):
        raise InputError(
            f"{owner} has no tokenizer: put CLIP's vocab.json and merges.txt into "
            f"{found or checkpoint.parent / 'tokenizer'}, or name a folder that holds them (ComfyUI's own is "
            "comfy/sd1_tokenizer)."
        )
    with reading("tokenizer", found):
        tokenizer = CLIPTokenizer.from_pretrained(found, local_files_only=True)
    if len(tokenizer) != vocabulary:
        raise InputError(
            f"The tokenizer in {found} has {len(tokenizer)} tokens, {owner}'s text encoder {vocabulary}; choose the "
            "one of CLIP."
        )
    return tokenizer
