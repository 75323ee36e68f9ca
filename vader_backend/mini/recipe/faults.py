"""Videos with faults in their looks and in their motion, each by an amount that is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..world import SIZE
from .videos import blur, flicker, freeze, jump, noise, soften

FAULTS = ("haze", "noise", "blur", "jump", "freeze", "flicker")
_LOOKS = 3  # of these; the others are of motion
_FULL = 0.3  # of a hazy video is gray, see `render`
_BROKEN = 0.15  # of the videos leap about, as many do not move; all that are left flicker or have no such fault
_SOUND = 0.5
_WAY = 8.0  # pixels


@dataclass(frozen=True)
class Faulty:
    """B videos [B, T, 3, 64, 64].

    steady: the same before anything was done to their looks.
    faults: from 0 to 1 how much of each there is, [B, 6] in the order of FAULTS.
    """

    video: Tensor
    steady: Tensor
    faults: Tensor

    @property
    def looks(self) -> Tensor:
        """[B], 0 for the best."""
        return -self.faults[:, :_LOOKS].sum(1)

    @property
    def motion(self) -> Tensor:
        """[B], 0 for the best."""
        return -self.faults[:, _LOOKS:].sum(1)

    @property
    def moving(self) -> list[bool]:
        """Whether each moves as its caption says: it neither leaps nor stands still."""
        return [not any(broken) for broken in self.faults[:, _LOOKS : _LOOKS + 2].tolist()]


def disturbed(clean_BTCHW: Tensor, rng: torch.Generator) -> Faulty:
    """Each video hazy, some noisy or blurred, and half of them without good motion."""
    kind, haze, grain, smear, unsteady = torch.rand(5, len(clean_BTCHW), generator=rng)
    grain, smear = ((2 * part - 1).clamp(min=0) for part in (grain, smear))
    leaping, frozen = ((kind > low) & (kind <= low + _BROKEN) for low in (_SOUND, _SOUND + _BROKEN))
    unsteady = torch.where(kind > _SOUND + 2 * _BROKEN, 0.3 + 0.7 * unsteady, 0)
    steady = clean_BTCHW
    for change, chosen in ((jump, leaping), (freeze, frozen)):
        steady = torch.where(_wide(chosen), change(steady, rng), steady)
    video = soften(steady, rng)
    video = video.lerp(torch.full_like(video, 0.5), _FULL * _wide(haze))
    for change, amount in ((blur, smear), (flicker, unsteady), (noise, grain)):
        video = video.lerp(change(video, rng), _wide(amount))
    faults = torch.stack([haze, grain, smear, leaping.float(), frozen.float(), unsteady], dim=1)
    return Faulty(video, steady, faults)


def _wide(each_B: Tensor) -> Tensor:
    """To stand beside videos [B, T, C, H, W]."""
    return each_B[:, None, None, None, None]


def movement(video_BTCHW: Tensor, cell: tuple[int, int, int]) -> Tensor:
    """What each part of a video shows of the shape, [B, t * h * w, frames + 2].

    Its share of the shape in each of the cell's frames, and the mean share times the shape's way between the first
    two of them, in x and y. The shape is what differs from the upper left corner, where it never is.

    Args:
        cell: how many frames, rows and columns a part has.
    """
    backdrop = video_BTCHW[..., :4, :4].mean((-2, -1), keepdim=True)
    shown = (video_BTCHW - backdrop).abs().mean(2)
    places = torch.arange(SIZE) / _WAY
    centre = torch.stack([(shown.sum(axis) * places).sum(-1) for axis in (2, 3)], dim=-1) / shown.sum((2, 3))[..., None]
    way = centre.unflatten(1, (-1, cell[0]))  # [B, t, frames, 2]
    share = F.avg_pool2d(shown, cell[1:])
    share = (share / share.amax((2, 3), keepdim=True)).flatten(2).unflatten(1, (-1, cell[0]))  # [B, t, frames, h * w]
    moved = share.mean(2)[..., None] * (way[:, :, 1] - way[:, :, 0])[:, :, None]
    return torch.cat([share.mT, moved], dim=-1).flatten(1, 2)
