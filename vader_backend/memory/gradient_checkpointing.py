"""Recompute a block's activations in the backward pass instead of keeping them.

Source: Chen et al. 2016; section 4 of the VADER paper, «standard tricks». diffusers'
UNet3DConditionModel has none of its own, so the blocks' forwards are wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..models.base import VideoModel


@contextmanager
def gradient_checkpointing(model: VideoModel) -> Iterator[None]:
    """Checkpoint every block of the denoiser; a forward without gradient is left as it is."""
    for block in model.blocks:
        block.forward = _checkpointed(block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapper
