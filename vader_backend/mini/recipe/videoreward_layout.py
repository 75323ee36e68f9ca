"""The folder of the mini VideoReward: its words, its sizes, and how it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Tokenizer, Qwen2VLConfig

from ...checkpoint import write_text
from ...rewards._qwen2vl import RewardNetwork
from ...rewards.videoreward import ASPECTS, CHAT, VIDEO, Config, QwenVideoReward, read_tokenizer
from ..world import SIZE
from .fit import SEED
from .preferences import save_half
from .tokenizer import byte_letters, byte_pair_merges, caption_words

WIDTH = 64
CELL = (2, 16, 16)  # frames, rows and columns that one token of a video stands for
_MERGE = 2  # patches a side of a token
_TEMPLATE = "\nLooks: <|VQ_reward|> Motion: <|MQ_reward|> Prompt: {text_prompt} <|TA_reward|>\n"
_END = "<|endoftext|>"
_SPECIAL = (
    _END, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", VIDEO
)  # fmt: skip
_ABOUT: dict[str, Any] = {
    "data_config": {"max_frame_pixels": SIZE**2, "prompt_template_type": "detailed_special", "fps": 2.0},
    "model_config": {"use_special_tokens": True, "reward_token": "special", "output_dim": 1},
    "peft_lora_config": {"lora_enable": False},
}


def save_qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Write vocab.json, merges.txt and tokenizer_config.json as Qwen2-VL's; each word that occurs is one token."""
    around = re.findall(r" ?[A-Za-z]+", CHAT + _TEMPLATE.replace("{text_prompt}", ""))
    words = sorted({word.replace(" ", "Ġ") for word in [*around, *(f" {word}" for word in caption_words())]})
    merges = byte_pair_merges(words, end="")
    entries = list(dict.fromkeys([*byte_letters(), *map("".join, merges)]))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(len(entries) + i): {"content": word, "special": True, "normalized": False}
            for i, word in enumerate(_SPECIAL)
        },
        "eos_token": "<|im_end|>",
        "pad_token": _END,
        "model_max_length": 2048,
    }
    vocabulary = {entry: i for i, entry in enumerate([*entries, _END])}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return read_tokenizer(folder)


def qwen_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """config.json as Qwen2-VL's, smaller."""
    patch = CELL[1] // _MERGE
    return {
        "model_type": "qwen2_vl", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "tie_word_embeddings": True,
        "use_sliding_window": False, "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "vision_config": {
            "depth": 3, "embed_dim": WIDTH, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": WIDTH,
            "patch_size": patch, "spatial_merge_size": _MERGE, "spatial_patch_size": patch,
            "temporal_patch_size": CELL[0],
        },
    }  # fmt: skip


def new_videoreward(tokenizer: Qwen2Tokenizer) -> QwenVideoReward:
    torch.manual_seed(SEED)
    config = Qwen2VLConfig.from_dict(qwen_config(tokenizer))
    for part in (config.text_config, config.vision_config):
        part.initializer_range = WIDTH**-0.5  # the usual 0.02 suits networks that are far wider
    return QwenVideoReward(Config(), RewardNetwork(config, outputs=1).eval(), tokenizer, _TEMPLATE, _ABOUT)


def save_videoreward(reward: QwenVideoReward, folder: Path, step: int) -> None:
    """Write VideoReward's folder under the published keys, and in it that of its Qwen2-VL, less the weights."""
    tensors = {name.replace("language.", "model."): tensor for name, tensor in reward.network.state_dict().items()}
    save_half(tensors, folder / f"checkpoint-{step}" / "model.safetensors")
    scale = {f"{short}_{name}": value for name, values in (("mean", reward.mean), ("std", reward.std))
             for short, value in zip(ASPECTS.values(), values, strict=True)}  # fmt: skip
    write_text(folder / "model_config.json", json.dumps({**_ABOUT, "inference_config": scale}, indent=2) + "\n")
    write_text(folder / "prompt_template.txt", _TEMPLATE)
    write_text(folder / "qwen2vl" / "config.json", json.dumps(qwen_config(reward.tokenizer), indent=2) + "\n")
    save_qwen_tokenizer(folder / "qwen2vl")
