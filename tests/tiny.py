"""The smallest real networks: random weights, seconds to run, in whatever precision a test needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer
from vader_nodes.vader_backend.models.modelscope import ModelScope
from vader_nodes.vader_backend.process import VariancePreserving
from vader_nodes.vader_backend.types import FrameSpec, VideoSpec

VIDEO = VideoSpec(frames=3, height=8, width=8)
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
             "set_alpha_to_one": False}  # fmt: skip


def tiny_model(folder: Any, dtype: torch.dtype = torch.float64, **scheduler: Any) -> ModelScope:
    """A ModelScope whose denoiser has about 60,000 parameters; videos of 8x8 pixels, latents of 4x4."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    unet = UNet3DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",), block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    for parameter in unet.parameters():  # zero-initialised output layers would hide mistakes
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for network in (unet, vae, text):
        network.to(dtype).eval().requires_grad_(False)
    process = VariancePreserving.from_config(SCHEDULER | scheduler)
    return ModelScope("tiny", unet, vae, text, tokenizer, process)


def save_tiny(folder: Path) -> ModelScope:
    """The tiny model in float32, written as a diffusers folder."""
    model = tiny_model(folder, torch.float32)
    model.denoiser.save_pretrained(folder / "unet")
    model.vae.save_pretrained(folder / "vae")
    model.text_encoder.save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "TextToVideoSDPipeline"}))
    return model


class Brightness:
    """A reward that is a smooth function of every pixel; brighter and redder is better."""

    name = "brightness"
    differentiable = True
    description = {"kind": "brightness"}

    def __init__(self, frames: FrameSpec | None = None) -> None:
        self.frames = frames or FrameSpec("all")

    def networks(self) -> Sequence[nn.Module]:
        return []

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        weight = torch.tensor([2.0, 1.0, 0.5], dtype=video_BTCHW.dtype)[:, None, None]
        return (video_BTCHW * weight).square().mean((1, 2, 3, 4))

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        return {self.name: self(video_BTCHW, prompts, indices)}
