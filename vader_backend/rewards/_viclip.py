"""ViCLIP's network: a CLIP whose picture tower takes the patches of all frames at once.

Source: OpenGVLab/InternVideo, Data/InternVid/viclip; Wang et al. 2023, InternVid. Behind the embeddings it is
CLIP with QuickGELU, so transformers' CLIPModel is built around others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from ..loading import build_empty, build_frozen, reading
from ..open_clip import clip_config, clip_weights, section
from ._clip import ScaledClip
from ._clip_sizes import VIT_L14

_VISION, _TEXT, _TEMPERATURE = "vision_encoder.", "text_encoder.", "temp"


class VideoEmbeddings(nn.Module):
    """One class token for the clip, then the patches: those of one place together, from the first frame to the last."""

    def __init__(self, config: CLIPVisionConfig, frames: int, depth: int) -> None:
        """Args:
        frames: how many time steps have an embedding of their own.
        depth: how many frames a patch spans.
        """
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv3d(3, width, (depth, patch, patch), (depth, patch, patch), bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        self.temporal_embedding = nn.Parameter(torch.empty(1, frames, width))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """[B, T, 3, H, W] -> [B, 1 + patches * time steps, width].

        Args:
            interpolate_pos_encoding: what transformers passes; not taken.
        """
        patches_BTNC = self.patch_embedding(pixel_values.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
        still = patches_BTNC.shape[1] == 1
        time = self.temporal_embedding.mean(1, keepdim=True) if still else self.temporal_embedding
        first, places = self.position_embedding.weight.split([1, patches_BTNC.shape[2]])
        tokens_BNTC = (patches_BTNC + places + time[:, :, None]).transpose(1, 2)
        lead = (self.class_embedding + first).expand(len(tokens_BNTC), 1, -1)
        return torch.cat([lead, tokens_BNTC.flatten(1, 2)], dim=1)


def trained_frames(model: CLIPModel) -> int:
    """How many frames a ViCLIP network takes; beside that it takes single ones."""
    embeddings = model.vision_model.embeddings
    return int(embeddings.temporal_embedding.shape[1] * embeddings.patch_embedding.kernel_size[0])


def empty_viclip(dtype: torch.dtype) -> ScaledClip:
    """ViCLIP-L, which takes 8 frames and 32 tokens, without weights."""
    text = {**VIT_L14["text_config"], "max_position_embeddings": 32}
    config = CLIPConfig(**{**VIT_L14, "text_config": text})
    return build_empty(lambda: _network(config, frames=8, depth=1), dtype, kept=("logit_scale",))


def build_viclip(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    source: Path,
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> ScaledClip:
    """The frozen network around tensors under the published keys: vision_encoder., text_encoder. and temp.

    Raises:
        InputError: a tensor is missing, left over or misshapen.
    """
    with reading("ViCLIP model", source):
        vision, text = section(tensors, _VISION), section(tensors, _TEXT)
        heads = {"vision_heads": vision_heads, "text_heads": text_heads}
        config = clip_config(vision, text, activation="quick_gelu", **heads)
        frames, depth = vision["temporal_positional_embedding"].shape[1], vision["conv1.weight"].shape[2]
        named = clip_weights(vision, text, -tensors[_TEMPERATURE].float().log())
        named |= {key: value for key, value in tensors.items() if not key.startswith((_VISION, _TEXT, _TEMPERATURE))}
    return build_frozen(
        lambda: _network(config, frames, depth), named, dtype, "ViCLIP model", source, kept=("logit_scale",)
    )


def _network(config: CLIPConfig, frames: int, depth: int) -> ScaledClip:
    model = ScaledClip(config)
    model.vision_model.embeddings = VideoEmbeddings(model.config.vision_config, frames, depth)
    return model
