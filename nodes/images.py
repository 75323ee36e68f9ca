"""ComfyUI's IMAGE batches as the library's videos, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..vader_backend.config import InputError


def to_images(video_BTCHW: Tensor) -> Tensor:
    """[B, T, 3, H, W] to [B*T, H, W, 3], video after video."""
    return video_BTCHW.flatten(0, 1).permute(0, 2, 3, 1).contiguous()


def to_videos(images: Tensor, count: int, what: str = "images") -> Tensor:
    """[B*T, H, W, 3] to [B, T, 3, H, W] with B = count; a copy, usable outside inference mode.

    Raises:
        InputError: the images cannot be divided into that many videos.
    """
    if not count or len(images) % count:
        raise InputError(
            f"{what} has {len(images)} images, which do not divide into {count} videos of equal length; "
            "connect the prompts that the same sampling node gave out."
        )
    return images[..., :3].float().clone().permute(0, 3, 1, 2).unflatten(0, (count, -1))


def rows(total: int, limit: int) -> list[int]:
    """At most `limit` indices (0 = all), evenly spread over `total`."""
    count = min(limit, total) if limit else total
    return [i * total // count for i in range(count)]


def tiled(video_BTCHW: Tensor) -> Tensor:
    """All videos as one, [T, 3, H', W'], in a grid that is about square."""
    count, frames, channels, height, width = video_BTCHW.shape
    columns = max(1, round(count**0.5 + 0.49))
    lines = -(-count // columns)
    blank = torch.zeros(lines * columns - count, frames, channels, height, width)
    grid = torch.cat([video_BTCHW.cpu(), blank]).unflatten(0, (lines, columns))
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(frames, channels, lines * height, columns * width)
