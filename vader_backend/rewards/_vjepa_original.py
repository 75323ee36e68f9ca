"""Reads V-JEPA's original checkpoints, such as vitl16.pth.tar; all sizes come from the tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..loading import build_frozen
from ._vjepa import Encoder, Grid, Predictor, Vjepa

_PREDICTOR, _PREDICTOR_DEPTH, _MASK_TOKENS = 384, 12, 2
PARTS = ("encoder", "predictor", "target_encoder")


@dataclass(frozen=True)
class Size:
    """Of a published network: width and depth of the encoders, pixels of a side of the video."""

    width: int
    depth: int
    pixels: int = 224


VIT_L16 = Size(1024, 24)
VIT_SIZES = {"vith16-384": Size(1280, 32, 384), "vith16": Size(1280, 32), "vitl16": VIT_L16}  # by name


def new_vjepa(size: Size) -> Vjepa:
    """The networks of a published size, with fresh weights."""
    side, heads = size.pixels // 16, published_heads(size.width)
    grid = Grid(8, side, side)

    def encoder() -> Encoder:
        return Encoder(size.width, size.depth, heads, 4 * size.width, grid, (2, 16, 16))

    predictor = Predictor(size.width, _PREDICTOR, _PREDICTOR_DEPTH, heads, 4 * _PREDICTOR, grid, _MASK_TOKENS)
    return Vjepa(encoder(), predictor, encoder())


def build_vjepa(
    tensors: Mapping[str, Tensor], source: Path, dtype: torch.dtype = torch.float32, *, heads: int | None = None
) -> Vjepa:
    """The networks of a checkpoint.

    Args:
        tensors: under part/key, where part is one of PARTS and each key may begin with module.backbone.
        heads: of the attention; None: as many as the published networks of this width have.

    Raises:
        InputError: a tensor is missing, left over or of another shape.
    """
    own = {_key(key): tensor for key, tensor in tensors.items() if key.partition("/")[0] in PARTS}

    def make() -> Vjepa:
        used = heads or published_heads(own["encoder.pos_embed"].shape[-1])
        encoder, target_encoder = (_encoder(own, part, used) for part in ("encoder", "target_encoder"))
        return Vjepa(encoder, _predictor(own, used, encoder.grid), target_encoder)

    return build_frozen(make, own, dtype, "V-JEPA checkpoint", source)


def _key(key: str) -> str:
    return re.sub(r"^(\w+)/(module\.)?(backbone\.)?", r"\1.", key)


def _encoder(tensors: Mapping[str, Tensor], part: str, heads: int) -> Encoder:
    width, _, tubelet, height, across = tensors[f"{part}.patch_embed.proj.weight"].shape
    inner = len(tensors[f"{part}.blocks.0.mlp.fc1.weight"])
    depth, grid = _depth(tensors, f"{part}.blocks"), _grid(tensors[f"{part}.pos_embed"])
    return Encoder(width, depth, heads, inner, grid, (tubelet, height, across))


def _predictor(tensors: Mapping[str, Tensor], heads: int, grid: Grid) -> Predictor:
    narrow, width = tensors["predictor.predictor_embed.weight"].shape
    inner = len(tensors["predictor.predictor_blocks.0.mlp.fc1.weight"])
    depth, masks = (_depth(tensors, f"predictor.{name}") for name in ("predictor_blocks", "mask_tokens"))
    return Predictor(width, narrow, depth, heads, inner, grid, masks)


def published_heads(width: int) -> int:
    """The original's networks have heads 64 wide, but never more than 16 of them; the predictor has as many."""
    return max(1, min(16, width // 64))


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)", key) for key in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _grid(table_1ND: Tensor) -> Grid:
    """The grid that a table of positions was made for: its first feature, the sine of the time, is 0 at time 0 only."""
    first = table_1ND[0, :, 0]
    frame = int((first == first[0]).sum())
    side = math.isqrt(frame)
    if side * side != frame or len(first) % frame:
        raise ValueError("its table of positions is not that of square frames")
    return Grid(len(first) // frame, side, side)
