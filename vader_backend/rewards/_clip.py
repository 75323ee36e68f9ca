"""CLIP in transformers' folder layout, as the rewards on it share it: frozen, differentiable down to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from ..loading import load_frozen, reading
from ._images import CLIP_NORM, normalise, resize

Fit = Literal["squash", "crop"]


class Clip:
    """fit: "squash" stretches a picture to the square; "crop" scales its short side and cuts the centre out."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, fit: Fit = "squash") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fit = fit
        self._texts: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Of the features."""
        return int(self.model.config.projection_dim)

    def pixels(self, images_NCHW: Tensor) -> Tensor:
        """What the vision tower takes, of pictures in [0, 1] of any size."""
        size = self.model.config.vision_config.image_size
        fitted = resize(images_NCHW, size, size) if self.fit == "squash" else _short_side(images_NCHW, size)
        return normalise(fitted, CLIP_NORM).to(self.model.device, self.model.dtype)

    def image_features(self, images_NCHW: Tensor) -> Tensor:
        """[N, width] of unit length; gradient reaches the pixels."""
        pooled = self.model.vision_model(self.pixels(images_NCHW)).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[N, width] of unit length, without gradient; each text is encoded once, its overlong end cut off."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts |= dict(zip(new, self._encode(new), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts]).to(self.model.device, self.model.dtype)

    def similarity(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [N] between each picture and its own prompt."""
        return (self.image_features(images_NCHW) * self.text_features(prompts)).sum(-1)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(input_ids=tokens.input_ids.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


def load_clip(folder: Path, fit: Fit = "squash") -> Clip:
    """Load a CLIPModel and its tokenizer.

    Raises:
        InputError: the folder is missing, truncated, lacks weights or holds another kind of network.
    """
    model = load_frozen(CLIPModel, folder, torch.float32, "CLIP model")
    with reading("tokenizer", folder):
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise ValueError("it has neither vocab.json nor tokenizer.json")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return Clip(model, tokenizer, fit)


def _short_side(images_NCHW: Tensor, size: int) -> Tensor:
    """As CLIP's own processor: the short side becomes `size`, then the centre is cut out."""
    height, width = images_NCHW.shape[-2:]
    short = min(height, width)
    scaled = resize(images_NCHW, size * height // short, size * width // short)
    top, left = (scaled.shape[-2] - size) // 2, (scaled.shape[-1] - size) // 2
    return scaled[..., top : top + size, left : left + size]
