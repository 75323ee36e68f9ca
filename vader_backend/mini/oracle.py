"""Reads colour, shape, motion and background straight from pixels.

It has no parameters and no network is ever trained on it, so it tells a better video from one
that only pleases a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZE, Scene, shape_mask

ATTRIBUTES = ("background", "color", "shape", "motion")
_MIN_CONTRAST = 0.12  # a shape differs from the background by at least this much (L2 over RGB)
_MIN_AREA = 40.0  # pixels
_MIN_TRAVEL = 7.0  # pixels between the first two and the last two frames


@dataclass(frozen=True)
class Reading:
    """What one video shows; None where nothing could be made out.

    strength: how much of its pure colour the shape has, about 0.3 (pale, hazy) to 1; 0 where there is none.
    """

    background: str | None
    color: str | None
    shape: str | None
    motion: str | None
    strength: float = 0.0


def read(video_BTCHW: Tensor) -> list[Reading]:
    """Read each video.

    Args:
        video_BTCHW: [B, T, 3, H, W] in [0, 1]; other sizes than 64x64 are resized.
    """
    return [_read_one(video) for video in video_BTCHW.detach().float().cpu()]


def accuracy(video_BTCHW: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of videos in which each attribute is as its scene says, and their mean."""
    hits = correct(video_BTCHW, scenes).mean(dim=0)
    result = {name: float(hits[i]) for i, name in enumerate(ATTRIBUTES)}
    return {**result, "mean": float(hits.mean())}


def correct(video_BTCHW: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """1 where an attribute of a video is as its scene says, else 0; float32 [B, 4] in the order of ATTRIBUTES."""
    rows = [
        [float(getattr(reading, name) == getattr(scene, name)) for name in ATTRIBUTES]
        for reading, scene in zip(read(video_BTCHW), scenes, strict=True)
    ]
    return torch.tensor(rows)


def strength(video_BTCHW: Tensor) -> Tensor:
    """How strong the shapes' colours are, float32 [B]; see `Reading`."""
    return torch.tensor([reading.strength for reading in read(video_BTCHW)])


def flicker(video_BTCHW: Tensor) -> Tensor:
    """How much the pixels that nothing moves over change from one frame to the next, float32 [B]; 0 is steady.

    It is the median over the pixels, since the shape moves over fewer than half of them; the mean over RGB and frames.

    Args:
        video_BTCHW: [B, T, 3, H, W] in [0, 1], T at least 2.
    """
    change = video_BTCHW.detach().float().cpu().diff(dim=1).abs().mean(2)  # [B, T - 1, H, W]
    return change.flatten(2).median(dim=2).values.mean(1)


def _read_one(video_TCHW: Tensor) -> Reading:
    if video_TCHW.shape[-2:] != (SIZE, SIZE):
        video_TCHW = F.interpolate(video_TCHW, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    border = torch.cat(
        [video_TCHW[..., :3, :].flatten(2), video_TCHW[..., -3:, :].flatten(2),
         video_TCHW[..., :, :3].flatten(2), video_TCHW[..., :, -3:].flatten(2)], dim=2
    )  # fmt: skip
    backdrop = border.median(dim=2).values  # [T, 3]
    difference = (video_TCHW - backdrop[:, :, None, None]).square().sum(1).sqrt()  # [T, H, W]
    peak = difference.flatten(1).quantile(0.98, dim=1).clamp(min=_MIN_CONTRAST)
    mask = (difference > 0.5 * peak[:, None, None]).float()
    area = mask.sum((1, 2))
    found = area >= _MIN_AREA
    background = _background(backdrop.mean(0))
    if found.float().mean() < 0.75:
        return Reading(background, None, None, None)
    core = (difference > 0.75 * peak[:, None, None]).float()[found]
    color_TC = (video_TCHW[found] * core[:, None]).sum((2, 3)) / core.sum((1, 2)).clamp(min=1)[:, None]
    center = _centroids(mask[found])
    color = _color(color_TC.mean(0))
    return Reading(background, color, _shape(mask[found], center), _motion(center), _strength(color_TC.mean(0), color))


def _background(rgb: Tensor) -> str | None:
    if rgb.max() - rgb.min() > 0.2:
        return None
    return min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - float(rgb.mean())))


def _color(rgb: Tensor) -> str | None:
    """The palette colour of nearest hue: haze and paleness change a colour's strength, not its direction."""
    chroma = rgb - rgb.mean()
    if chroma.norm() < 0.08:
        return None

    def likeness(name: str) -> float:
        pure = torch.tensor(COLORS[name])
        return float(F.cosine_similarity(chroma, pure - pure.mean(), dim=0))

    best = max(COLORS, key=likeness)
    return best if likeness(best) > 0.85 else None


def _strength(rgb: Tensor, color: str | None) -> float:
    if color is None:
        return 0.0
    pure = torch.tensor(COLORS[color])
    return float((rgb - rgb.mean()).norm() / (pure - pure.mean()).norm())


def _centroids(mask_THW: Tensor) -> Tensor:
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    area = mask_THW.sum((1, 2))
    return torch.stack([(mask_THW.sum(1) * grid).sum(1), (mask_THW.sum(2) * grid).sum(1)], dim=1) / area[:, None]


def _shape(mask_THW: Tensor, center: Tensor) -> str | None:
    """The shape whose silhouette of the same area and place overlaps best, by the mean over the frames."""
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    overlap = {}
    for shape in SHAPES:
        unit, offset = _silhouette(shape)
        radius = (mask_THW.sum((1, 2)) / unit).sqrt()[:, None, None]
        middle = center - offset * radius[:, :, 0]
        template = shape_mask(
            shape,
            grid[None, None, :] - middle[:, 0, None, None],
            grid[None, :, None] - middle[:, 1, None, None],
            radius,
        )
        union = torch.maximum(template, mask_THW).sum((1, 2))
        overlap[shape] = float((torch.minimum(template, mask_THW).sum((1, 2)) / union).mean())
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] > 0.6 else None


def _silhouette(shape: str) -> tuple[float, Tensor]:
    """A shape's area and centroid at radius 1."""
    radius = torch.tensor(20.0)
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5 - SIZE / 2
    mask = shape_mask(shape, grid[None, :], grid[:, None], radius)
    centroid = torch.stack([(mask.sum(0) * grid).sum(), (mask.sum(1) * grid).sum()]) / mask.sum()
    return float(mask.sum() / radius**2), centroid / radius


def _motion(center_T2: Tensor) -> str | None:
    if len(center_T2) < 4:
        return None
    travel = center_T2[-2:].mean(0) - center_T2[:2].mean(0)
    if travel.abs().max() < _MIN_TRAVEL or travel.abs().min() > 0.6 * travel.abs().max():
        return None
    return max(MOTIONS, key=lambda name: float((travel * torch.tensor(MOTIONS[name])).sum()))
