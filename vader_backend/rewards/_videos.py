"""What the rewards on whole videos share: how many frames they take, and how these are fitted to the network."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..config import InputError, option
from ..loading import fingerprint, reading
from ..types import FrameSpec
from ._fit import crop
from ._images import IMAGENET_NORM, check_frames, normalise, precision, resize
from .base import SingleReward

_MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers for them


@dataclass(frozen=True)
class VideoConfig:
    """Fields of every reward on whole videos; each gives `checkpoint` its own default."""

    checkpoint: str = option("", "The network's file or folder.")
    frames: int = option(
        0, "How many frames of each video are scored; 0: as many as the network was made for.", low=0, high=1024
    )
    frame_choice: str = option(
        "even",
        "even: spread over the video, ends included; strided: every n-th from the first; first: the first ones; "
        "random: other frames in each step.",
        choices=("even", "strided", "first", "random"),
    )
    fit: str = option(
        "crop",
        "crop: the short side is scaled and the centre cut out, as the network's own processor does; "
        "squash: the whole frame is stretched to the square, as VADER does.",
        choices=("crop", "squash"),
    )
    dtype: str = precision()


@dataclass(frozen=True)
class View:
    """How frames are brought to the square of `size` that a network takes; `short`: short side before the cut."""

    size: int
    short: int
    fit: str = "crop"
    norm: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET_NORM
    mode: str = "bilinear"
    antialias: bool = True  # of squash

    def __call__(self, video_BTCHW: Tensor) -> Tensor:
        """[B, T, 3, size, size], normalised; differentiable."""
        images = video_BTCHW.flatten(0, 1)
        if self.fit == "squash":
            fitted = resize(images, self.size, self.size, mode=self.mode, antialias=self.antialias)
        else:
            fitted = crop(images, self.size, self.short, self.mode)
        return normalise(fitted, self.norm).unflatten(0, video_BTCHW.shape[:2])


def as_processor(view: View, path: Path) -> View:
    """The view with what a processor's configuration file says, where there is one.

    Raises:
        InputError: the file cannot be read.
    """
    if not path.is_file():
        return view
    with reading("preprocessor configuration", path):
        told = json.loads(path.read_text(encoding="utf-8"))
        size = told.get("size", view.short)
        short = int(size.get("shortest_edge", view.size) if isinstance(size, dict) else size)
        mean, std = (told.get(f"image_{name}", given) for name, given in zip(("mean", "std"), view.norm, strict=True))
        mode = _MODES[told.get("resample", 2)]
        return replace(view, short=max(short, view.size), norm=(tuple(mean), tuple(std)), mode=mode)


class WholeVideoReward(SingleReward):
    """Base of the rewards that score a video as a whole."""

    def __init__(self, name: str, config: VideoConfig, network: nn.Module, view: View, count: int) -> None:
        """Args:
        count: of frames that each call takes.
        """
        self.name = name
        choice = cast(Literal["random", "first", "even", "strided"], config.frame_choice)
        self.frames = FrameSpec(choice, count, exact=True)
        self.view = view
        self.network = network
        self.description: dict[str, Any] = {"kind": name, **asdict(config), "weights": [fingerprint(network)]}

    def networks(self) -> Sequence[nn.Module]:
        return [self.network]

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        return self.parts(video_BTCHW, prompts, indices)[self.name]

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        """See `Reward`.

        Raises:
            InputError: the video has too few or too many frames, no colour, or next to no pixels.
        """
        check_frames(self.name, video_BTCHW, self.frames.count)
        if video_BTCHW.shape[1] > self.frames.count:
            raise InputError(
                f"The reward {self.name} scores {self.frames.count} frames at a time, but was given "
                f"{video_BTCHW.shape[1]}; leave reward_frames at reward, or set the reward's frames."
            )
        weight = next(self.network.parameters())
        return self.scores(self.view(video_BTCHW).to(weight.device, weight.dtype), prompts)

    @abstractmethod
    def scores(self, pixels_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The parts [B], the reward itself among them; differentiable."""


def frame_count(wanted: int, own: int, tubelet: int) -> int:
    """How many frames to take: those wanted, else the network's own number.

    Raises:
        InputError: the number cannot be cut into pieces of `tubelet` frames.
    """
    count = wanted or own
    if count % tubelet:
        raise InputError(f"frames is {count}, but this network takes frames in groups of {tubelet}; set a multiple.")
    return count
