"""How pleasing single frames look, about 1 to 10: Aesthetic Predictor V2.5 on SigLIP image features.

The files are those of google/siglip-so400m-patch14-384 and of the repository discus0434/aesthetic-predictor-v2-5,
whose head takes features of unit length. Above 5.5 it calls a picture good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from ..config import InputError, check, option
from ..loading import DTYPES, build_empty, build_frozen, read_tensors, reading
from ..mini.files import locate as embedded
from ._fit import scaled
from ._images import ImageConfig, PerFrameReward, normalise, precision, widened
from ._linear_head import build_head, empty_head

TITLE = "Aesthetic V2.5"
MARKERS = {"checkpoint": "config.json", "head": ""}
HUB = {"checkpoint": ("google/siglip-so400m-patch14-384",)}
_NORM = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_HEAD = "scoring_head."
_VISION = "vision_model."
_OTHERS = ("text_model.", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class Config(ImageConfig):
    """checkpoint: SigLIP; head: the predictor on its features."""

    checkpoint: str = option(
        "mini/aesthetic_v25/siglip", "SigLIP whose image features are judged: google/siglip-so400m-patch14-384."
    )
    head: str = option("mini/aesthetic_v25/head.safetensors", "The predictor: aesthetic_predictor_v2_5.pth.")
    dtype: str = precision()


def build(config: Config, locate: Callable[[str], Path] = embedded) -> AestheticV25:
    """Load SigLIP's vision tower and the head.

    Raises:
        InputError: a file is missing, truncated or of another kind, or the two do not fit together.
    """
    check(config)
    tower = load_tower(locate(config.checkpoint), DTYPES[config.dtype])
    path = locate(config.head)
    found = read_tensors(path, "aesthetic head")
    if any(not name.startswith(_HEAD) for name in found):
        raise InputError(f"{path.name} is not the head of Aesthetic V2.5, which holds scoring_head.0 to 8 alone.")
    tensors = {name.removeprefix(_HEAD): tensor for name, tensor in found.items()}
    return AestheticV25(config, tower, build_head(tensors, tower.config.hidden_size, "aesthetic head", path))


def full_size(config: Config) -> AestheticV25:
    """The published networks without weights."""
    check(config)
    tower = build_empty(lambda: new_tower(SiglipVisionConfig(**_SO400M)), DTYPES[config.dtype])
    return AestheticV25(config, tower, empty_head(tower.config.hidden_size))


class AestheticV25(PerFrameReward):
    """See the module."""

    def __init__(self, config: Config, tower: Any, head: nn.Sequential) -> None:
        super().__init__("aesthetic_v25", config, [tower, head])
        self.tower = tower
        self.head = head

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        features = widened(self.tower(self.pixels(images_NCHW)).pooler_output)
        return self.head(F.normalize(features, dim=-1)).squeeze(-1)

    def pixels(self, images_NCHW: Tensor) -> Tensor:
        """What the tower takes, as SigLIP's own processor makes it: squashed, bicubic, in [-1, 1]."""
        weight = next(self.tower.parameters())
        size = self.tower.config.image_size
        return normalise(scaled(images_NCHW, size, size), _NORM).to(weight.device, weight.dtype)


def load_tower(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """SigLIP's vision tower from the folder of the whole model, or of the tower alone.

    Raises:
        InputError: the folder is missing, truncated or of another kind.
    """
    what = "SigLIP model"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"There is no {what} with .safetensors files in {folder}; download the whole checkpoint.")
    with reading(what, folder):
        config = SiglipVisionConfig.from_pretrained(folder, local_files_only=True)
    found = {name: tensor for file in files for name, tensor in read_tensors(file, what).items()}
    tensors = {name.removeprefix(_VISION): found[name] for name in found if not name.startswith(_OTHERS)}
    return build_frozen(lambda: new_tower(config), tensors, dtype, what, folder)


def new_tower(config: SiglipVisionConfig) -> Any:
    """The tower without the wrapper that transformers had around it before version 5."""
    model = SiglipVisionModel(config)
    return getattr(model, "vision_model", model)
