"""The mini VideoMAE: a classifier of videos by how the shape moves, each class named as captions name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from ...loading import load_frozen
from ...rewards._images import IMAGENET_NORM, normalise
from ...rewards.videomae import VideoMae
from ..world import FRAMES, MOTIONS, SIZE, UNSEEN_SCENES, Scene
from .contrasts import build_default, judge_contrasts
from .fit import SEED, fit
from .videos import LONG, Whereabouts, draw_videos, roughen_videos, save_processor, scores

STEPS = 1000
_WIDTH = 64
_CELL = (2, 16, 16)
_BATCH = 32
_POOL = 3000
CLASSES = tuple(f"moving {motion}" for motion in MOTIONS)


def videomae(work: Path, weights: Path) -> dict[str, Any]:
    """Train it, write it and judge what was written."""
    save_videomae(train_videomae(work), weights / "videomae")
    vae = load_frozen(AutoencoderKL, weights / "modelscope" / "vae", torch.float32, "mini autoencoder")
    return judge_videomae(build_default("videomae", weights), vae)


def new_videomae() -> VideoMAEForVideoClassification:
    torch.manual_seed(SEED)
    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=_CELL[1],
        num_frames=FRAMES,
        tubelet_size=_CELL[0],
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    return VideoMAEForVideoClassification(config)


def train_videomae(work: Path, steps: int = STEPS) -> VideoMAEForVideoClassification:
    """Train on roughened videos of seen scenes."""
    model = new_videomae()
    both = Whereabouts(model, _WIDTH, _CELL)
    pool = draw_videos("videomae pool", _POOL, change=roughen_videos)
    classes = _classes(pool.scenes)
    grid = (FRAMES // _CELL[0], SIZE // _CELL[1], SIZE // _CELL[2])

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(_POOL, (_BATCH,), generator=rng)
        video = pool.at(rows)
        tokens = model.videomae(normalise(video, IMAGENET_NORM)).last_hidden_state
        logits = model.classifier(model.fc_norm(tokens.mean(1)))
        return F.cross_entropy(logits.float(), classes[rows]) + both.loss(tokens.unflatten(1, grid), video)

    fit("videomae", both, loss, steps=steps, learning_rate=2e-3, work=work)
    return model


def _classes(scenes: list[Scene]) -> Tensor:
    """[N]: the number of each scene's class."""
    return torch.tensor([list(MOTIONS).index(scene.motion) for scene in scenes])


@torch.no_grad()
def judge_videomae(reward: VideoMae, vae: AutoencoderKL, size: int = 300) -> dict[str, float]:
    """On unseen scenes: how often its class is right, for 8 frames, for 17, and after an autoencoder; and the AUC."""
    short, long = (
        draw_videos("videomae judge", size, UNSEEN_SCENES, frames=reward.frames, lengths=[length])
        for length in (FRAMES, LONG)
    )
    some = short.some(torch.arange(size) < size // 5)
    latents = (vae.encode(video * 2 - 1).latent_dist.mean for video in some.all())
    decoded = torch.stack([vae.decode(z).sample / 2 + 0.5 for z in latents])
    return {
        "accuracy": _accuracy(reward, short.all(), short.scenes),
        "accuracy_long": _accuracy(reward, long.all(), long.scenes),
        "accuracy_autoencoder": _accuracy(reward, decoded.clamp(0, 1), some.scenes),
        **judge_contrasts("videomae", reward),
    }


def _accuracy(reward: VideoMae, video_BTCHW: Tensor, scenes: list[Scene]) -> float:
    every = [scores(reward, video_BTCHW, [name] * len(scenes)) for name in CLASSES]
    return float((torch.stack(every).argmax(0) == _classes(scenes)).float().mean())


def save_videomae(model: VideoMAEForVideoClassification, folder: Path) -> None:
    """Write the transformers folder, weights in float16."""
    model.half().save_pretrained(folder)
    save_processor(folder / "preprocessor_config.json", "VideoMAEImageProcessor")
