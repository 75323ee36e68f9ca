"""What the rewards on single frames share: which frames they take, and the mean over them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import InputError, option
from ..loading import DTYPES, fingerprint
from ..types import FrameSpec
from .base import SingleReward

CLIP_NORM = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LEAST_PIXELS = 8  # of a frame's side


def precision() -> str:
    """A field for the precision of a reward's weights."""
    return option(
        "float32",
        "Precision of the network; bfloat16 takes half the memory, float16 may lose small gradients.",
        choices=tuple(DTYPES),
    )


@dataclass(frozen=True)
class ImageConfig:
    """Fields of every reward on single frames; each gives `checkpoint` its own default."""

    checkpoint: str = option("", "The network's folder.")
    frames: int = option(1, "How many frames of each video are scored; the mean counts.", low=1, high=1024)
    frame_choice: str = option(
        "random",
        "random: other frames in each step; first: the first ones; even: spread over the video; all: every frame.",
        choices=("random", "first", "even", "all"),
    )

    def spec(self) -> FrameSpec:
        return FrameSpec(cast(Literal["random", "first", "even", "all"], self.frame_choice), self.frames)


class PerFrameReward(SingleReward):
    """Base of the rewards that score each frame by itself."""

    def __init__(self, name: str, config: ImageConfig, networks: Sequence[nn.Module]) -> None:
        self.name = name
        self.frames = config.spec()
        self._networks = tuple(networks)
        self.description: dict[str, Any] = {
            "kind": name,
            **asdict(config),
            "weights": [fingerprint(network) for network in networks],
        }

    def networks(self) -> Sequence[nn.Module]:
        return self._networks

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        check_frames(self.name, video_BTCHW)
        return over_frames(video_BTCHW, self.images(video_BTCHW.flatten(0, 1), per_frame(video_BTCHW, prompts)))

    @abstractmethod
    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of N pictures in [0, 1], each against its own prompt; differentiable."""


def check_frames(name: str, video_BTCHW: Tensor, fewest: int = 1) -> None:
    """Raises InputError where frames are fewer than `fewest`, have no colour or next to no pixels."""
    count, channels, height, width = video_BTCHW.shape[1:]
    if count < fewest:
        raise InputError(
            f"The reward {name} needs at least {fewest} frames of each video, but was given {count}; make longer "
            "videos, or set the reward's frames."
        )
    if channels != 3 or min(height, width) < _LEAST_PIXELS:
        raise InputError(
            f"The reward {name} needs frames in colour of {_LEAST_PIXELS} x {_LEAST_PIXELS} pixels or more, "
            f"but was given {height} x {width} with {channels} channels."
        )


def per_frame(video_BTCHW: Tensor, prompts: Sequence[str]) -> list[str]:
    """Each video's prompt once per frame: one per picture of the flattened batch."""
    return [prompt for prompt in prompts for _ in range(video_BTCHW.shape[1])]


def over_frames(video_BTCHW: Tensor, scores_N: Tensor) -> Tensor:
    """[B]: the mean over the frames of scores [B * T], in float32 or better."""
    return widened(scores_N).unflatten(0, video_BTCHW.shape[:2]).mean(1)


def widened(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def resize(images_NCHW: Tensor, height: int, width: int, *, antialias: bool = True, mode: str = "bicubic") -> Tensor:
    """Differentiable resize; nothing is done where the size is right already."""
    if images_NCHW.shape[-2:] == (height, width):
        return images_NCHW
    return F.interpolate(images_NCHW, size=(height, width), mode=mode, antialias=antialias, align_corners=False)


def normalise(images_NCHW: Tensor, norm: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Subtract a mean per channel and divide by a deviation."""
    mean, std = (images_NCHW.new_tensor(part)[:, None, None] for part in norm)
    return (images_NCHW - mean) / std
