"""A tiny checkpoint of every family, text- and image-to-video, as a user would have it on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import tiny_ltx
import tiny_opensora
import tiny_svd
import tiny_videocrafter2
import tiny_wan
import torch
from torch import Tensor
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.models._wan_vae import statistics
from vader_nodes.vader_backend.models.base import VideoModel
from vader_nodes.vader_backend.types import VideoSpec

Decode = Callable[[Any, Tensor, int], Tensor]


def set_to(**settings: int) -> Decode:
    """Our own decode with other settings: none for autoencoders of single images, else those for no chunks."""

    def decode(model: Any, z: Tensor, frames: int) -> Tensor:
        whole = copy.copy(model)
        vars(whole).update(settings)
        return whole.decode(z, range(frames))

    return decode


def opensora_whole(model: Any, z: Tensor, frames: int) -> Tensor:
    """All windows in one causal pass; the 3 of 20 frames that stand for each window's padding are left out."""
    time = model.vae.temporal_vae
    images = time.decoder(time.post_quant_conv(z * model.vae.scale + model.vae.shift))
    kept = [i for i in range(images.shape[2]) if i % 20 >= 3]
    return (model.vae.decode_images(images[:, :, kept]).transpose(1, 2) / 2 + 0.5).clamp(0, 1)


def wan_whole(model: Any, z: Tensor, frames: int) -> Tensor:
    mean, std = statistics(model.vae, z)
    return model.vae.decode(z * std + mean).sample.transpose(1, 2) / 2 + 0.5


@dataclass(frozen=True)
class Tiny:
    """write: the checkpoint into an empty folder.

    unchunked: so many frames [B, T, 3, H, W] decoded at once.
    exact: whether decoding in chunks changes nothing. images: whether the model is given start images.
    """

    family: str
    write: Callable[[Path], Any]
    video: VideoSpec
    unchunked: Decode
    exact: bool
    images: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self, folder: Path) -> VideoModel:
        """The model, through the family's own loader."""
        module = registry.load("models", self.family)
        assert module.matches(folder)
        return module.build(module.Config(folder=str(folder), **self.settings))

    def pictures(self, count: int) -> tuple[Tensor, ...]:
        """Start images [3, H, W], none where the model is given none."""
        rng = torch.Generator().manual_seed(7)
        size = (3, self.video.height, self.video.width)
        return tuple(torch.rand(size, generator=rng) for _ in range(count if self.images else 0))


def _svd(folder: Path) -> None:
    tiny_svd.tiny_pipeline(tiny_svd.tiny_networks()).save_pretrained(folder)


_WAN = VideoSpec(frames=9, height=32, width=48, fps=16)
_WAN_2_2 = VideoSpec(frames=5, height=32, width=64, fps=24)
_LTX = VideoSpec(frames=41, height=32, width=32, fps=12)
_NEAR = {"decode_context": 1}

VARIANTS = {
    "modelscope": Tiny("modelscope", tiny.save_tiny, tiny.VIDEO, set_to(), exact=True),
    "videocrafter2": Tiny("videocrafter2", tiny_videocrafter2.save_tiny, VideoSpec(3, 8, 16, 24), set_to(), exact=True),
    "opensora": Tiny("opensora", tiny_opensora.save_tiny, VideoSpec(34, 16, 24, 24), opensora_whole, exact=False),
    "svd": Tiny(
        "svd", _svd, VideoSpec(5, 16, 24, 7), set_to(decode_chunk=0), exact=False, images=True,
        settings={"decode_chunk": 2},
    ),
    "wan": Tiny("wan", tiny_wan.save_tiny, _WAN, wan_whole, exact=True),
    "wan_i2v": Tiny("wan", tiny_wan.save_tiny_image_to_video, _WAN, wan_whole, exact=True, images=True),
    "wan_2_2": Tiny("wan", tiny_wan.save_tiny_2_2, _WAN_2_2, wan_whole, exact=True),
    "wan_2_2_i2v": Tiny("wan", tiny_wan.save_tiny_2_2, _WAN_2_2, wan_whole, exact=True, images=True),
    "ltx": Tiny("ltx", tiny_ltx.save_tiny, _LTX, set_to(decode_context=0), exact=False, settings=_NEAR),
    "ltx_i2v": Tiny("ltx", tiny_ltx.save_tiny, _LTX, set_to(decode_context=0), exact=False, images=True,
                    settings=_NEAR),
}  # fmt: skip
