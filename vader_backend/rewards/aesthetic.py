"""How pleasing single frames look, about 1 to 10: the LAION aesthetic predictor V2 on CLIP image features.

Source: christophschuhmann/improved-aesthetic-predictor, which crops pictures. VADER squashes frames and takes the
target 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import InputError, check, option
from ..loading import DTYPES, build_empty, build_frozen, read_tensors
from ..mini.files import locate as embedded
from ._clip import Clip, empty_clip, fit, load_clip
from ._clip_sizes import VIT_L14
from ._images import ImageConfig, PerFrameReward, precision

TITLE = "Aesthetic"
HUB = {"checkpoint": ("openai/clip-vit-large-patch14",)}
_PUBLISHED = (768, 1024, 128, 64, 16, 1)
_WHAT = "aesthetic head"
_LINEAR = (0, 2, 4, 6, 7)  # places of the linear layers; dropout lies between
_DIMENSIONS = {f"layers.{place}.{part}": n for place in _LINEAR for part, n in (("weight", 2), ("bias", 1))}


@dataclass(frozen=True)
class Config(ImageConfig):
    """checkpoint: CLIP; head: the predictor on its features."""

    checkpoint: str = option("mini/clip", "CLIP whose image features are judged: openai/clip-vit-large-patch14.")
    head: str = option("mini/aesthetic/head.safetensors", "The predictor: sac+logos+ava1-l14-linearMSE.pth.")
    fit: str = fit()
    dtype: str = precision()


def build(config: Config, locate: Callable[[str], Path] = embedded) -> Aesthetic:
    """Load CLIP and the head.

    Raises:
        InputError: a file is missing, truncated or of another kind, or the two do not fit together.
    """
    check(config)
    clip = load_clip(locate(config.checkpoint), config.fit, DTYPES[config.dtype])
    return Aesthetic(config, clip, load_head(locate(config.head), clip.width))


def full_size(config: Config) -> Aesthetic:
    """The published networks without weights."""
    head = build_empty(lambda: AestheticHead(_PUBLISHED), torch.float32)
    return Aesthetic(config, empty_clip(config, VIT_L14), head)


class AestheticHead(nn.Module):
    """Linear layers without activations between them; the keys are layers.{0,2,4,6,7}, as published."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Args:
        widths: from the features' width to 1, six in all.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for i, (narrow, wide) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(narrow, wide))
            if i < 3:
                layers.append(nn.Dropout((0.2, 0.2, 0.1)[i]))
        self.layers = nn.Sequential(*layers)

    def forward(self, features_ND: Tensor) -> Tensor:
        return self.layers(features_ND).squeeze(-1)


class Aesthetic(PerFrameReward):
    """See the module."""

    def __init__(self, config: Config, clip: Clip, head: AestheticHead) -> None:
        super().__init__("aesthetic", config, [clip.model, head])
        self.clip = clip
        self.head = head

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.image_features(images_NCHW))


def load_head(path: Path, width: int) -> AestheticHead:
    """Read the published .pth or a .safetensors file with the same keys; the layers' sizes come from the tensors.

    Args:
        width: of the features it will get.

    Raises:
        InputError: the file is missing, truncated, a pickle of anything but tensors, or made for other features.
    """
    return build_head(read_tensors(path, _WHAT), width, path)


def build_head(tensors: Mapping[str, Tensor], width: int, path: Path) -> AestheticHead:
    """The frozen head around tensors under the published keys; for the rest see `load_head`."""
    if {name: tensor.dim() for name, tensor in tensors.items()} != _DIMENSIONS:
        raise InputError(
            f"{path.name} is not a LAION aesthetic head: those hold layers.0 to layers.7 and nothing else."
        )
    widths = [tensors["layers.0.weight"].shape[-1], *(len(tensors[f"layers.{place}.weight"]) for place in _LINEAR)]
    head = build_frozen(lambda: AestheticHead(widths), tensors, torch.float32, _WHAT, path)
    if widths[0] != width:
        raise InputError(
            f"The aesthetic head {path.name} takes features {widths[0]} wide, but this CLIP's are {width} wide; "
            "choose the CLIP that the head was trained on."
        )
    return head
