"""Whether single frames show an object: YOLOS on each frame, for removing or keeping one class.

Source: VADER's object-removal reward. Its mean score of the boxes above a threshold has no gradient below
the threshold, so the reward is the probability that at least one query shows the class; both are reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_CLASSES = 91  # of COCO
_BASE: dict[str, Any] = {"image_size": [800, 1344]}
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
        "Height in pixels at which frames are looked at; 0: the detector's own fixed size, else 512.",
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
    size = (config.height, None) if config.height else _own_size(folder)
    return Yolos(config, model, _class_index(model.config.id2label, config.target), size)


def full_size(config: Config) -> Yolos:
    """A published detector without weights, in which the class that is named is the first one."""
    check(config)
    told = YolosConfig(**size_of(config.checkpoint, _SIZES, _BASE), num_labels=_CLASSES)
    model = empty_from(YolosForObjectDetection, told, DTYPES[config.dtype])
    return Yolos(config, model, 0, (config.height or _PUBLISHED_HEIGHT, None))


class Yolos(PerFrameReward):
    """target: index of the class; size: height and width at which frames are looked at, None: as the frame's shape."""

    def __init__(
        self, config: Config, model: YolosForObjectDetection, target: int, size: tuple[int, int | None]
    ) -> None:
        super().__init__("yolos", config, [model])
        self.model = model
        self.target = target
        self.size = size
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
        height, width = self._fitted(*images_NCHW.shape[-2:])
        fitted = resize(images_NCHW, height, width, antialias=self.antialias, mode="bilinear")
        pixels = normalise(fitted, IMAGENET_NORM).to(self.model.device, self.model.dtype)
        return widened(self.model(pixel_values=pixels).logits).softmax(-1)

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        """The size to look at: whole patches."""
        patch = self.model.config.patch_size
        goal, fixed = self.size
        wide = fixed or goal * width / height
        return max(1, round(goal / patch)) * patch, max(1, round(wide / patch)) * patch

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


def _own_size(folder: Path) -> tuple[int, int | None]:
    """The fixed size that the folder's preprocessor names; a rule on the short side gives way to the published 512."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return _PUBLISHED_HEIGHT, None
    with reading("preprocessor configuration", path):
        size: Any = json.loads(path.read_text(encoding="utf-8")).get("size")
        if isinstance(size, dict) and {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
    return _PUBLISHED_HEIGHT, None
