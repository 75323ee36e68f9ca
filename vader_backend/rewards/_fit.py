"""Ways to bring a picture into the square that a network takes; differentiable, pictures in [0, 1].

squash stands for torchvision's Resize to a square, as in the published VADER code; crop for the image
processors of transformers, and with `halve=round` for torchvision's CenterCrop; pad for the official scorer of
tgxs002/HPSv2, which scales tensors and leaves in what bicubic waves overshoot.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ._images import resize


def squash(images_NCHW: Tensor, size: int) -> Tensor:
    """Stretch to the square: bilinear, antialiased."""
    return resize(images_NCHW, size, size, mode="bilinear")


def crop(
    images_NCHW: Tensor,
    size: int,
    short: int = 0,
    mode: str = "bicubic",
    halve: Callable[[float], int] = math.floor,
) -> Tensor:
    """Bring the short side to `short`, by default `size`, then cut the centre of `size` out.

    Args:
        halve: what becomes of half a pixel where the edges to cut cannot be equal.
    """
    height, width = images_NCHW.shape[-2:]
    short, old = short or size, min(height, width)
    whole = scaled(images_NCHW, short * height // old, short * width // old, mode)
    top, left = (halve((side - size) / 2) for side in whole.shape[-2:])
    return whole[..., top : top + size, left : left + size]


def pad(images_NCHW: Tensor, size: int) -> Tensor:
    """Bring the long side to `size`, then lay the picture in the middle of black."""
    scale = size / max(images_NCHW.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in images_NCHW.shape[-2:])
    above, left = (size - height) // 2, (size - width) // 2
    edges = (left, size - width - left, above, size - height - above)
    return F.pad(resize(images_NCHW, height, width), edges)


def scaled(images_NCHW: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """As Pillow 13, antialiased: width and height one after the other, each brought back into [0, 1].

    The height comes first where it shrinks by more than twice what the width does.
    """
    old_height, old_width = images_NCHW.shape[-2:]
    height_first = old_height - height > max(0, 2 * (old_width - width))
    between = (height, old_width) if height_first else (old_height, width)
    return resize(resize(images_NCHW, *between, mode=mode).clamp(0, 1), height, width, mode=mode).clamp(0, 1)


FITS: dict[str, Callable[[Tensor, int], Tensor]] = {"squash": squash, "crop": crop, "pad": pad}
