"""How well single frames fit their prompt: the cosine of a CLIP that no preference was trained into.

Source: Hessel et al. 2021, CLIPScore; T2V-Turbo-v2 trains on it with laion's ViT-H-14. The cosine is left unscaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import inherited, option
from ..mini.files import locate as embedded
from ._clip import CLIP_MARKERS, ClipConfig, ClipReward, empty_clip, read_clip

TITLE = "CLIPScore"
MARKERS = CLIP_MARKERS
HUB = {"checkpoint": ("openai/clip-vit-large-patch14",)}


@dataclass(frozen=True)
class Config(ClipConfig):
    """checkpoint: a CLIP folder, or a file in open_clip's layout."""

    checkpoint: str = option(
        "mini/clip", "CLIP: a folder such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K, or a file in open_clip's layout."
    )
    fit: str = inherited(ClipConfig, "fit", "crop")


def build(config: Config, locate: Callable[[str], Path] = embedded) -> ClipReward:
    """Load the network.

    Raises:
        InputError: the checkpoint is missing, truncated or of another kind, or has no tokenizer.
    """
    return ClipReward("clipscore", config, read_clip(config, locate))


def full_size(config: Config) -> ClipReward:
    """The published network without weights."""
    return ClipReward("clipscore", config, empty_clip(config))
