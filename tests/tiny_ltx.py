"""LTX-Video in small, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from tiny_flow import randomised, save_folder, text_encoder

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_shift": 0.95,
    "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip


def tiny_transformer(**sizes: Any) -> LTXVideoTransformer3DModel:
    settings: dict[str, Any] = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    return randomised(LTXVideoTransformer3DModel(**settings | sizes))


def tiny_vae(**sizes: Any) -> AutoencoderKLLTXVideo:
    settings: dict[str, Any] = {
        "latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }  # fmt: skip
    torch.manual_seed(0)
    vae = randomised(AutoencoderKLLTXVideo(**settings | sizes))
    vae.latents_mean += 0.1
    vae.latents_std *= 0.8
    return vae


def save_tiny(folder: Path) -> None:
    save_folder(
        folder, {"_class_name": "LTXPipeline"}, SCHEDULER,
        transformer=tiny_transformer(), vae=tiny_vae(), text_encoder=text_encoder(umt5=False),
    )  # fmt: skip
