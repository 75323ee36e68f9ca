"""Recompute each differentiated denoising step alone, when the backward pass comes to it.

Only the latents between steps are kept, so that K steps need the memory of one; the network runs once more per
step. The gradient is that of plain autograd, with the denoiser's input attached, or detached (stop_input; DRTune,
Wu et al. 2024), where the gradient at the clean latent is all that a step needs.

A function of its own rather than torch.utils.checkpoint: nested checkpoints would keep the blocks' inputs out of
the reach of `graph_offload`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped

Predict = Callable[[Tensor, float, dict[str, Tensor]], Tensor]


@contextmanager
def stepwise(model: VideoModel) -> Iterator[None]:
    """For the duration, a differentiated prediction keeps its input only."""
    with wrapped(model, "predict", Depth.RECOMPUTE, partial(_stepwise, model.denoiser)):
        yield


def _stepwise(denoiser: nn.Module, predict: Predict) -> Predict:
    @wraps(predict)
    def wrapper(z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return predict(z, t, cond)
        trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        return _Step.apply(lambda z: predict(z, t, cond), z, *trained)

    return wrapper


class _Step(torch.autograd.Function):
    """predict(z), as a function of z and of the trained parameters."""

    @staticmethod
    def forward(ctx: Any, predict: Callable[[Tensor], Tensor], z: Tensor, *trained: nn.Parameter) -> Tensor:
        ctx.predict, ctx.trained = predict, trained
        ctx.random = _random_state(z.device)
        ctx.save_for_backward(z)
        # With gradient on, since a LoRA's dropout is live only then; nothing is kept.
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            return predict(z.detach()).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        z = saved.detach().requires_grad_(ctx.needs_input_grad[1])
        inputs = [z, *ctx.trained] if z.requires_grad else [*ctx.trained]
        cuda = [z.device] if z.is_cuda else []
        with torch.enable_grad(), torch.random.fork_rng(devices=cuda):
            _set_random_state(ctx.random, z.device)
            found = torch.autograd.grad(ctx.predict(z), inputs, grads, allow_unused=True)
        return (None, *found) if z.requires_grad else (None, None, *found)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
