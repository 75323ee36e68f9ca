"""Whether a video shows an action: the log-probability that a VideoMAE classifier gives it.

Source: VADER's action reward, on MCG-NJU/videomae-base-finetuned-kinetics. The reward is minus the
published loss, a cross-entropy; the probability, which VADER reports as its reward, is a second part.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from ..config import InputError, check, option
from ..loading import DTYPES, empty_from, load_frozen
from ..mini.files import locate as embedded
from ..stand_in import size_of
from ._images import widened
from ._videos import VideoConfig, View, WholeVideoReward, as_processor, frame_count

TITLE = "VideoMAE"
HUB = {"checkpoint": ("MCG-NJU/videomae-base-finetuned-kinetics",)}
_CLASSES = 400  # of Kinetics
# Arguments of VideoMAEConfig, whose defaults are those of videomae-base, by parts of the checkpoint's name.
_SIZES: dict[str, dict[str, Any]] = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


@dataclass(frozen=True)
class Config(VideoConfig):
    """action: one class for all videos; keywords: more names for classes."""

    checkpoint: str = option("mini/videomae", "Folder of the classifier: MCG-NJU/videomae-base-finetuned-kinetics.")
    action: str = option("", "The class that every video should show; empty: the one that its own prompt names.")
    keywords: str = option(
        "",
        "More words by which prompts name classes, a line for each: piano = playing piano.",
        multiline=True,
    )


def build(config: Config, locate: Callable[[str], Path] = embedded) -> VideoMae:
    """Load the classifier.

    Raises:
        InputError: the folder is missing, truncated or of another kind, or the classifier has no such class.
    """
    check(config)
    folder = locate(config.checkpoint)
    model = load_frozen(VideoMAEForVideoClassification, folder, DTYPES[config.dtype], "VideoMAE classifier")
    count = _set_frames(model, config.frames)
    view = as_processor(_view(model, config.fit), folder / "preprocessor_config.json")
    return VideoMae(config, model, view, count)


def full_size(config: Config) -> VideoMae:
    """A published classifier without weights; whatever a prompt says, its first class is meant."""
    check(config)
    told = VideoMAEConfig(**size_of(config.checkpoint, _SIZES, {}), num_labels=_CLASSES)
    model = empty_from(VideoMAEForVideoClassification, told, DTYPES[config.dtype])
    count = _set_frames(model, config.frames)
    first = model.config.id2label[0]
    return VideoMae(replace(config, action=first, keywords=""), model, _view(model, config.fit), count)


class VideoMae(WholeVideoReward):
    """See the module."""

    def __init__(self, config: Config, model: VideoMAEForVideoClassification, view: View, count: int) -> None:
        super().__init__("videomae", config, model, view, count)
        self.model = model
        self.classes = {name: int(index) for index, name in model.config.id2label.items()}
        self.names = _phrases(self.classes, config.keywords)
        self.fixed = _known(config.action, self.classes, "action") if config.action.strip() else None

    def scores(self, pixels_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        targets = torch.tensor([self.target(prompt) for prompt in prompts], device=pixels_BTCHW.device)
        odds = widened(self.model(pixel_values=pixels_BTCHW).logits).log_softmax(-1)
        own = odds.gather(1, targets[:, None]).squeeze(1)
        return {self.name: own, f"{self.name} probability": own.exp()}

    def target(self, prompt: str) -> int:
        """The class that a video of this prompt should show.

        Raises:
            InputError: the prompt names none.
        """
        if self.fixed is not None:
            return self.fixed
        named = [phrase for phrase in self.names if _names(prompt, phrase)]
        if not named:
            raise InputError(
                f"The prompt {prompt!r} names none of the {len(self.classes)} actions of this classifier; "
                f"{_nearest(prompt, self.classes)} Name one in the prompt or in keywords, or set action."
            )
        return self.names[max(named, key=len)]


def _view(model: VideoMAEForVideoClassification, fit: str) -> View:
    return View(model.config.image_size, model.config.image_size, fit)


def _set_frames(model: VideoMAEForVideoClassification, frames: int) -> int:
    """How many frames it takes from now on, 0 for its own number; the fixed table of positions depends on it."""
    told = model.config
    count = frame_count(frames, told.num_frames, told.tubelet_size)
    places = (told.image_size // told.patch_size) ** 2 * (count // told.tubelet_size)
    model.videomae.embeddings.position_embeddings = get_sinusoid_encoding_table(places, told.hidden_size)
    return count


def _phrases(classes: dict[str, int], keywords: str) -> dict[str, int]:
    """By what a prompt names a class: its own name, with and without what stands in brackets; the user's keywords."""
    phrases = {re.sub(r"\(.*?\)", "", name).strip(): index for name, index in reversed(classes.items())} | classes
    for line in filter(str.strip, keywords.splitlines()):
        phrase, found, name = line.partition("=")
        if not found or not _words(phrase):
            raise InputError(f"The line {line!r} of keywords must read like: piano = playing piano.")
        phrases[phrase.strip()] = _known(name, classes, "keywords")
    return {phrase: index for phrase, index in phrases.items() if _words(phrase)}


def _known(name: str, classes: Mapping[str, int], field: str) -> int:
    known = {own.lower(): index for own, index in classes.items()}
    wanted = name.strip().lower()
    if wanted not in known:
        raise InputError(
            f"{field} names the class {name.strip()!r}, which this classifier does not know; {_nearest(name, classes)}"
        )
    return known[wanted]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _names(prompt: str, phrase: str) -> bool:
    """Whether all words of the phrase stand in the prompt, in this order; others may lie between."""
    rest = iter(_words(prompt))
    return all(word in rest for word in _words(phrase))


def _nearest(text: str, names: Mapping[str, int], count: int = 3) -> str:
    """The names whose words are most like words of the text."""
    given = _words(text) or [""]

    def likeness(name: str) -> float:
        own = _words(name)
        best = (max(difflib.SequenceMatcher(None, word, other).ratio() for other in given) for word in own)
        return sum(best) / max(1, len(own))

    closest = sorted(names, key=likeness, reverse=True)[:count]
    return "did you mean " + " or ".join(map(repr, closest)) + "?"
