"""Frozen weights of the denoiser's blocks in 8 or 4 bits, unpacked for as long as their block computes.

This changes the arithmetic: results are those of a model whose weights were rounded once. Sources: FP8 formats
(Micikevicius et al. 2022) with a scale per output channel; NF4 (QLoRA, Dettmers et al. 2023, appendix E) in blocks
of 64 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped
from .block_swap import frozen_weights

_GROUP = 64  # weights that share a scale in NF4


class Packed(Protocol):
    """A weight in few bits: `data` is what takes the room, `scale` what multiplies it."""

    @property
    def data(self) -> Tensor: ...

    @property
    def scale(self) -> Tensor: ...

    def unpack(self, data: Tensor, scale: Tensor) -> Tensor:
        """The weight, from data and scale that may have moved to another device."""
        ...


@contextmanager
def low_bit(model: VideoModel, storage: str) -> Iterator[None]:
    """For the duration, matrices and kernels of the blocks are held as `storage`, a key of STORAGES.

    Enter it before `block_swap` and while the denoiser lies in main memory, where the exact weights wait meanwhile.
    """
    with ExitStack() as stack:
        for block in model.blocks:
            packs: dict[tuple[nn.Module, str], Packed] = {}
            stack.enter_context(wrapped(block, "forward", Depth.UNPACK, partial(_unpacking, packs)))
            for module, name, tensor in frozen_weights(block):
                if tensor.ndim > 1:
                    pack = packs[module, name] = STORAGES[storage](tensor)
                    stack.callback(_restore, module, name, tensor)
                    module._parameters[name] = nn.Parameter(pack.data, requires_grad=False)
                    module._buffers[f"{name}_scale"] = pack.scale
        yield


def _restore(module: nn.Module, name: str, tensor: Tensor) -> None:
    module._parameters[name] = tensor  # type: ignore[assignment]
    del module._buffers[f"{name}_scale"]


def _unpacking(packs: Mapping[tuple[nn.Module, str], Packed], forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        held = {key: key[0]._parameters[key[1]] for key in packs}
        for (module, name), pack in packs.items():
            scale: Any = module._buffers[f"{name}_scale"]
            module._parameters[name] = pack.unpack(held[module, name], scale)  # type: ignore[arg-type, assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            for (module, name), data in held.items():
                module._parameters[name] = data

    return wrapper


@dataclass(frozen=True)
class Float8:
    """E4M3 with a scale per output channel."""

    data: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> Float8:
        scale = weight.detach().float().flatten(1).abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
        least = torch.finfo(weight.dtype).tiny  # smaller scales lose bits in float16
        scale = scale.clamp(min=least).to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
        rounded = (weight.detach().float() / scale).to(torch.float8_e4m3fn)
        return cls(rounded.view(torch.uint8), scale, weight.dtype)  # bytes, which nobody takes for the type of a layer

    def unpack(self, data: Tensor, scale: Tensor) -> Tensor:
        return data.view(torch.float8_e4m3fn).to(self.dtype) * scale


@dataclass(frozen=True)
class NF4:
    """Two weights a byte: each the nearest of 16 quantiles of a normal distribution, times its group's largest."""

    data: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> NF4:
        flat = weight.detach().float().flatten()
        groups = F.pad(flat, (0, -len(flat) % _GROUP)).view(-1, _GROUP)
        scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12)
        middles = (quantiles()[1:] + quantiles()[:-1]) / 2
        index = torch.bucketize(groups / scale, middles.to(flat.device)).to(torch.uint8).view(-1, 2)
        data = (index[:, 0] * 16 + index[:, 1]).view(-1, *[1] * (weight.ndim - 1))  # a kernel keeps its dimensions
        return cls(data, scale.squeeze(1), weight.shape, weight.dtype)

    def unpack(self, data: Tensor, scale: Tensor) -> Tensor:
        levels = F.embedding(data.flatten().int(), _pairs(data.device, self.dtype))
        groups = levels.view(-1, _GROUP) * scale.to(self.dtype)[:, None]
        return groups.flatten()[: self.shape.numel()].view(self.shape)


STORAGES: Mapping[str, Callable[[Tensor], Packed]] = {"float8": Float8.of, "nf4": NF4.of}


@cache
def quantiles() -> Tensor:
    """The 16 levels of NF4, from -1 to 1: 0, seven on one side of it and eight on the other."""
    reach = torch.tensor(0.9677083, dtype=torch.float64)  # so that the outermost quantile is finite
    above = torch.special.ndtri(torch.linspace(float(reach), 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(float(reach), 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    return (levels / levels.abs().max()).float()


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the levels that a byte stands for; kept, for a copy to the device holds up the program."""
    return torch.cartesian_prod(quantiles(), quantiles()).to(device, dtype)
