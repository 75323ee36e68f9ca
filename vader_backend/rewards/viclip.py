"""How well a whole video fits its prompt, motion included: ViCLIP, the cosine of a video and a text.

Source: OpenGVLab/InternVideo, ViClip-InternVid-10M-FLT.pth; Wang et al. 2023, InternVid. VADER's Table 3
trains on it together with the aesthetic score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import InputError, check, inherited, option
from ..loading import DTYPES, read_tensors
from ..mini.files import locate as embedded
from ..open_clip import read_tokenizer
from ..stand_in import tokenizer as stand_in_tokenizer
from ._clip import Clip, tokenizer
from ._viclip import build_viclip, empty_viclip, trained_frames
from ._videos import VideoConfig, View, WholeVideoReward

TITLE = "ViCLIP"


@dataclass(frozen=True)
class Config(VideoConfig):
    """checkpoint: the published file."""

    checkpoint: str = option("mini/viclip/model.safetensors", "The network: ViClip-InternVid-10M-FLT.pth.")
    frame_choice: str = inherited(VideoConfig, "frame_choice", "strided")
    fit: str = inherited(VideoConfig, "fit", "squash")
    antialias: bool = option(False, "Smooth before frames are made smaller; the published code does not.")
    tokenizer: str = tokenizer()


def build(config: Config, locate: Callable[[str], Path] = embedded) -> ViClip:
    """Load the network.

    Raises:
        InputError: the file is missing, truncated or of another kind, it has no tokenizer, or it was not trained
            on that number of frames.
    """
    check(config)
    path = locate(config.checkpoint)
    model = build_viclip(read_tensors(path, "ViCLIP model"), DTYPES[config.dtype], path)
    folder = locate(config.tokenizer) if config.tokenizer else None
    words = read_tokenizer(path, folder, model.config.text_config.vocab_size, path.name)
    return _assembled(config, Clip(model, words))


def full_size(config: Config) -> ViClip:
    """The published network without weights."""
    check(config)
    model = empty_viclip(DTYPES[config.dtype])
    return _assembled(config, Clip(model, stand_in_tokenizer(model.config.text_config.max_position_embeddings)))


def _assembled(config: Config, clip: Clip) -> ViClip:
    own = trained_frames(clip.model)
    if config.frames not in (0, 1, own):
        raise InputError(f"frames is {config.frames}, but this ViCLIP takes {own} frames, or 1; set one of the two.")
    size = clip.model.config.vision_config.image_size
    view = View(size, size, config.fit, antialias=config.antialias)
    return ViClip(config, clip, view, config.frames or own)


class ViClip(WholeVideoReward):
    """Cosine of each video and its own prompt."""

    def __init__(self, config: Config, clip: Clip, view: View, count: int) -> None:
        super().__init__("viclip", config, clip.model, view, count)
        self.clip = clip

    def scores(self, pixels_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {self.name: self.clip.cosine(pixels_BTCHW, prompts)}
