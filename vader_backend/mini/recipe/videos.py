"""Whole videos for the networks that watch them, and ways to spoil one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rewards._images import IMAGENET_NORM
from ...rewards.base import SingleReward
from ...rng import generator
from ...types import FrameSpec
from ..world import FRAMES, SEEN_SCENES, SIZE, Look, Scene, random_look, random_scenes, render
from .clip import roughen
from .fit import SEED

LONG = 17  # frames of Open-Sora's videos
_CHUNK = 100
Change = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Videos:
    """N videos: frames [N, T, 3, 64, 64] in 256 steps, and the scenes that their captions speak of."""

    frames: Tensor
    scenes: list[Scene]

    def at(self, rows: Tensor) -> Tensor:
        """Some of them, [B, T, 3, 64, 64] in [0, 1]."""
        return self.frames[rows].float() / 255

    def some(self, chosen: Tensor) -> Videos:
        """Those where a mask [N] is true."""
        return Videos(self.frames[chosen], [scene for scene, kept in zip(self.scenes, chosen, strict=True) if kept])

    def all(self) -> Tensor:
        """All of them, likewise."""
        return self.frames.float() / 255

    @property
    def captions(self) -> list[str]:
        """One per video."""
        return [scene.caption for scene in self.scenes]


def draw_videos(
    key: str,
    size: int,
    pool: Sequence[Scene] = SEEN_SCENES,
    *,
    frames: FrameSpec | None = None,
    lengths: Sequence[int] = (FRAMES, LONG),
    look: Callable[[int, torch.Generator], Look] | None = None,
    change: Change | None = None,
) -> Videos:
    """Draw videos, and keep some frames of each.

    Args:
        frames: which frames of each are kept; by default 8, spread evenly.
        lengths: how many frames the videos have before that, in turns.
        look: draws the looks of so many videos; by default uniform ones.
        change: what is done to the videos.
    """
    rng, chosen = generator(SEED, key), frames or FrameSpec("even", FRAMES)
    drawn = look or partial(random_look, uniform=True)
    scenes, parts = random_scenes(size, rng, pool), []
    for number, first in enumerate(range(0, size, _CHUNK)):
        some, length = scenes[first : first + _CHUNK], lengths[number % len(lengths)]
        video = render(some, drawn(len(some), rng), length)[:, chosen.pick(length, rng)]
        changed = change(video, rng) if change else video
        parts.append((changed * 255).round().byte())
    return Videos(torch.cat(parts), scenes)


def roughen_videos(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Each frame softened and made noisy by an amount of its own."""
    return roughen(video_BTCHW.flatten(0, 1), rng).unflatten(0, video_BTCHW.shape[:2])


def soften(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Each video as soft as an autoencoder may leave it, all of its frames alike."""
    frames = video_BTCHW.flatten(0, 1)
    soft = F.interpolate(F.avg_pool2d(frames, 2), scale_factor=2, mode="bilinear").view_as(video_BTCHW)
    return video_BTCHW.lerp(soft, torch.rand(len(video_BTCHW), 1, 1, 1, 1, generator=rng))


class Whereabouts(nn.Module):
    """A network together with a linear layer that says of each token how much of the shape it shows, where and when.

    That is easy to learn, and the direction of motion is then a sum over the tokens. From the direction alone
    networks of this size learn nothing for very long.
    """

    def __init__(self, network: nn.Module, width: int, cell: tuple[int, int, int]) -> None:
        """Args:
        width: of the tokens.
        cell: how many frames, rows and columns a token stands for.
        """
        super().__init__()
        self.network = network
        self.head = nn.Linear(width, 3)
        self.cell = cell

    def loss(self, tokens_BTHWD: Tensor, video_BTCHW: Tensor, travel: float = 1.0) -> Tensor:
        """Of what the layer says of the tokens of a video in [0, 1].

        Args:
            travel: how much more the products with the moment count than the share alone.
        """
        share, *products = (self.head(tokens_BTHWD).float() - whereabouts(video_BTCHW, self.cell)).square().unbind(-1)
        return 10 * (share + travel * torch.stack(products).sum(0)).mean() / 3


def whereabouts(video_BTCHW: Tensor, cell: tuple[int, int, int]) -> Tensor:
    """[B, t, h, w, 3] per cell: the share of the shape in sight, alone and times the moment times x or y.

    Moment and place are in [-1, 1]. The shape is what differs from the upper left corner, where it never is.
    """
    backdrop = video_BTCHW[..., :4, :4].mean((-2, -1), keepdim=True)
    shown = F.avg_pool3d((video_BTCHW - backdrop).abs().mean(2)[:, None], cell).squeeze(1)
    shown = shown / shown.amax((1, 2, 3), keepdim=True)
    time, y, x = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in shown.shape[1:]), indexing="ij")
    return torch.stack([shown, shown * time * x, shown * time * y], dim=-1)


# --- bad videos ------------------------------------------------------------------------------


def flicker(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Each frame of another brightness and tint."""
    shift = 0.07 * torch.randn(*video_BTCHW.shape[:2], 1, 1, 1, generator=rng)
    tint = 0.04 * torch.randn(*video_BTCHW.shape[:3], 1, 1, generator=rng)
    return (video_BTCHW + shift + tint).clamp(0, 1)


def noise(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Grain, another one in each frame."""
    return (video_BTCHW + 0.06 * torch.randn(video_BTCHW.shape, generator=rng)).clamp(0, 1)


def shuffle(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """The frames in random order."""
    orders = [torch.randperm(video_BTCHW.shape[1], generator=rng) for _ in video_BTCHW]
    return torch.stack([video[order] for video, order in zip(video_BTCHW, orders, strict=True)])


def jump(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Each frame moved by up to 8 pixels either way, so that the shape leaps about."""
    result = video_BTCHW.clone()
    for frames in result:
        for i, (down, right) in enumerate(torch.randint(-8, 9, (len(frames), 2), generator=rng).tolist()):
            frames[i] = frames[i].roll((down, right), (-2, -1))
    return result


def freeze(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """One of the frames, all the time."""
    frames = torch.randint(video_BTCHW.shape[1], (len(video_BTCHW),), generator=rng).tolist()
    return torch.stack([video[[i]] for video, i in zip(video_BTCHW, frames, strict=True)]).expand_as(video_BTCHW)


def blur(video_BTCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Every 4 x 4 pixels become one, and what is between these is interpolated."""
    small = F.avg_pool2d(video_BTCHW.flatten(0, 1), 4)
    return F.interpolate(small, scale_factor=4, mode="bilinear").view_as(video_BTCHW)


SPOILED: dict[str, Change] = {
    "flicker": flicker,
    "noise": noise,
    "shuffle": shuffle,
    "jump": jump,
}


# --- what is done with them ------------------------------------------------------------------


@torch.no_grad()
def scores(reward: SingleReward, video_BTCHW: Tensor, captions: Sequence[str]) -> Tensor:
    """[B]: the scores of videos that hold the reward's own frames."""
    parts, indices = [], range(video_BTCHW.shape[1])
    for first in range(0, len(captions), _CHUNK):
        rows = slice(first, first + _CHUNK)
        parts.append(reward(video_BTCHW[rows], captions[rows], indices))
    return torch.cat(parts)


def save_processor(path: Path, kind: str) -> None:
    """The configuration of a video processor that leaves the world's frames their size."""
    processor: dict[str, Any] = {
        f"{'video' if 'Video' in kind.removeprefix('VideoMAE') else 'image'}_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": IMAGENET_NORM[0],
        "image_std": IMAGENET_NORM[1],
    }
    path.write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
