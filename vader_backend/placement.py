"""Which networks lie on the device: encoders only while they encode, all that a run needs for its whole length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models.base import VideoModel
from .types import Conditioning, VideoSpec

PROMPTS_AT_A_TIME = 8


@dataclass(frozen=True)
class Place:
    """Where work is done: the device, and what brings networks there for a while."""

    device: torch.device
    workspace: Callable[[Sequence[nn.Module]], AbstractContextManager[Any]] = nullcontext


def residents(model: VideoModel) -> list[nn.Module]:
    """The networks that a run keeps on the device: the denoiser and the autoencoder.

    Training decodes in every step, and the backward pass needs the autoencoder where the decoding
    found it; sampling decodes for its previews. It is small beside the denoiser, so it stays.
    """
    parts = model.parts()
    return [parts["denoiser"], parts["vae"]]


def encode(
    model: VideoModel,
    prompts: Sequence[str],
    video: VideoSpec,
    *,
    negative: str = "",
    images: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> Conditioning:
    """What `model.encode` gives, on the CPU, with the encoders on the model's device for this call only.

    The denoiser waits on the CPU meanwhile, so that a large text encoder needs no room beside it.
    Many prompts are encoded in groups; with images, which some families expand to whole videos, one by one.

    Args:
        images: [B, 3, H, W] in [0, 1], one per prompt.

    Raises:
        InputError: the model cannot take the prompts or images; every network is back in its place then.
    """
    device = model.device
    encoders = [network for name, network in model.parts().items() if name not in ("denoiser", "vae")]
    if images is not None:
        encoders.append(model.parts()["vae"])
    size = 1 if images is not None and len(images) == len(prompts) else PROMPTS_AT_A_TIME
    groups = [slice(start, start + size) for start in range(0, max(len(prompts), 1), size)]
    with lent([model.denoiser], "cpu"), lent(encoders, device):
        parts = [
            model.encode(
                prompts[group], video, negative=negative, images=None if images is None else images[group], rng=rng
            ).to("cpu")
            for group in groups
        ]
    return _joined(parts)


@contextmanager
def lent(networks: Sequence[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Networks on another device, and each back where it was at the end."""
    homes = [next(network.parameters()).device for network in networks]
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network, home in reversed(list(zip(networks, homes, strict=True))):
            network.to(home)


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    if len(parts) == 1:
        return parts[0]
    return Conditioning(
        {name: torch.cat([part.positive[name] for part in parts]) for name in parts[0].positive},
        {name: torch.cat([part.negative[name] for part in parts]) for name in parts[0].negative},
    )
