"""The mini V-JEPA: features of hidden places predicted from the seen ones, learnt on good renders alone.

Bardes et al. 2024: the target encoder is a moving average of the encoder, the loss an L1 distance to its
normalised features, the masks are of two settings.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...checkpoint import atomic_path
from ...rewards._images import IMAGENET_NORM, normalise
from ...rewards._vjepa import Encoder, Grid, Predictor, Vjepa, take
from ...rewards._vjepa_masks import draw
from ...rewards._vjepa_original import published_heads
from ...rewards.vjepa import Config, VjepaReward, distance
from ...rng import generator
from ..world import FRAMES, SIZE, UNSEEN_SCENES
from .contrasts import build_default, judge_contrasts
from .fit import SEED, fit
from .videos import draw_videos, save_processor, scores, soften

STEPS = 1000
_CELL = (4, 8, 8)
_WIDTH, _NARROW, _DEPTH = 64, 48, 3
_BATCH = 16
_POOL = 3000
_FLOOR, _LOUDNESS = 0.1, 0.5  # added to the variance of the patches' components; of all patches at first
_MOMENTUM = 0.999  # of the target encoder at first; 1 at the end


def vjepa(work: Path, weights: Path) -> dict[str, Any]:
    """Train it, write it and judge what was written."""
    save_vjepa(train_vjepa(work), weights / "vjepa" / "vjepa.safetensors")
    return judge_vjepa(build_default("vjepa", weights))


def new_vjepa() -> Vjepa:
    torch.manual_seed(SEED)
    grid = Grid(*(length // cell for length, cell in zip((FRAMES, SIZE, SIZE), _CELL, strict=True)))
    heads = published_heads(_WIDTH)
    encoder = Encoder(_WIDTH, _DEPTH, heads, 2 * _WIDTH, grid, _CELL)
    predictor = Predictor(_WIDTH, _NARROW, _DEPTH, heads, 2 * _NARROW, grid, len(Config().blocks()))
    for table in (encoder.pos_embed, predictor.predictor_pos_embed):
        table.requires_grad_(False).copy_(positions(grid, table.shape[-1]))
    for token in predictor.mask_tokens:
        nn.init.normal_(token, std=0.02)
    return Vjepa(encoder, predictor, copy.deepcopy(encoder).requires_grad_(False))


def positions(grid: Grid, width: int) -> Tensor:
    """The fixed table [1, N, width]: half of the features tell the time, a quarter each the row and the column."""
    lengths = (grid.time, grid.height, grid.width)
    axes = torch.meshgrid(*(torch.arange(length) for length in lengths), indexing="ij")
    shares = (width // 2, width // 4, width // 4)
    return torch.cat([_waves(axis.flatten(), share) for axis, share in zip(axes, shares, strict=True)], dim=1)[None]


def _waves(places_N: Tensor, features: int) -> Tensor:
    """[N, features]: sines, then cosines, of ever lower frequency."""
    angles = places_N[:, None] * 10000 ** -torch.linspace(0, 1, features // 2 + 1)[:-1]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.no_grad()
def fix_patches(encoder: Encoder, clips_BCTHW: Tensor) -> None:
    """Set the projection of patches, for good: what is common in these videos counts little, what is rare much.

    Every principal component of the patches is divided by its variance, and the lot projected at random. So
    grain, flicker and leaps, which no good video has, are loud. A projection that is not trained is also
    steadier (Chen et al. 2021, MoCo v3).
    """
    projection: Any = encoder.patch_embed.proj
    cuts = clips_BCTHW
    for axis, length in enumerate(encoder.cell, start=2):
        cuts = cuts.unfold(axis, length, length)
    patches = cuts.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, projection.weight[0].numel())
    mean = patches.mean(0)
    variance, components = torch.linalg.eigh((patches - mean).T.cov(correction=0))
    rescaled = components / (variance.clamp(min=0) + _FLOOR) @ components.T
    drawn = torch.empty(len(projection.weight), len(mean))
    weight = nn.init.orthogonal_(drawn, generator=generator(SEED, "vjepa patches")) @ rescaled
    weight *= _LOUDNESS / ((patches - mean) @ weight.T).square().mean().sqrt()
    projection.weight.copy_(weight.view_as(projection.weight))
    projection.bias.copy_(-weight @ mean - encoder.pos_embed.mean((0, 1)))
    encoder.patch_embed.requires_grad_(False)


def train_vjepa(work: Path, steps: int = STEPS) -> Vjepa:
    """Train on softened videos of seen scenes; masks are drawn anew in each step."""
    network = new_vjepa()
    pool = draw_videos("vjepa pool", _POOL, change=soften)
    some = torch.randperm(_POOL, generator=generator(SEED, "vjepa some"))[:300]
    fix_patches(network.encoder, normalise(pool.at(some), IMAGENET_NORM).transpose(1, 2))
    network.target_encoder.load_state_dict(network.encoder.state_dict())
    averaged, followed = ([p.detach() for p in part.parameters()] for part in (network.target_encoder, network.encoder))

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(_POOL, (_BATCH,), generator=rng)
        clips = normalise(pool.at(rows), IMAGENET_NORM).transpose(1, 2)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, followed, (1 - _MOMENTUM) * (1 - step / steps))
            targets = network.targets(clips)
        return masked_loss(network, clips, targets, rng)

    fit("vjepa", network, loss, steps=steps, learning_rate=2e-3, work=work)
    return network


def masked_loss(network: Vjepa, clips_BCTHW: Tensor, targets_BND: Tensor, rng: torch.Generator) -> Tensor:
    """The loss with one mask of each setting, the same for all videos."""
    losses = []
    for kind, blocks in enumerate(Config().blocks()):
        mask = draw(blocks, network.encoder.grid, kind, rng)
        seen, hidden = (places.expand(len(clips_BCTHW), -1) for places in (mask.seen_K, mask.hidden_M))
        losses.append(distance(network.predict(clips_BCTHW, seen, hidden, kind), take(targets_BND, hidden)).mean())
    return torch.stack(losses).mean()


def judge_vjepa(reward: VjepaReward, size: int = 300) -> dict[str, float]:
    """On unseen scenes: the loss, how much features differ between the places of a video, and the AUC."""
    videos = draw_videos("vjepa judge", size, UNSEEN_SCENES, frames=reward.frames)
    with torch.no_grad():
        features = reward.predictive.targets(reward.view(videos.all()).transpose(1, 2))
    return {
        "loss": -float(scores(reward, videos.all(), videos.captions).mean()),
        "spread": float(distance(features.mean(1, keepdim=True), features).mean()),
        **judge_contrasts("vjepa", reward),
    }


def save_vjepa(network: Vjepa, path: Path) -> None:
    """Write the published keys, in float16, and the size of the frames."""
    tensors = {}
    for key, tensor in network.state_dict().items():
        part, _, name = key.partition(".")
        tensors[f"{part}/module.backbone.{name}"] = tensor.half().contiguous()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    save_processor(path.parent / "video_preprocessor_config.json", "VJEPA2VideoProcessor")
