"""Frozen weights of the denoiser's blocks wait in main memory; each block gets copies while it computes.

The copies are plain tensors that autograd may keep: with gradient checkpointing they live as long as one block's
backward pass. (diffusers' group offloading moves the weights themselves, which the backward pass would then find on
the wrong device.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped


@contextmanager
def block_swap(
    model: VideoModel, device: torch.device, host: torch.device | str = "cpu", *, resident_bytes: int = 0
) -> Iterator[None]:
    """For the duration, blocks beyond the first `resident_bytes` of weights are fetched when they run.

    Enter it while the denoiser lies on `host`; moving the denoiser to `device` then moves only what stays there.
    The next block's weights are fetched while one computes.

    Args:
        device: where blocks compute.
    """
    swapped, left = [], resident_bytes
    for block in model.blocks:
        weights = frozen_weights(block)
        left -= sum(tensor.nbytes for *_, tensor in weights)
        if left < 0 and weights:
            swapped.append((block, weights))
    fetcher = _Fetcher([weights for _, weights in swapped], device, torch.device(host))
    with ExitStack() as stack:
        stack.callback(fetcher.settle)
        for i, (block, weights) in enumerate(swapped):
            stack.enter_context(wrapped(block, "forward", Depth.FETCH, partial(_fetching, fetcher, i)))
            stack.callback(_put, weights)
            fetcher.park(i)
        yield


Weights = Sequence[tuple[nn.Module, str, Tensor]]


def frozen_weights(block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every weight of a block that is not trained: its module, its name there, and itself."""
    return [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]


def _put(weights: Weights) -> None:
    for module, name, tensor in weights:
        module._parameters[name] = tensor  # type: ignore[assignment]


def _fetching(fetcher: _Fetcher, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        fetcher.lend(i)
        try:
            return forward(*args, **kwargs)
        finally:
            fetcher.park(i)

    return wrapper


class _Fetcher:
    """Copies the weights of block after block, in the direction in which they were last asked for.

    Memory for copies is taken and given back in the order of the computing stream. Were it the copying stream's,
    which runs ahead, it could not be used again before the computation is done, and blocks would pile up.
    """

    def __init__(self, blocks: Sequence[Weights], device: torch.device, host: torch.device) -> None:
        self.blocks = blocks
        self.device = device
        for tensor in (tensor for weights in blocks for *_, tensor in weights):
            tensor.data = tensor.data.to(host)
            if device.type == "cuda" and host.type == "cpu":
                tensor.data = tensor.data.pin_memory()  # so that copies run beside the computation
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: dict[int, list[Tensor]] = {}
        self.last = -1

    def park(self, i: int) -> None:
        """Empty tensors in the place of the weights, on the device and of the weights' type."""
        for module, name, tensor in self.blocks[i]:
            module._parameters[name] = nn.Parameter(
                torch.empty(0, dtype=tensor.dtype, device=self.device), requires_grad=False
            )

    def lend(self, i: int) -> None:
        weights = self.ahead.pop(i, None) or self._fetch(i)
        self.settle()
        for (module, name, _), tensor in zip(self.blocks[i], weights, strict=True):
            module._parameters[name] = tensor  # type: ignore[assignment]
        following = i + 1 if i >= self.last else i - 1
        self.last = i
        if self.stream is not None and 0 <= following < len(self.blocks):
            self.ahead = {following: self._fetch(following)}

    def settle(self) -> None:
        """The computation waits for the copies under way; those that nobody asked for go."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.ahead.clear()

    def _fetch(self, i: int) -> list[Tensor]:
        homes = [home.detach() for *_, home in self.blocks[i]]
        if self.stream is None:
            return [home.to(self.device) for home in homes]
        copies = [torch.empty_like(home, device=self.device) for home in homes]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # whose memory the copies may be
        with torch.cuda.stream(self.stream):
            return [copy.copy_(home, non_blocking=True) for copy, home in zip(copies, homes, strict=True)]
