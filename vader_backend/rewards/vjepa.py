"""How well parts of a video follow from the rest: minus V-JEPA's masked feature prediction loss.

Source: Bardes et al. 2024; VADER takes it for temporal consistency. The original checkpoints of
facebookresearch/jepa and V-JEPA 2 in transformers' layout serve alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from ..config import InputError, check, option
from ..loading import DTYPES, build_empty, empty_from, load_frozen, read_tensors, reading
from ..mini.files import locate as embedded
from ..rng import generator
from ..stand_in import size_of
from ._images import widened
from ._videos import VideoConfig, View, WholeVideoReward, as_processor, frame_count
from ._vjepa import Grid, Vjepa, take
from ._vjepa2 import Vjepa2
from ._vjepa_masks import Blocks, Mask, draw
from ._vjepa_original import PARTS, VIT_L16, VIT_SIZES, build_vjepa, new_vjepa

TITLE = "V-JEPA"
HUB = {"checkpoint": ("facebook/vjepa2-vitl-fpc64-256",)}
_VJEPA2 = "vjepa2"
# Arguments of VJEPA2Config, whose defaults are those of ViT-L.
_VJEPA2_SIZES: dict[str, dict[str, Any]] = {
    "vith": {"hidden_size": 1280, "num_hidden_layers": 32},
    "vitg": {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22, "mlp_ratio": 48 / 11},
}


@dataclass(frozen=True)
class Config(VideoConfig):
    """The published masks are of two settings, many small blocks and few large ones; the mean over all counts."""

    checkpoint: str = option(
        "mini/vjepa/vjepa.safetensors",
        "vitl16.pth.tar or vith16.pth.tar of V-JEPA, or model.safetensors of V-JEPA 2 beside its config.json.",
    )
    masks: int = option(1, "How many masks are drawn with each setting; more cost more time.", low=1, high=64)
    mask_seed: int = option(0, "Which masks are drawn. All videos share them, so that scores compare.", low=0)
    small_blocks: int = option(8, "Blocks of a mask of the first setting; 0: none of these masks.", low=0, high=64)
    small_scale: float = option(0.15, "Share of the frame that each of them covers.", low=0.01, high=0.9, step=0.01)
    large_blocks: int = option(2, "Blocks of a mask of the second setting; 0: none of these masks.", low=0, high=64)
    large_scale: float = option(0.7, "Share of the frame that each of them covers.", low=0.01, high=0.9, step=0.01)
    min_aspect: float = option(
        0.75, "Height of a block, divided by its width: at least.", low=0.1, high=10.0, step=0.05
    )
    max_aspect: float = option(1.5, "Height of a block, divided by its width: at most.", low=0.1, high=10.0, step=0.05)
    target_gradient: bool = option(
        True,
        "on: the gradient is that of the score; off: as in V-JEPA's own training, the features to predict count as "
        "given, so that the gradient reaches what is seen only.",
    )

    def blocks(self) -> list[Blocks]:
        """The settings, by number."""
        aspect = (self.min_aspect, self.max_aspect)
        return [
            Blocks(self.small_blocks, self.small_scale, aspect),
            Blocks(self.large_blocks, self.large_scale, aspect),
        ]


def build(config: Config, locate: Callable[[str], Path] = embedded) -> VjepaReward:
    """Load the networks and draw the masks.

    Raises:
        InputError: the checkpoint is missing, truncated or of another kind, or the masks hide everything or nothing.
    """
    _check(config)
    network, folder = _load(locate(config.checkpoint), DTYPES[config.dtype])
    return _assembled(config, network, folder)


def full_size(config: Config) -> VjepaReward:
    """The published networks without weights: V-JEPA 2's where the checkpoint's name tells it, else V-JEPA's."""
    _check(config)
    name, dtype = config.checkpoint, DTYPES[config.dtype]
    if _VJEPA2 in name.lower():
        told = VJEPA2Config(**size_of(name, _VJEPA2_SIZES, {}), crop_size=384 if "384" in name else 256)
        return _assembled(config, Vjepa2(empty_from(VJEPA2Model, told, dtype)).eval())
    return _assembled(config, build_empty(lambda: new_vjepa(size_of(name, VIT_SIZES, VIT_L16)), dtype))


def _check(config: Config) -> None:
    check(config)
    if not config.small_blocks and not config.large_blocks:
        raise InputError("small_blocks and large_blocks are both 0, so there is nothing to predict; set one above 0.")
    if config.min_aspect > config.max_aspect:
        raise InputError(f"min_aspect is {config.min_aspect}, above max_aspect; set it to {config.max_aspect} or less.")


def _assembled(config: Config, network: Vjepa | Vjepa2, folder: Path | None = None) -> VjepaReward:
    """Args:
    folder: the one that may hold a processor's configuration.
    """
    (tubelet, patch), (frames, size) = network.cell, network.video
    count = frame_count(config.frames, frames, tubelet)
    view = View(size, size * 256 // 224, config.fit)
    if folder is not None:
        view = as_processor(view, folder / "video_preprocessor_config.json")
    return VjepaReward(
        config, network, view, count, _masks(config, Grid(count // tubelet, size // patch, size // patch))
    )


class VjepaReward(WholeVideoReward):
    """See the module."""

    def __init__(self, config: Config, network: Vjepa | Vjepa2, view: View, count: int, masks: Sequence[Mask]) -> None:
        super().__init__("vjepa", config, network, view, count)
        self.predictive = network
        self.masks = masks
        self.target_gradient = config.target_gradient

    def scores(self, pixels_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        clips = pixels_BTCHW.transpose(1, 2)
        with torch.set_grad_enabled(self.target_gradient and torch.is_grad_enabled()):
            targets = self.predictive.targets(clips)
        losses = [self._loss(clips, targets, mask) for mask in self.masks]
        return {self.name: -torch.stack(losses).mean(0)}

    def _loss(self, clips_BCTHW: Tensor, targets_BND: Tensor, mask: Mask) -> Tensor:
        seen, hidden = (
            places.to(clips_BCTHW.device).expand(len(clips_BCTHW), -1) for places in (mask.seen_K, mask.hidden_M)
        )
        return distance(self.predictive.predict(clips_BCTHW, seen, hidden, mask.kind), take(targets_BND, hidden))


def distance(predicted_BMD: Tensor, target_BMD: Tensor, exponent: float = 1.0) -> Tensor:
    """[B]: the mean distance of the features, in float32 or better; the published exponent is 1."""
    gap = (widened(predicted_BMD) - widened(target_BMD)).abs()
    return (gap if exponent == 1 else gap**exponent / exponent).mean((1, 2))


def _masks(config: Config, grid: Grid) -> list[Mask]:
    return [
        draw(blocks, grid, kind, generator(config.mask_seed, "V-JEPA mask", kind, number))
        for number in range(config.masks)
        for kind, blocks in enumerate(config.blocks())
        if blocks.count
    ]


def _load(path: Path, dtype: torch.dtype) -> tuple[Vjepa | Vjepa2, Path]:
    """The networks of a file or a folder, and the folder that may hold a processor's configuration."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or _is_transformers(folder):
        return Vjepa2(load_frozen(VJEPA2Model, folder, dtype, "V-JEPA 2 model")).eval(), folder
    tensors = read_tensors(path, "V-JEPA checkpoint", PARTS)
    missing = [part for part in PARTS if not any(key.startswith(f"{part}/") for key in tensors)]
    if missing:
        raise InputError(
            f"{path.name} is not a V-JEPA checkpoint: those hold encoder, predictor and target_encoder, "
            f"but it lacks {', '.join(missing)}."
        )
    return build_vjepa(tensors, path, dtype), folder


def _is_transformers(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    with reading("configuration", path):
        return bool(json.loads(path.read_text(encoding="utf-8")).get("model_type") == _VJEPA2)
