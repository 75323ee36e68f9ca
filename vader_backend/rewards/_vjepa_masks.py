"""Which places of a video V-JEPA hides: blocks of the frame, through all of its length.

Source: the masks of the published configurations of facebookresearch/jepa (multi-block, 3D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import InputError
from ._vjepa import Grid

_TRIES = 100


@dataclass(frozen=True)
class Blocks:
    """count: blocks of one mask; scale: share of the frame that each covers; aspect: bounds of height / width."""

    count: int
    scale: float
    aspect: tuple[float, float]


@dataclass(frozen=True)
class Mask:
    """Places of the tokens that are seen [K] and hidden [M]; kind: number of the setting they were drawn with."""

    seen_K: Tensor
    hidden_M: Tensor
    kind: int = 0


def draw(blocks: Blocks, grid: Grid, kind: int, rng: torch.Generator) -> Mask:
    """A mask of blocks of one size at random places, which may overlap.

    Raises:
        InputError: such blocks hide the whole frame.
    """
    height, width = _size(blocks, grid, rng)
    for _ in range(_TRIES):
        hidden = torch.zeros(grid.height, grid.width, dtype=torch.bool)
        for _ in range(blocks.count):
            top, left = (_below(room, rng) for room in (grid.height - height + 1, grid.width - width + 1))
            hidden[top : top + height, left : left + width] = True
        if not hidden.all():
            through = hidden.flatten().repeat(grid.time)
            return Mask((~through).nonzero().squeeze(1), through.nonzero().squeeze(1), kind)
    raise InputError(
        f"{blocks.count} blocks that each cover {blocks.scale:g} of the frame leave nothing of it to predict from; "
        "set fewer or smaller ones."
    )


def _size(blocks: Blocks, grid: Grid, rng: torch.Generator) -> tuple[int, int]:
    low, high = blocks.aspect
    aspect = low + (high - low) * float(torch.rand((), generator=rng))
    area = int(grid.height * grid.width * blocks.scale)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return max(1, min(height, grid.height)), max(1, min(width, grid.width))


def _below(bound: int, rng: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=rng))
