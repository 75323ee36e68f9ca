"""Whether single frames show an object: YOLOS on each frame, for removing or keeping one class.

Source: VADER's object-removal reward. Its mean score of the boxes above a threshold has no gradient below
the threshold, so the reward is the probability that at least one query shows the class; both are reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import YolosConfig, YolosForObjectDetection

from ..config import InputError, check, option, suggest
from ..loading import DTYPES, empty_from, load_frozen, reading
from ..mini.files import locate as embedded
from ..stand_in import size_of
from ._images import (
    IMAGENET_NORM,
    ImageConfig,
    PerFrameReward,
    check_frames,
    normalise,
    over_frames,
    precision,
    resize,
    widened,
)

TITLE = "YOLOS"
HUB = {"checkpoint": ("hustvl/yolos-tiny", "hustvl/yolos-base")}
_THRESHOLD = 0.2
_PUBLISHED_HEIGHT = 512
_CELL = 16  # YolosImageProcessor cuts sides to multiples of it
_CLASSES = 91  # of COCO
_BASE: dict[str, Any] = {"image_size": [800, 1344]}
Looks = Callable[[int, int], tuple[int, int]]  # height and width of frames to those at which they are looked at
# Arguments of YolosConfig, by parts of the checkpoint's name; the rest is as in yolos-base.
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": [800, 1333],
             "use_mid_position_embeddings": False},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
}  # fmt: skip


@dataclass(frozen=True)
class Config(ImageConfig):
    """target: the class, by name; mode: whether it should go or stay."""

    checkpoint: str = option("mini/detector", "Folder of the detector: hustvl/yolos-base or yolos-tiny.")
    target: str = option("circle", "Name of the object's class, as the detector calls it: book, cup, person, ...")
    mode: str = option(
        "remove", "remove: frames without the object score high; keep: frames with it.", choices=("remove", "keep")
    )
    height: int = option(
        0,
        "Height in pixels at which frames are looked at, 512 in the published code; 0: the size to which the "
        "detector's own processor brings them, for yolos-base 800 pixels on the short side.",
        low=0,
        high=4096,
    )
    antialias: bool = option(False, "Smooth before frames are made smaller; the published code does not.")
    dtype: str = precision()


def build(config: Config, locate: Callable[[str], Path] = embedded) -> Yolos:
    """Load the detector.

    Raises:
        InputError: the folder is missing, truncated or of another kind, or the detector has no such class.
    """
    check(config)
    folder = locate(config.checkpoint)
    model = load_frozen(YolosForObjectDetection, folder, DTYPES[config.dtype], "YOLOS detector")
    looks = partial(by_height, config.height) if config.height else _as_processor(folder)
    return Yolos(config, model, _class_index(model.config.id2label, config.target), looks)


def full_size(config: Config) -> Yolos:
    """A published detector without weights, in which the class that is named is the first one."""
    check(config)
    told = YolosConfig(**size_of(config.checkpoint, _SIZES, _BASE), num_labels=_CLASSES)
    model = empty_from(YolosForObjectDetection, told, DTYPES[config.dtype])
    return Yolos(config, model, 0, partial(by_height, config.height) if config.height else by_short_side)


class Yolos(PerFrameReward):
    """target: index of the class; looks: at what size it looks at frames of a size."""

    def __init__(self, config: Config, model: YolosForObjectDetection, target: int, looks: Looks) -> None:
        super().__init__("yolos", config, [model])
        self.model = model
        self.target = target
        self.looks = looks
        self.antialias = config.antialias
        self.remove = config.mode == "remove"

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._wanted(presence(self.probabilities(images_NCHW), self.target))

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        """The reward, and the published score."""
        check_frames(self.name, video_BTCHW)
        odds = self.probabilities(video_BTCHW.flatten(0, 1))
        smooth, published = presence(odds, self.target), mean_detection(odds, self.target)
        return {
            self.name: over_frames(video_BTCHW, self._wanted(smooth)),
            f"{self.name} published": over_frames(video_BTCHW, self._wanted(published)),
        }

    def probabilities(self, images_NCHW: Tensor) -> Tensor:
        """[N, queries, classes + 1]; the last class is no object."""
        patch = self.model.config.patch_size
        height, width = (max(patch, side) for side in self.looks(*images_NCHW.shape[-2:]))
        fitted = resize(images_NCHW, height, width, antialias=self.antialias, mode="bilinear")
        pixels = normalise(fitted, IMAGENET_NORM).to(self.model.device, self.model.dtype)
        return widened(self.model(pixel_values=pixels).logits).softmax(-1)

    def _wanted(self, present_N: Tensor) -> Tensor:
        return 1 - present_N if self.remove else present_N


def presence(odds_NQC: Tensor, target: int) -> Tensor:
    """[N]: the probability that at least one query shows the class, were they independent."""
    own = odds_NQC[..., target].clamp(max=1 - 1e-6)
    return 1 - torch.log1p(-own).sum(1).exp()


def mean_detection(odds_NQC: Tensor, target: int) -> Tensor:
    """[N]: the published score, the mean over the boxes of this class above the threshold; 0 without any."""
    score, label = odds_NQC[..., :-1].max(-1)
    found = (label == target) & (score > _THRESHOLD)
    return (score * found).sum(1) / found.sum(1).clamp(min=1)


def _class_index(labels: dict[int, str], name: str) -> int:
    known = {label.lower(): int(index) for index, label in labels.items() if label != "N/A"}
    wanted = name.strip().lower()
    if wanted not in known:
        every = ", ".join(sorted(known))
        raise InputError(
            f"target is {name!r}, which this detector does not know; {suggest(wanted, sorted(known))} "
            f"All of its classes: {every}."
        )
    return known[wanted]


def by_height(goal: int, height: int, width: int) -> tuple[int, int]:
    """The published size: `goal` pixels high; the network leaves out the rest of a patch at the right."""
    return goal, goal * width // height


def by_short_side(height: int, width: int, short: int = 800, longest: float = 1333) -> tuple[int, int]:
    """As YolosImageProcessor: the short side is `short`, less where the long one would be above `longest`."""
    old_short, old_long = sorted((height, width))
    exact = min(short, longest * old_short / old_long)
    near, far = round(exact), int(exact * old_long / old_short)
    if near == height <= width:  # it leaves such pictures as they are, even a little above `longest`
        far = width
    near, far = near - near % _CELL, far - far % _CELL
    return (near, far) if height <= width else (far, near)


def _as_processor(folder: Path) -> Looks:
    """What the folder's preprocessor is configured to; without one the published 512."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return partial(by_height, _PUBLISHED_HEIGHT)
    with reading("preprocessor configuration", path):
        told = json.loads(path.read_text(encoding="utf-8"))
        size: Any = told.get("size", {})
        if not isinstance(size, dict):  # as in older files
            size = {"shortest_edge": size, "longest_edge": told.get("max_size")}
        if {"height", "width"} <= size.keys():
            fixed = int(size["height"]), int(size["width"])
            return lambda height, width: fixed
        limits = {"short": size.get("shortest_edge"), "longest": size.get("longest_edge")}
        return partial(by_short_side, **{name: int(limit) for name, limit in limits.items() if limit})
