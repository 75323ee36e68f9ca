"""The denoiser compiled by torch.compile wherever no gradient is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from .config import InputError
from .models.base import VideoModel
from .wrapping import Depth, wrapped


@contextmanager
def compiled_rollout(model: VideoModel, backend: str = "inductor") -> Iterator[None]:
    """For the duration, steps without gradient run a compiled denoiser, the others the denoiser as it is.

    Compiled kernels round in their own way. Each shape is compiled at its first use.

    Raises:
        InputError: at the first use: this machine cannot compile.
    """
    with wrapped(model.denoiser, "forward", Depth.COMPILE, partial(_compiled, backend)):
        yield


def _compiled(backend: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(forward, backend=backend, dynamic=False)

    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        try:
            return fast(*args, **kwargs)
        except TorchDynamoException as error:
            told = " ".join(str(error).split("\n")[:2])
            raise InputError(f"The denoiser cannot be compiled here ({told}); turn compile_rollout off.") from error

    return wrapper
