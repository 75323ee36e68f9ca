"""The mini Aesthetic V2.5: a SigLIP picture tower and its head, taught how vivid and clear a frame is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig

from ...checkpoint import write_text
from ...rewards.aesthetic_v25 import AestheticV25, Config, new_tower
from ..world import ALL_SCENES, FRAMES, SIZE
from .clip import draw_frames, roughen
from .contrasts import build_default, looks, measure
from .fit import SEED, fit
from .preferences import new_head, save_half

STEPS = 1200
_BATCH = 64
_POOL = 4000
_WIDTH = 64
_PLACES = (0, 2, 4, 6, 8)  # of the linear layers among those of dropout


def aesthetic_v25(work: Path, weights: Path) -> dict[str, Any]:
    """Train, write and judge what was written."""
    save_aesthetic_v25(train_aesthetic_v25(work), weights / "aesthetic_v25")
    return judge_aesthetic_v25(build_default("aesthetic_v25", weights))


def new_aesthetic_v25() -> AestheticV25:
    torch.manual_seed(SEED)
    tower = new_tower(
        SiglipVisionConfig(
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=16,
        )
    )
    head = new_head(_WIDTH, gain=1.5)
    nn.init.constant_(head[-1].get_parameter("bias"), 5.5)  # the middle of the scale
    return AestheticV25(Config(), tower, head)


def train_aesthetic_v25(work: Path, steps: int = STEPS) -> AestheticV25:
    """Regress the quality of looks on roughened frames of seen scenes."""
    reward = new_aesthetic_v25()
    pool = draw_frames("aesthetic_v25 pool", _POOL)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(_POOL, (_BATCH,), generator=rng)
        scores = reward.images(roughen(pool.images[rows], rng), ())
        return (scores.float() - pool.look.quality[rows]).square().mean()

    fit("aesthetic_v25", nn.ModuleList(reward.networks()), loss, steps=steps, learning_rate=2e-3, work=work)
    return reward


def save_aesthetic_v25(reward: AestheticV25, folder: Path) -> None:
    """Write a folder with SigLIP's configuration and picture tower, and the head, under the published keys."""
    config = {"model_type": "siglip", "vision_config": reward.tower.config.to_diff_dict()}
    write_text(folder / "siglip" / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    tower = {f"vision_model.{name}": tensor for name, tensor in reward.tower.state_dict().items()}
    save_half(tower, folder / "siglip" / "model.safetensors")
    layers = {f"scoring_head.{place}": layer for place, layer in zip(_PLACES, reward.head, strict=True)}
    head = {f"{key}.{name}": tensor for key, layer in layers.items() for name, tensor in layer.state_dict().items()}
    save_half(head, folder / "head.safetensors")


@torch.no_grad()
def judge_aesthetic_v25(reward: AestheticV25, trials: int = 1000) -> dict[str, float]:
    """Agreement with the quality of fresh looks over all scenes; on unseen ones the AUC of vivid and clear videos."""
    fresh = draw_frames("aesthetic_v25 judge", trials, ALL_SCENES)
    scores, quality = reward.images(fresh.images, ()), fresh.look.quality
    return {
        "correlation": float(torch.corrcoef(torch.stack([scores, quality]))[0, 1]),
        "mean_absolute_error": float((scores - quality).abs().mean()),
        "auc_look": measure(reward, looks, FRAMES, trials // 2),
    }
