"""How well single frames fit their prompt and please people: the Human Preference Score v2 or v2.1, a CLIP cosine.

Source: Wu et al. 2023, tgxs002/HPSv2: HPS_v2_compressed.pt and HPS_v2.1_compressed.pt are open_clip's ViT-H-14.
VADER squashes frames to the square; the official scorer pads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import option
from ..mini.files import locate as embedded
from ._clip import CLIP_MARKERS, ClipConfig, ClipReward, empty_clip, read_clip

TITLE = "HPS"
MARKERS = CLIP_MARKERS


@dataclass(frozen=True)
class Config(ClipConfig):
    """checkpoint: the published file, or a CLIP folder."""

    checkpoint: str = option(
        "mini/clip", "HPS_v2_compressed.pt, HPS_v2.1_compressed.pt, or a folder in transformers' CLIP layout."
    )


def build(config: Config, locate: Callable[[str], Path] = embedded) -> ClipReward:
    """Load the network.

    Raises:
        InputError: the checkpoint is missing, truncated or of another kind, or has no tokenizer.
    """
    return ClipReward("hps", config, read_clip(config, locate))


def full_size(config: Config) -> ClipReward:
    """The published network without weights."""
    return ClipReward("hps", config, empty_clip(config))
