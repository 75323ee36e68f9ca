"""Whether videos of the mini world show what their caption says, read from the pixels; never to be trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..config import InputError, check
from ..mini.files import locate as embedded
from ..mini.oracle import ATTRIBUTES, correct
from ..mini.world import parse_caption
from ..types import FrameSpec
from ._images import check_frames
from .base import SingleReward

TITLE = "Mini Oracle"


@dataclass(frozen=True)
class Config:
    """It has no settings."""


def build(config: Config, locate: Callable[[str], Path] = embedded) -> MiniOracle:
    check(config)
    return MiniOracle()


class MiniOracle(SingleReward):
    """The share of background, colour, shape and motion that are right; motion needs at least four frames."""

    name = "oracle"
    differentiable = False
    frames = FrameSpec("all")

    def __init__(self) -> None:
        self.description = {"kind": "mini_oracle"}

    def networks(self) -> Sequence[nn.Module]:
        return ()

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        return self._correct(video_BTCHW, prompts).mean(1)

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        right = self._correct(video_BTCHW, prompts)
        each = {f"{self.name} {attribute}": right[:, i] for i, attribute in enumerate(ATTRIBUTES)}
        return {**each, self.name: right.mean(1)}

    def _correct(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        check_frames(self.name, video_BTCHW)
        try:
            scenes = [parse_caption(prompt) for prompt in prompts]
        except ValueError as error:
            raise InputError(f"The mini oracle cannot score this prompt: {error}") from None
        return correct(video_BTCHW, scenes).to(video_BTCHW.device)
