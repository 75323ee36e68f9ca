"""How well single frames fit their prompt and please people: the Human Preference Score, a CLIP cosine.

Source: Wu et al. 2023, HPSv2; VADER squashes frames to the square. The checkpoint is in transformers' CLIP layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import check, option
from ..mini.files import locate as embedded
from ._clip import Clip, load_clip
from ._images import ImageConfig, ImageReward

TITLE = "HPS"


@dataclass(frozen=True)
class Config(ImageConfig):
    """checkpoint: a CLIP folder."""

    checkpoint: str = option("mini/clip", "Folder of the image-text network, in transformers' CLIP layout.")


def build(config: Config, locate: Callable[[str], Path] = embedded) -> Hps:
    """Load the network.

    Raises:
        InputError: the folder is missing, truncated or of another kind.
    """
    check(config)
    return Hps(config, load_clip(locate(config.checkpoint), "squash"))


class Hps(ImageReward):
    """Cosine of picture and text, without the logit scale."""

    def __init__(self, config: Config, clip: Clip) -> None:
        super().__init__("hps", config, [clip.model])
        self.clip = clip

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.similarity(images_NCHW, prompts)
