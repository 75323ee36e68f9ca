"""The rewards on CLIP: the Human Preference Score from open_clip's layout, and the aesthetic head."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...vader_backend.rewards._clip import Clip, build_open_clip
from ...vader_backend.rewards._fit import squash
from ...vader_backend.rewards.aesthetic import build_head
from .fixtures import Fixture

_HEAD_WIDTH = 64  # open_clip's own, where a configuration names none


def hpsv2(fixture: Fixture) -> dict[str, Tensor]:
    """Pictures in [-1, 1], as VADER's denoised frames are."""
    vision, text = fixture.config["vision_cfg"], fixture.config["text_cfg"]
    heads = {"vision_heads": vision["width"] // vision.get("head_width", _HEAD_WIDTH), "text_heads": text["heads"]}
    clip = Clip(build_open_clip(fixture.weights, torch.float32, Path(fixture.name), **heads), None)
    images = (fixture.inputs["im_pix"] / 2 + 0.5).clamp(0, 1)
    seen, read = clip.image_features(images), F.normalize(clip.embed_tokens(fixture.inputs["token_ids"]), dim=-1)
    scores = (seen * read).sum(-1)
    return {
        "resized": squash(images, clip.model.config.vision_config.image_size),
        "image_features": seen,
        "text_features": read,
        "scores": scores,
        "loss": (1 - scores).mean(),
    }


def aesthetic(fixture: Fixture) -> dict[str, Tensor]:
    normed = F.normalize(fixture.inputs["embed"], dim=-1)
    head = build_head(fixture.weights, normed.shape[-1], Path(fixture.name))
    return {"normed": normed, "score": head(normed)[:, None]}


RUN = {"hpsv2": hpsv2, "aesthetic_mlp": aesthetic}
