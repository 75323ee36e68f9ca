"""VideoCrafter2's text encoder: open_clip's ViT-H-14 text tower up to its last block but one, then the final norm.

Source: the published checkpoint's keys; Cherti et al. 2023. transformers' CLIPTextModel with a layer less is
the same network under other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..config import InputError
from ..loading import build_frozen, reading

_HEAD_WIDTH = 64
_START = '"<|startoftext|>"'
_UNUSED = ("text_projection", "logit_scale")

_RULES = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def unused(tensors: Mapping[str, Tensor]) -> set[str]:
    """The original keys that no one reads: the last block and what belongs to contrastive training."""
    last = f"transformer.resblocks.{_layers(tensors) - 1}."
    return {key for key in tensors if key in _UNUSED or key.startswith(last)}


def clip_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original weights under CLIPTextModel's names, the packed attention projections taken apart."""
    named, skipped = {}, unused(tensors)
    for key, tensor in tensors.items():
        if key in skipped:
            continue
        name = key
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        if packed := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name):
            for part, projection in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{packed[1]}.{part}_proj.{packed[2]}"] = projection
        else:
            named[name] = tensor
    return named


def build_text_encoder(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, source: Path, *, heads: int | None = None
) -> CLIPTextModel:
    """The frozen tower around weights under their original keys (after `cond_stage_model.model.`).

    Args:
        heads: attention heads; by default the width / 64, as in ViT-H-14.

    Raises:
        InputError: a weight is missing, left over or misshapen.
    """
    with reading("text encoder", source):
        vocabulary, width = tensors["token_embedding.weight"].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
            num_hidden_layers=_layers(tensors) - 1,
            num_attention_heads=heads or max(width // _HEAD_WIDTH, 1),
            max_position_embeddings=len(tensors["positional_embedding"]),
            hidden_act="gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
        named = clip_weights(tensors)
    return build_frozen(lambda: _tower(config), named, dtype, "text encoder", source)


def read_tokenizer(checkpoint: Path, folder: str, vocabulary: int) -> CLIPTokenizer:
    """The tokenizer of a folder, or of the one beside the checkpoint.

    Args:
        folder: empty to look beside the checkpoint, in a folder named tokenizer first.
        vocabulary: number of tokens that the text encoder knows.

    Raises:
        InputError: there is none, or it is another model's.
    """
    found = Path(folder) if folder else tokenizer_beside(checkpoint)
    if found is None or not is_tokenizer(found):
        raise InputError(
            f"VideoCrafter2 has no tokenizer: put CLIP's vocab.json and merges.txt into "
            f"{found or checkpoint.parent / 'tokenizer'}, or name a folder that holds them (ComfyUI's own is "
            "comfy/sd1_tokenizer)."
        )
    with reading("tokenizer", found):
        tokenizer = CLIPTokenizer.from_pretrained(found, local_files_only=True)
    if len(tokenizer) != vocabulary:
        raise InputError(
            f"The tokenizer in {found} has {len(tokenizer)} tokens, VideoCrafter2's text encoder {vocabulary}; "
            f"choose the one of CLIP."
        )
    return tokenizer


def tokenizer_beside(checkpoint: Path) -> Path | None:
    """The tokenizer's folder that comes with a checkpoint, if any does."""
    return next(filter(is_tokenizer, (checkpoint.parent / "tokenizer", checkpoint.parent)), None)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds CLIP's tokenizer, which other models' files of the same names are not."""
    try:
        return (folder / "merges.txt").is_file() and _START in (folder / "vocab.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Token ids [B, length]; what is too long is cut off before the end mark, what is short is padded with 0."""
    ids = tokenizer(list(texts), truncation=True, max_length=length).input_ids
    return torch.tensor([row + [0] * (length - len(row)) for row in ids])


def _tower(config: CLIPTextConfig) -> CLIPTextModel:
    """CLIPTextModel without the wrapper around it that transformers 4 has."""
    model = CLIPTextModel(config)
    return getattr(model, "text_model", model)


def _layers(tensors: Mapping[str, Tensor]) -> int:
    numbers = {int(found[1]) for key in tensors if (found := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    return max(numbers, default=0) + 1
