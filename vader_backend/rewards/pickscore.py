"""How well single frames fit their prompt and please people: PickScore, a scaled CLIP cosine.

Source: Kirstain et al. 2023, yuvalkirstain/PickScore_v1; frames keep their shape and lose their edges.
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

TITLE = "PickScore"


@dataclass(frozen=True)
class Config(ImageConfig):
    """checkpoint: a CLIP folder."""

    checkpoint: str = option("mini/clip", "Folder of the image-text network, in transformers' CLIP layout.")


def build(config: Config, locate: Callable[[str], Path] = embedded) -> PickScore:
    """Load the network.

    Raises:
        InputError: the folder is missing, truncated or of another kind.
    """
    check(config)
    return PickScore(config, load_clip(locate(config.checkpoint), "crop"))


class PickScore(ImageReward):
    """Cosine of picture and text times the learnt logit scale; each picture is scored against its own prompt."""

    def __init__(self, config: Config, clip: Clip) -> None:
        super().__init__("pickscore", config, [clip.model])
        self.clip = clip

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.model.logit_scale.exp() * self.clip.similarity(images_NCHW, prompts)
