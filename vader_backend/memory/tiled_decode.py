"""Decode the whole picture without graph, and take its gradient in overlapping tiles, each recomputed alone.

Pixels are those of the whole decode. The decoder's attention is differentiated as a whole, at the small size that it
works at; the gradient misses only what convolutions carry over a tile's border, where overlapping tiles are blended
linearly. A decoder that normalizes over the whole picture (GroupNorm) is left as it is: a tile would lack most of what
flows through the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped
from ._whole_picture import Call, Pass, passing, watched

OVERLAP = 0.25  # of a tile

Decode = Callable[[Tensor, Sequence[int]], Tensor]


@contextmanager
def tiled_decode(model: VideoModel, tile: int) -> Iterator[None]:
    """For the duration, gradients through pictures of more than `tile` latents on a side are taken in such tiles."""
    vae = model.parts()["vae"]
    if not may_be_tiled(vae):
        yield
        return
    with watched(vae) as mixing, wrapped(model, "decode", Depth.DIVIDE, partial(_tiled, tile, mixing)):
        yield


def may_be_tiled(vae: nn.Module) -> bool:
    """Whether no layer of an autoencoder normalizes over the whole picture."""
    return not any(isinstance(module, nn.GroupNorm) for module in vae.modules())


def _tiled(tile: int, mixing: bool, decode: Decode) -> Decode:
    @wraps(decode)
    def wrapper(z: Tensor, indices: Sequence[int]) -> Tensor:
        if max(z.shape[3:]) <= tile:
            return decode(z, indices)
        whole = Pass()
        with passing(whole):
            video = decode(z if mixing else z.detach(), indices).detach()
        inputs = {call: mixed for call, mixed in whole.mixed.items() if mixed.requires_grad}
        constants = {call: mixed for call, mixed in whole.mixed.items() if call not in inputs}
        run = partial(_gradients, decode, tuple(indices), tile, constants, tuple(inputs))
        found: Tensor = _InTiles.apply(run, video, z.detach() if inputs else z, *inputs.values())
        return found

    return wrapper


class _InTiles(torch.autograd.Function):
    """The decoded video, whose gradient `run` takes tile by tile."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., list[Tensor]], video: Tensor, z: Tensor, *mixed: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(z, *mixed)
        return video.view_as(video)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        z, *mixed = ctx.saved_tensors
        found = ctx.run(gradient, z, mixed)
        return None, None, *([None, *found] if mixed else found)


def _gradients(
    decode: Decode,
    indices: Sequence[int],
    tile: int,
    constants: Mapping[Call, Tensor],
    calls: Sequence[Call],
    gradient: Tensor,
    z: Tensor,
    mixed: Sequence[Tensor],
) -> list[Tensor]:
    """Of the attention's outputs, or of the latents where the decoder has none."""
    sources = list(mixed) or [z]
    totals = [torch.zeros_like(source) for source in sources]
    scale = gradient.shape[-1] // z.shape[-1]
    rows, columns = (_shares(length, tile, scale) for length in z.shape[3:])
    for row, height in rows.items():
        for column, width in columns.items():
            here = (..., slice(row, row + tile), slice(column, column + tile))
            pixels = (..., slice(scale * row, scale * (row + tile)), slice(scale * column, scale * (column + tile)))
            leaves = [source[here].detach().requires_grad_() for source in sources]
            lent = {call: found[here] for call, found in constants.items()} | dict(zip(calls, leaves, strict=False))
            share = (height[:, None] * width).to(gradient)
            with torch.enable_grad(), passing(Pass(lent)):
                part = decode(z[here] if mixed else leaves[0], indices)
                found = torch.autograd.grad(part, leaves, gradient[pixels] * share, allow_unused=True)
            for total, own in zip(totals, found, strict=True):
                if own is not None:
                    total[here] += own
    return totals


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover `length` and overlap by a quarter at least; the last one ends at the end."""
    if length <= tile:
        return [0]
    stride = max(1, tile - round(tile * OVERLAP))
    return [*range(0, length - tile, stride), length - tile]


def _shares(length: int, tile: int, scale: int) -> dict[int, Tensor]:
    """By start, each tile's share of its pixels along one side, falling where another goes on; they add up to 1."""
    found = {start: _ramp(start, length, tile, scale) for start in starts(length, tile)}
    total = torch.zeros(scale * length)
    for start, ramp in found.items():
        total[scale * start :][: len(ramp)] += ramp
    return {start: ramp / total[scale * start :][: len(ramp)] for start, ramp in found.items()}


def _ramp(start: int, length: int, tile: int, scale: int) -> Tensor:
    pixels = scale * min(tile, length)
    rise = (torch.arange(pixels) + 0.5) / max(1, scale * round(tile * OVERLAP))
    up = rise.clamp(max=1) if start > 0 else torch.ones(pixels)
    down = rise.flip(0).clamp(max=1) if start + tile < length else torch.ones(pixels)
    return torch.minimum(up, down)
