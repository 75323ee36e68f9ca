"""Parts that the tests of Wan and LTX-Video share: a word tokenizer, T5 encoders, folders, original key lists."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

WORDS = ("a", "red", "blue", "green", "circle", "square", "moves", "left", "right", "up", "down", "over", "the", "sea")
KEYS = Path(__file__).parent / "fixtures" / "flow_keys.json.gz"
_SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu",
          "relative_attention_num_buckets": 8}  # fmt: skip


def original_shapes(item: str) -> dict[str, list[int]]:
    """Shape by key of a published file: state dicts of ComfyUI's classes of these architectures in full size."""
    with gzip.open(KEYS, "rt") as file:
        return json.load(file)[item]


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that ends with </s>, as T5's does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_encoder(*, umt5: bool) -> nn.Module:
    torch.manual_seed(0)
    config = (UMT5Config if umt5 else T5Config)(vocab_size=len(WORDS) + 3, **_SIZES)
    return randomised((UMT5EncoderModel if umt5 else T5EncoderModel)(config))


def randomised(network: Any) -> Any:
    """Frozen, and without the zeros and ones that hide mistakes."""
    rng = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    return network.eval().requires_grad_(False)


def save_folder(folder: Path, index: Mapping[str, Any], scheduler: Mapping[str, Any], **networks: Any) -> Path:
    """A diffusers folder of the given networks, with the word tokenizer."""
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    save_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_text_file(path: Path, encoder: nn.Module) -> Path:
    """A T5 encoder as ComfyUI keeps it: without the second name of the embedding."""
    state = {key: tensor for key, tensor in encoder.state_dict().items() if key != "encoder.embed_tokens.weight"}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def original_state(network: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's tensors under original keys; names: original key -> the network's own."""
    state = network.state_dict()
    assert set(names.values()) == set(state)
    return {original: state[own].contiguous() for original, own in names.items()}
