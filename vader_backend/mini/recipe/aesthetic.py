"""The mini aesthetic head: LAION's layout, on the mini CLIP's features, taught how vivid and clear a frame is."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...checkpoint import atomic_path
from ...rewards._clip import Clip
from ...rewards.aesthetic import AestheticHead
from ...rng import generator
from ..world import ALL_SCENES
from .clip import Frames, draw_frames, roughen
from .fit import SEED, fit

STEPS = 2000
_BATCH = 256
_POOL = 12000
_HIDDEN = (256, 64, 32, 16)  # the published 1024, 128, 64, 16 would take 0.5 MB


def train_aesthetic(clip: Clip, work: Path, steps: int = STEPS) -> AestheticHead:
    """Regress the quality of looks on features of roughened frames, taken once."""
    torch.manual_seed(SEED)
    head = AestheticHead((clip.width, *_HIDDEN, 1))
    pool = draw_frames("aesthetic pool", _POOL)
    features = _features(clip, pool, generator(SEED, "aesthetic roughness"))

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(_POOL, (_BATCH,), generator=rng)
        return (head(features[rows]).float() - pool.look.quality[rows]).square().mean()

    fit("aesthetic", head, loss, steps=steps, learning_rate=1e-3, work=work, log_every=500)
    return head


@torch.no_grad()
def _features(clip: Clip, frames: Frames, rng: torch.Generator | None) -> Tensor:
    parts = [roughen(part, rng) if rng else part for part in frames.images.split(200)]
    return torch.cat([clip.image_features(part) for part in parts])


@torch.no_grad()
def judge_aesthetic(clip: Clip, head: AestheticHead, trials: int = 1000) -> dict[str, float]:
    """Correlation with the quality of fresh looks, and the mean absolute error, over all scenes."""
    fresh = draw_frames("aesthetic judge", trials, ALL_SCENES)
    scores, quality = head(_features(clip, fresh, None)).float(), fresh.look.quality
    both = torch.corrcoef(torch.stack([scores, quality]))
    return {"correlation": float(both[0, 1]), "mean_absolute_error": float((scores - quality).abs().mean())}


def save_aesthetic(head: AestheticHead, path: Path) -> None:
    """Write the published keys, in float16."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in head.state_dict().items()}, temporary)
