"""How well single frames fit their prompt and please people: PickScore, a CLIP cosine times about 100.

Source: Kirstain et al. 2023, yuvalkirstain/PickScore_v1; VADER too keeps the shape of frames and cuts their edges.
Its tokenizer is that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import inherited, option
from ..mini.files import locate as embedded
from ._clip import CLIP_MARKERS, ClipConfig, ClipReward, empty_clip, read_clip

TITLE = "PickScore"
MARKERS = CLIP_MARKERS
HUB = {"checkpoint": ("yuvalkirstain/PickScore_v1",)}


@dataclass(frozen=True)
class Config(ClipConfig):
    """checkpoint: a CLIP folder."""

    checkpoint: str = option("mini/clip", "Folder of PickScore_v1, or of another network in transformers' CLIP layout.")
    fit: str = inherited(ClipConfig, "fit", "crop")


def build(config: Config, locate: Callable[[str], Path] = embedded) -> PickScore:
    """Load the network.

    Raises:
        InputError: the checkpoint is missing, truncated or of another kind, or has no tokenizer.
    """
    return PickScore("pickscore", config, read_clip(config, locate))


def full_size(config: Config) -> PickScore:
    """The published network without weights."""
    return PickScore("pickscore", config, empty_clip(config))


class PickScore(ClipReward):
    """Cosine of picture and text times the learnt logit scale; each picture is scored against its own prompt."""

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.model.logit_scale.exp() * super().images(images_NCHW, prompts)
