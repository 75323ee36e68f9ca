"""Layers of the decoder work on slices of their input: spatial ones on single frames, temporal ones on some rows.

The gradient is that of the whole decode. Spatial layers do not mix frames, and the temporal blocks' convolutions do
not mix pixels; their normalizations do, whose statistics are taken first, and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, TemporalResnetBlock
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped

ROWS = 32  # of a slice

Forward = Callable[..., Tensor]
Statistics = tuple[Tensor, Tensor]  # mean and reciprocal standard deviation, [B, groups] each


@contextmanager
def sliced_decode(model: VideoModel) -> Iterator[None]:
    """For the duration, the decoder's layers work on slices; gradient checkpointing then recomputes each alone."""
    with ExitStack() as stack:
        for layer in model.parts()["vae"].modules():
            if isinstance(layer, ResnetBlock2D | Upsample2D | Attention):
                stack.enter_context(wrapped(layer, "forward", Depth.SLICE, _frame_by_frame))
            elif isinstance(layer, TemporalResnetBlock) and not layer.use_in_shortcut:
                stack.enter_context(wrapped(layer, "forward", Depth.SLICE, partial(_rows_at_a_time, layer)))
            elif isinstance(layer, AlphaBlender):
                stack.enter_context(wrapped(layer, "forward", Depth.SLICE, partial(_blended, layer)))
        yield


def _frame_by_frame(forward: Forward) -> Forward:
    @wraps(forward)
    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) == 1 or any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return forward(x, *args, **kwargs)
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.cat([forward(frame, *args, **kwargs) for frame in x.split(1)])
        first = forward(x[:1], *args, **kwargs)
        found = first.new_empty(len(x), *first.shape[1:])
        found[:1] = first
        for i in range(1, len(x)):
            found[i : i + 1] = forward(x[i : i + 1], *args, **kwargs)
        return found

    return wrapper


def _rows_at_a_time(block: TemporalResnetBlock, forward: Forward) -> Forward:
    @wraps(forward)
    def wrapper(x: Tensor, temb: Tensor | None = None) -> Tensor:
        if temb is not None:
            return forward(x, temb)
        found: Tensor = _Temporal.apply(block, x)
        return found

    return wrapper


def _blended(mixer: AlphaBlender, forward: Forward) -> Forward:
    @wraps(forward)
    def wrapper(x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:
        alpha = mixer.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
        return x_temporal.lerp_(x_spatial, 1 - alpha if mixer.switch_spatial_to_temporal_mix else alpha)

    return wrapper


class _Temporal(torch.autograd.Function):
    """A temporal block, which keeps its input only."""

    @staticmethod
    def forward(ctx: Any, block: Any, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        half = torch.empty_like(x)
        _run(block, block.norm1, block.conv1, x, half)
        _run(block, block.norm2, block.conv2, half, half)
        return half.add_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        block = ctx.block
        (x,) = ctx.saved_tensors
        half = torch.empty_like(x)
        first = _run(block, block.norm1, block.conv1, x, half)
        by_half = _differentiated(block, block.norm2, block.conv2, half, _statistics(block.norm2, half), gradient)
        del half
        return None, _differentiated(block, block.norm1, block.conv1, x, first, by_half).add_(gradient)


def _run(block: Any, norm: nn.GroupNorm, conv: nn.Module, x: Tensor, found: Tensor) -> Statistics:
    """conv(nonlinearity(norm(x))) into `found`, which may be x."""
    statistics = _statistics(norm, x)
    for rows in _slices(x):
        found[rows] = conv(block.nonlinearity(_normalized(norm, x[rows], *statistics)))
    return statistics


def _differentiated(
    block: Any, norm: nn.GroupNorm, conv: nn.Module, x: Tensor, statistics: Statistics, gradient: Tensor
) -> Tensor:
    """The gradient at x of what `_run` does, from that at its output."""
    found = torch.empty_like(x)
    mean, scale = (value.detach().requires_grad_() for value in statistics)
    by_mean, by_scale = torch.zeros_like(mean), torch.zeros_like(scale)
    for rows in _slices(x):
        part = x[rows].detach().requires_grad_()
        with torch.enable_grad():
            out = conv(block.nonlinearity(_normalized(norm, part, mean, scale)))
        found[rows], own_mean, own_scale = torch.autograd.grad(out, (part, mean, scale), gradient[rows])
        by_mean += own_mean
        by_scale += own_scale
    # A mean moves by 1/n with each value, a reciprocal deviation s by -s^3 (x - mean) / n.
    count = x[0].numel() // norm.num_groups
    slope, level = -by_scale * statistics[1] ** 3 / count, by_mean / count
    for rows in _slices(x):
        grouped = x[rows].unflatten(1, (norm.num_groups, -1))
        own = _along(slope, grouped) * (grouped - _along(statistics[0], grouped)) + _along(level, grouped)
        found[rows] += own.flatten(1, 2).to(found.dtype)
    return found


def _statistics(norm: nn.GroupNorm, x: Tensor) -> Statistics:
    count = x[0].numel() // norm.num_groups

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        parts = (of(x[rows].to(_wide(x)).unflatten(1, (norm.num_groups, -1)).flatten(2)) for rows in _slices(x))
        return torch.stack([part.sum(-1) for part in parts]).sum(0) / count

    middle = mean(lambda part: part)
    return middle, (mean(lambda part: (part - middle[..., None]).square()) + norm.eps).rsqrt()


def _wide(x: Tensor) -> torch.dtype:
    """float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _normalized(norm: nn.GroupNorm, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    grouped = x.to(_wide(x)).unflatten(1, (norm.num_groups, -1))
    found = ((grouped - _along(mean, grouped)) * _along(scale, grouped)).flatten(1, 2)
    weight, bias = (value.view(-1, *[1] * (x.ndim - 2)) for value in (norm.weight, norm.bias))
    return (found * weight + bias).to(x.dtype)


def _along(value_BG: Tensor, grouped: Tensor) -> Tensor:
    return value_BG.view(*value_BG.shape, *[1] * (grouped.ndim - 2))


def _slices(x_BCTHW: Tensor) -> list[tuple[Any, ...]]:
    return [(..., slice(start, start + ROWS), slice(None)) for start in range(0, x_BCTHW.shape[3], ROWS)]
