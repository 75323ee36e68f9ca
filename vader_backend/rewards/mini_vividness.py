"""How strong colours are in videos of the mini world, read from the pixels; never to be trained on.

It measures what the embedded aesthetic head was taught to guess: where the head's score rises and this does
not, the head is being deceived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..config import check
from ..mini.files import locate as embedded
from ..mini.oracle import strength
from ..types import FrameSpec
from ._images import check_frames
from .base import SingleReward

TITLE = "Mini Vividness"


@dataclass(frozen=True)
class Config:
    """It has no settings."""


def build(config: Config, locate: Callable[[str], Path] = embedded) -> MiniVividness:
    check(config)
    return MiniVividness()


class MiniVividness(SingleReward):
    """The strength of the shape's colour, about 0.3 (pale and hazy) to 1 (vivid and clear); 0 where there is none."""

    name = "vividness"
    differentiable = False
    frames = FrameSpec("all")

    def __init__(self) -> None:
        self.description = {"kind": "mini_vividness"}

    def networks(self) -> Sequence[nn.Module]:
        return ()

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        check_frames(self.name, video_BTCHW)
        return strength(video_BTCHW).to(video_BTCHW.device)
