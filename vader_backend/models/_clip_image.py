"""The CLIP picture features that Wan 2.1's image-to-video models look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..config import InputError
from ..loading import load_frozen, reading
from ._single_file import build_from, count_blocks, read_weights, shapes

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_DIM = 80
_PREFIX = "vision_model."
_MARK = "embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class CLIPImage:
    """A CLIP vision encoder, read before its last layer."""

    encoder: Any

    def encode(self, images: Tensor) -> Tensor:
        """States [B, tokens, D] in float32 of pictures [B, 3, H, W] in [0, 1]; the centre is cut out, as CLIP does."""
        side = self.encoder.config.image_size
        scale = side / min(images.shape[-2:])
        size = [max(side, int(length * scale)) for length in images.shape[-2:]]
        pictures = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        pictures = pictures[..., top : top + side, left : left + side]
        mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        parameter = next(self.encoder.parameters())
        pixels = ((pictures - mean) / std).to(parameter.device, parameter.dtype)
        return self.encoder(pixels, output_hidden_states=True).hidden_states[-2].float()


def is_image_encoder(path: Path, width: int) -> bool:
    """Whether a file holds a vision encoder of so many channels, under transformers' names."""
    return shapes(path).get(_PREFIX + _MARK, ())[:1] == (width,)


def read_image_encoder(path: str, dtype: torch.dtype) -> CLIPImage:
    """The vision encoder from a transformers folder or from a file with the same names in it.

    Raises:
        InputError: it is missing or of another kind.
    """
    if not path:
        raise InputError("This is an image-to-video model; set image_encoder to its CLIP vision encoder (ViT-H-14).")
    if Path(path).is_dir():
        return CLIPImage(load_frozen(CLIPVisionModel, Path(path), dtype, "image encoder"))
    tensors = read_weights(Path(path), dtype, "image encoder")
    tensors = {k.removeprefix(_PREFIX): v for k, v in tensors.items() if k.startswith(_PREFIX)}
    if _MARK not in tensors:
        raise InputError(f"{Path(path).name} is no CLIP vision encoder in transformers' layout; choose another file.")
    with reading("image encoder", Path(path)), init_empty_weights():
        config = _config(tensors)
        names = list(CLIPVisionModel(config).state_dict())
    named = {f"{_PREFIX}{k}" if names[0].startswith(_PREFIX) else k: v for k, v in tensors.items()}
    named = {key: tensor for key, tensor in named.items() if key in names or not key.endswith("position_ids")}
    return CLIPImage(build_from(CLIPVisionModel, config, named, dtype, "image encoder", Path(path)))


def _config(tensors: dict[str, Tensor]) -> CLIPVisionConfig:
    """Sizes from shapes; the layers' width, in heads of 80 channels, is ViT-H's."""
    width, _, patch, _ = tensors[_MARK].shape
    places = len(tensors["embeddings.position_embedding.weight"]) - 1
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=count_blocks(tensors, "encoder.layers."),
        num_attention_heads=max(1, width // _HEAD_DIM),
        image_size=round(places**0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
