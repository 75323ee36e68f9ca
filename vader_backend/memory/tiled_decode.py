"""Decode a picture in overlapping tiles, each recomputed alone in the backward pass.

The decoder's normalization and attention see one tile instead of the whole picture, so the values are near those of
the whole decode, not equal to them; where tiles overlap they are blended linearly. diffusers tiles some
autoencoders in the same manner, without gradient in mind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from ..models.base import VideoModel
from ._wrapping import Depth, wrapped
from .gradient_checkpointing import recomputed

OVERLAP = 0.25  # of a tile

Decode = Callable[[Tensor, Sequence[int]], Tensor]


@contextmanager
def tiled_decode(model: VideoModel, tile: int) -> Iterator[None]:
    """For the duration, latents larger than `tile` on a side are decoded in tiles of that many latents."""
    with wrapped(model, "decode", Depth.DIVIDE, partial(_tiled, tile)):
        yield


def _tiled(tile: int, decode: Decode) -> Decode:
    @wraps(decode)
    def wrapper(z: Tensor, indices: Sequence[int]) -> Tensor:
        rows, columns = (starts(length, tile) for length in z.shape[3:])
        if len(rows) == len(columns) == 1:
            return decode(z, indices)
        total: Any = 0.0
        weight: Any = 0.0
        for row in rows:
            for column in columns:
                part = recomputed(decode)(z[:, :, :, row : row + tile, column : column + tile], indices)
                scale = part.shape[3] // min(tile, z.shape[3])
                ramp = _ramp(row, z.shape[3], tile, scale)[:, None] * _ramp(column, z.shape[4], tile, scale)
                ramp = torch.ones_like(part[0, 0, 0]) * ramp.to(part.device)
                around = (column, max(z.shape[4] - column - tile, 0), row, max(z.shape[3] - row - tile, 0))
                padding = [scale * n for n in around]
                total = total + torch.nn.functional.pad(part * ramp, padding)
                weight = weight + torch.nn.functional.pad(ramp, padding)
        return total / weight

    return wrapper


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover `length` and overlap by a quarter at least; the last one ends at the end."""
    if length <= tile:
        return [0]
    stride = max(1, tile - round(tile * OVERLAP))
    return [*range(0, length - tile, stride), length - tile]


def _ramp(start: int, length: int, tile: int, scale: int) -> Tensor:
    """Weights of a tile's pixels along one side: 1 inside, falling where another tile goes on."""
    pixels = scale * min(tile, length)
    width = max(1, scale * round(tile * OVERLAP))
    rise = (torch.arange(pixels) + 0.5) / width
    up = rise.clamp(max=1) if start > 0 else torch.ones(pixels)
    down = rise.flip(0).clamp(max=1) if start + tile < length else torch.ones(pixels)
    return torch.minimum(up, down)
