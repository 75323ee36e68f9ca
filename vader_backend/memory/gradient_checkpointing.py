"""Recompute a block's activations in the backward pass instead of keeping them.

Sources: Chen et al. 2016; section 4 of the VADER paper, «standard tricks». Not every diffusers network has
checkpointing of its own, and none as fine as here, so the blocks' forwards are wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped


@contextmanager
def gradient_checkpointing(model: VideoModel) -> Iterator[None]:
    """Checkpoint every block of the denoiser and of the decoder: only their inputs are kept."""
    with ExitStack() as stack:
        for block in (*model.blocks, *model.decoder_blocks):
            stack.enter_context(wrapped(block, "forward", Depth.RECOMPUTE, recomputed))
        yield


def recomputed(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, which keeps its inputs only; without gradient it is left as it is."""

    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        return checkpoint(method, *args, use_reentrant=False, **kwargs)

    return wrapper
