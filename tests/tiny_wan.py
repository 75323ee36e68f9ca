"""Wan in small, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from tiny_flow import randomised, save_folder, text_encoder
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel
from vader_nodes.vader_backend.models.wan import Wan
from vader_nodes.vader_backend.types import VideoSpec

VIDEO = VideoSpec(frames=9, height=32, width=48, fps=16.0)
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def tiny_transformer(head_dim: int = 12, **sizes: Any) -> WanTransformer3DModel:
    settings: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": head_dim, "in_channels": 16, "out_channels": 16, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    return randomised(WanTransformer3DModel(**settings | sizes))


def tiny_vae(**sizes: Any) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = randomised(AutoencoderKLWan(**{"base_dim": 4, "z_dim": 16} | sizes))
    vae.decoder.conv_out.weight *= 0.3  # hardly a pixel is saturated then
    return vae


def tiny_vae_2_2(channels: int = 16) -> AutoencoderKLWan:
    statistics = {"latents_mean": [0.1] * channels, "latents_std": [0.9] * channels}
    return tiny_vae(
        z_dim=channels, decoder_base_dim=8, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, **statistics,
    )  # fmt: skip


def tiny_image_encoder(width: int = 16) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_act="gelu",
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return randomised(CLIPVisionModel(config))


def noise_for(model: Wan, video: VideoSpec, batch: int) -> Tensor:
    return torch.randn(model.latent_shape(video, batch), generator=torch.Generator().manual_seed(3))


def picture(video: VideoSpec) -> tuple[Image.Image, Tensor]:
    values = np.random.default_rng(0).integers(0, 256, (video.height, video.width, 3), dtype=np.uint8)
    return Image.fromarray(values), torch.from_numpy(values).permute(2, 0, 1)[None] / 255


def save_tiny(folder: Path) -> None:
    """Wan 2.1, text to video."""
    save_folder(
        folder, {"_class_name": "WanPipeline"}, EULER,
        transformer=tiny_transformer(), vae=tiny_vae(), text_encoder=text_encoder(umt5=True),
    )  # fmt: skip


def save_tiny_image_to_video(folder: Path) -> None:
    """Wan 2.1, image to video."""
    save_folder(
        folder, {"_class_name": "WanImageToVideoPipeline"}, EULER,
        transformer=tiny_transformer(in_channels=36, image_dim=16, added_kv_proj_dim=24), vae=tiny_vae(),
        text_encoder=text_encoder(umt5=True), image_encoder=tiny_image_encoder(),
    )  # fmt: skip


def save_tiny_2_2(folder: Path) -> None:
    """Wan 2.2 5B: one transformer for text and for images, times per token."""
    save_folder(
        folder, {"_class_name": "WanPipeline", "expand_timesteps": True}, EULER,
        transformer=tiny_transformer(), vae=tiny_vae_2_2(), text_encoder=text_encoder(umt5=True),
    )  # fmt: skip
