"""Networks that several families share, at their published sizes and without weights.

Sources: the published configurations of Stable Diffusion 2.1 and of open_clip's ViT-H-14.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from ..loading import empty_from

# The picture tower of CLIP ViT-H-14.
VISION_H14: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
# Its text tower, up to the last layer but one.
_TEXT_H14: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def clip_text(dtype: torch.dtype) -> Any:
    """The text encoder of ModelScope and VideoCrafter2."""
    return empty_from(CLIPTextModel, CLIPTextConfig(**_TEXT_H14), dtype)


def image_autoencoder(dtype: torch.dtype) -> AutoencoderKL:
    """Stable Diffusion's autoencoder, which both apply to each frame."""
    return empty_from(AutoencoderKL, _AUTOENCODER, dtype)
