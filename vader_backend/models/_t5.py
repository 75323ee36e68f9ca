"""T5-like text encoders with their tokenizers, from transformers folders or from ComfyUI's single files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from ..config import InputError
from ..loading import empty_from, load_frozen, reading
from ..precision import converted
from ..stand_in import tokenizer as stand_in_tokenizer
from ._single_file import Part, build_from, count_blocks, read_weights, shapes

_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_UMT5_BIAS = _BIAS.replace("block.0", "block.1")  # T5 has it in the first block only
_EMBEDDING = "shared.weight"
_SENTENCEPIECE = "spiece_model"
_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_PADDING = 128  # an embedding has rows to spare, up to a multiple of this


@dataclass(frozen=True)
class Tokenizer:
    """The little of a tokenizer that is needed; neither function adds or expects special tokens."""

    ids: Callable[[str], list[int]]
    text: Callable[[list[int]], str]
    end: int
    pad: int


@dataclass(frozen=True)
class T5Text:
    """A text encoder whose input is padded to a fixed length.

    length: tokens per prompt, end token included.
    """

    encoder: nn.Module
    tokenizer: Tokenizer
    length: int

    def truncated(self, prompt: str) -> str:
        """The end of a prompt that does not fit."""
        return self.tokenizer.text(self.tokenizer.ids(prompt)[self.length - 1 :]).strip()

    def encode(self, texts: Sequence[str], *, hide_padding: bool) -> tuple[Tensor, Tensor]:
        """States [B, L, D] in float32 and the mask [B, L] that is 1 on tokens and 0 on padding.

        Args:
            hide_padding: whether the encoder's attention leaves the padding out.
        """
        device = next(self.encoder.parameters()).device
        rows = [[*self.tokenizer.ids(text)[: self.length - 1], self.tokenizer.end] for text in texts]
        padded = [row + [self.tokenizer.pad] * (self.length - len(row)) for row in rows]
        mask_BL = torch.tensor([[1] * len(row) + [0] * (self.length - len(row)) for row in rows], device=device)
        ids_BL = torch.tensor(padded, device=device)
        states = self.encoder(ids_BL, attention_mask=mask_BL if hide_padding else None).last_hidden_state
        return states.float(), mask_BL


def load_text(folder: Path, dtype: torch.dtype, length: int, *, umt5: bool) -> T5Text:
    """The text encoder and tokenizer of a diffusers folder.

    Raises:
        InputError: a part is missing or cannot be read.
    """
    cls = UMT5EncoderModel if umt5 else T5EncoderModel
    encoder = load_frozen(cls, folder / "text_encoder", dtype, "text encoder")
    return T5Text(encoder, load_tokenizer(folder / "tokenizer"), length)


def empty_text(dtype: torch.dtype, length: int, *, umt5: bool) -> T5Text:
    """T5 v1.1 XXL or UMT5-XXL without weights, and a tokenizer that only counts words."""
    cls = UMT5EncoderModel if umt5 else T5EncoderModel
    config = UMT5Config(vocab_size=256384, **_XXL) if umt5 else T5Config(vocab_size=32128, **_XXL)
    words = stand_in_tokenizer(length)

    def ids(text: str) -> list[int]:
        return list(words(text, add_special_tokens=False).input_ids)

    return T5Text(empty_from(cls, config, dtype), Tokenizer(ids, words.decode, end=1, pad=0), length)


def read_text(encoder: Path, tokenizer: str, dtype: torch.dtype, length: int, *, umt5: bool) -> T5Text:
    """A text encoder that is given on its own.

    Args:
        encoder: a single file, or a folder that holds a transformers model.
        tokenizer: folder of the tokenizer; empty looks beside a folder and inside a file.

    Raises:
        InputError: a part is missing or cannot be read.
    """
    if encoder.is_dir():
        network = load_frozen(UMT5EncoderModel if umt5 else T5EncoderModel, encoder, dtype, "text encoder")
        beside = encoder.parent / "tokenizer"
        return T5Text(network, load_tokenizer(Path(tokenizer) if tokenizer else beside), length)
    tensors = read_weights(encoder, dtype, "text encoder")
    model = tensors.pop(_SENTENCEPIECE, None)
    network = t5_network(tensors, dtype, encoder, umt5=umt5)
    if tokenizer:
        return T5Text(network, load_tokenizer(Path(tokenizer)), length)
    if model is None:
        raise InputError(
            f"The text encoder {encoder.name} carries no tokenizer; set tokenizer to a folder that holds its "
            "tokenizer.json and tokenizer_config.json."
        )
    return T5Text(network, sentencepiece_tokenizer(model), length)


def lacking_text(encoder: str, tokenizer: str, width: int, *, umt5: bool) -> Part | None:
    """What is still to be named of a text encoder and its tokenizer.

    Args:
        encoder, tokenizer: as for `read_text`, empty where they are not named yet.
        width: channels of the text states that the denoiser takes.
    """
    name = "UMT5" if umt5 else "T5 v1.1"
    if not encoder:
        return Part("text_encoder", f"a {name} text encoder", lambda path: _is_encoder(path, width, umt5=umt5))
    found = shapes(Path(encoder))
    if tokenizer or _EMBEDDING not in found or _SENTENCEPIECE in found:
        return None
    rows = found[_EMBEDDING][0]
    return Part("tokenizer", f"{name}'s tokenizer (tokenizer.json)", lambda path: _is_tokenizer(path, rows))


def _is_encoder(path: Path, width: int, *, umt5: bool) -> bool:
    found = shapes(path)
    return _BIAS in found and (_UMT5_BIAS in found) is umt5 and found[_EMBEDDING][1] == width


def _is_tokenizer(folder: Path, rows: int) -> bool:
    """Whether its vocabulary is of the size of an embedding with so many rows."""
    size = len(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    return rows - _PADDING < size <= rows


def load_tokenizer(folder: Path) -> Tokenizer:
    """A transformers tokenizer from a local folder. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(
            f"The tokenizer is missing: there is no folder {folder}. Set tokenizer to a folder that holds "
            "tokenizer.json and tokenizer_config.json."
        )
    with reading("tokenizer", folder):
        inner = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def ids(text: str) -> list[int]:
        return list(inner(text, add_special_tokens=False, verbose=False).input_ids)

    return Tokenizer(ids, inner.decode, inner.eos_token_id, inner.pad_token_id)


def sentencepiece_tokenizer(model: Tensor) -> Tokenizer:
    """The tokenizer whose sentencepiece model is stored as bytes in a tensor.

    Raises:
        InputError: the sentencepiece package is not installed, or the bytes are no model.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise InputError(
            "This text encoder carries a sentencepiece tokenizer: install sentencepiece, or set tokenizer to a "
            "folder that holds tokenizer.json and tokenizer_config.json."
        ) from error
    with reading("tokenizer", Path(_SENTENCEPIECE)):
        inner = SentencePieceProcessor(model_proto=bytes(model.to(torch.uint8).tolist()))
    return Tokenizer(inner.encode, inner.decode, inner.eos_id(), max(inner.pad_id(), 0))


def t5_network(tensors: dict[str, Tensor], dtype: torch.dtype, source: Path, *, umt5: bool) -> Any:
    """A T5 v1.1 or UMT5 encoder around the tensors of a single file; its sizes are read from their shapes.

    Raises:
        InputError: the file is of another kind.
    """
    if _BIAS not in tensors or _EMBEDDING not in tensors:
        raise InputError(f"The text encoder {source.name} is not a T5 encoder (it has no {_BIAS}); choose another.")
    if (_UMT5_BIAS in tensors) is not umt5 and count_blocks(tensors, "encoder.block.") > 1:
        found, needed = ("T5 v1.1", "UMT5") if umt5 else ("UMT5", "T5 v1.1")
        raise InputError(f"The text encoder {source.name} is {found}, but this model needs {needed}; choose another.")
    with reading("text encoder", source):
        config = (UMT5Config if umt5 else T5Config)(**_sizes(tensors), feed_forward_proj="gated-gelu")
    shared = converted(tensors[_EMBEDDING], dtype)
    tied = {_EMBEDDING: shared, "encoder.embed_tokens.weight": shared}
    cls = UMT5EncoderModel if umt5 else T5EncoderModel
    return build_from(cls, config, {**tensors, **tied}, dtype, "text encoder", source)


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What the shapes tell of a configuration. Raises KeyError where a weight is missing."""
    layer = "encoder.block.0.layer"
    buckets, heads = tensors[_BIAS].shape
    vocabulary, width = tensors[_EMBEDDING].shape
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": len(tensors[f"{layer}.0.SelfAttention.q.weight"]) // heads,
        "d_ff": len(tensors[f"{layer}.1.DenseReluDense.wi_0.weight"]),
        "num_layers": count_blocks(tensors, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
