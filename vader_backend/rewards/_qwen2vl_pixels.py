"""Videos as Qwen2-VL takes them: their size, and their patches; differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import InputError
from ._images import CLIP_NORM, normalise

_LONGEST = 200  # times the short side


def fitted(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """The size nearest to a video's own that is whole in `factor` and holds `low` to `high` pixels, if it can.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    if max(height, width) > _LONGEST * min(height, width):
        raise InputError(f"The video is {width} x {height} pixels; give one whose sides differ by a factor below 200.")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > high:
        shrink = math.sqrt(height * width / high)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < low:
        grow = math.sqrt(low / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patches(video_BTCHW: Tensor, patch: int, merge: int, frames: int) -> tuple[Tensor, Tensor]:
    """Patches of normalised pixels, in blocks of merge * merge neighbours; an odd last frame counts twice.

    Args:
        video_BTCHW: in [0, 1]; its sides are whole in patch * merge.
        frames: that one patch spans.

    Returns:
        [B * t * h * w, C * frames * patch * patch], and [B, 3] with t, h and w.
    """
    missing = -video_BTCHW.shape[1] % frames
    video = torch.cat([video_BTCHW, video_BTCHW[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    video = normalise(video, CLIP_NORM)
    count, total, _, height, width = video.shape
    grid = torch.tensor([total // frames, height // patch, width // patch], device=video.device)
    cut = video.unflatten(4, (-1, merge, patch)).unflatten(3, (-1, merge, patch)).unflatten(1, (-1, frames))
    # now [B, t, frames, C, h/merge, merge, patch, w/merge, merge, patch]
    return cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(0, 5).flatten(1), grid.expand(count, 3)
