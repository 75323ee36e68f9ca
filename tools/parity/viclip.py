"""ViCLIP: both towers, and the single frame."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...vader_backend.rewards._clip import Clip
from ...vader_backend.rewards._viclip import build_viclip
from .fixtures import Fixture


def viclip(fixture: Fixture) -> dict[str, Tensor]:
    heads = {f"{tower}_heads": fixture.config[f"{tower}_heads"] for tower in ("vision", "text")}
    clip = Clip(build_viclip(fixture.weights, torch.float32, Path(fixture.name), **heads), None)
    video = fixture.inputs["video"]
    seen, read = clip.embed_pixels(video), clip.embed_tokens(fixture.inputs["token_ids"])
    videos, texts = F.normalize(seen, dim=-1), F.normalize(read, dim=-1)
    outputs = {
        "video_raw": seen,
        "video_features": videos,
        "text_raw": read,
        "text_features": texts,
        "cosine": (videos * texts).sum(-1),
        "sims": videos @ texts.T,
    }
    if "video_raw_1frame" in fixture.outputs:  # patches of several frames cannot be cut out of one
        outputs["video_raw_1frame"] = clip.embed_pixels(video[:, :1])
    return outputs


RUN = {"viclip": viclip}
