"""The autoencoder and the rewards wait in main memory while videos are denoised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped


@contextmanager
def idle_offload(
    model: VideoModel,
    rewards: Sequence[nn.Module],
    device: torch.device,
    host: torch.device | str = "cpu",
) -> Iterator[None]:
    """For the duration, a prediction sends them to `host`, and a decode brings them to `device`.

    The rewards come after the decode and before they are asked, and leave when the video has its gradient; a step that
    is recomputed in the backward pass runs when the decoder has had its own, which leaves then, too. At the end each
    lies where it lay.
    """
    vae = model.parts()["vae"]
    homes = [next(network.parameters()).device for network in (vae, *rewards)]

    def predicting(predict: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(predict)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _move([vae, *rewards], host)
            return predict(*args, **kwargs)

        return wrapper

    def decoding(decode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(decode)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _move([vae], device)
            video = decode(*args, **kwargs)
            _move(rewards, device)
            if video.requires_grad:
                video.register_hook(lambda gradient: _move(rewards, host))
            return video

        return wrapper

    with ExitStack() as stack:
        stack.enter_context(wrapped(model, "predict", Depth.PLACE, predicting))
        stack.enter_context(wrapped(model, "decode", Depth.PLACE, decoding))
        for network, home in reversed(list(zip((vae, *rewards), homes, strict=True))):
            stack.callback(_move, [network], home)
        yield


def _move(networks: Sequence[nn.Module], device: torch.device | str) -> None:
    for network in networks:
        network.to(device)
