"""The smallest VideoCrafter2: the reference tensors' reduced networks as one checkpoint in the original layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from vader_nodes.tools.parity.fixtures import read

FIXTURES = Path(__file__).parent / "fixtures"


def tiny_tensors() -> dict[str, Tensor]:
    """The three fixtures as one checkpoint; the text's width is made that of the denoiser's cross-attention."""
    merged = {"betas": torch.zeros(1000), "scale_arr": torch.ones(1400)}
    for item in ("unet_wide", "vae", "text"):
        merged |= read(FIXTURES / f"videocrafter2_{item}.json").weights
    width = merged["cond_stage_model.model.ln_final.weight"].shape[0]
    for key, tensor in merged.items():
        if ".attn2.to_" in key and tensor.ndim == 2 and tensor.shape[1] < width:
            merged[key] = tensor.repeat(1, 2)[:, :width].contiguous()
    return merged


def save_tiny(folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """The checkpoint as its authors publish it, with a tokenizer beside it."""
    tensors = tiny_tensors() if tensors is None else tensors
    torch.save({"state_dict": tensors, "global_step": 1}, folder / "model.ckpt")
    write_tokenizer(folder / "tokenizer", len(tensors["cond_stage_model.model.token_embedding.weight"]))


def write_tokenizer(folder: Path, size: int) -> None:
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"<spare{i}>" for i in range(size - len(words) - 2)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
