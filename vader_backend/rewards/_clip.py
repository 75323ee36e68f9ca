"""CLIP as the rewards on it share it, frozen and differentiable down to the pixels; and its cosine as a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..config import check, option
from ..loading import DTYPES, build_frozen, empty_from, load_frozen, read_tensors, reading
from ..open_clip import clip_config, clip_weights, read_tokenizer, section, tokenizer_beside
from ..stand_in import size_of
from ..stand_in import tokenizer as stand_in_tokenizer
from ._clip_sizes import SIZES, VIT_H14
from ._fit import FITS
from ._images import CLIP_NORM, ImageConfig, PerFrameReward, normalise, precision, widened

CLIP_MARKERS = {"checkpoint": ("config.json", "")}  # a folder or a file


def fit() -> str:
    """A field for how frames come into the network's square."""
    return option(
        "squash",
        "squash: frames are stretched to the square, as in the published VADER code; crop: the edges of the longer "
        "side are cut off, as by CLIP's own processor; pad: black bars are added, as by the official HPS scorer.",
        choices=tuple(FITS),
    )


def tokenizer() -> str:
    """A field for the tokenizer of a checkpoint that is a single file."""
    return option("", "Folder with CLIP's vocab.json and merges.txt; empty: the one that lies beside the checkpoint.")


@dataclass(frozen=True)
class ClipConfig(ImageConfig):
    """Fields of the rewards that are a cosine of CLIP; each gives `checkpoint` its own default."""

    fit: str = fit()
    tokenizer: str = tokenizer()
    dtype: str = precision()


class ScaledClip(CLIPModel):
    """CLIPModel whose logit scale is exact in half precision too."""

    _keep_in_fp32_modules: ClassVar = ["logit_scale"]


class Clip:
    """A network and its tokenizer; `fit` is how a picture becomes a square, one of FITS."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, fit: str = "squash") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fit = fit
        self._texts: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Of the features."""
        return int(self.model.config.projection_dim)

    def pixels(self, images_NCHW: Tensor) -> Tensor:
        """What the vision tower takes, of pictures in [0, 1] of any size."""
        fitted = FITS[self.fit](images_NCHW, self.model.config.vision_config.image_size)
        return normalise(fitted, CLIP_NORM)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """[N, width] of any length, in float32 or better."""
        weight = self.model.visual_projection.weight
        pooled = self.model.vision_model(pixels.to(weight.device, weight.dtype)).pooler_output
        return widened(self.model.visual_projection(pooled))

    def embed_tokens(self, tokens_NL: Tensor) -> Tensor:
        """[N, width] of any length, in float32 or better."""
        pooled = self.model.text_model(input_ids=tokens_NL.to(self.model.device)).pooler_output
        return widened(self.model.text_projection(pooled))

    def image_features(self, images_NCHW: Tensor) -> Tensor:
        """[N, width] of unit length; gradient reaches the pixels."""
        return F.normalize(self.embed_pixels(self.pixels(images_NCHW)), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[N, width] of unit length, without gradient; each text is encoded once, its overlong end cut off."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts |= dict(zip(new, self._encode(new), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts]).to(self.model.device)

    def similarity(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [N] between each picture and its own prompt."""
        return self.cosine(self.pixels(images_NCHW), prompts)

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [N] of what the vision tower takes, fitted and normalised, and each one's own prompt."""
        return (F.normalize(self.embed_pixels(pixels), dim=-1) * self.text_features(prompts)).sum(-1)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        return F.normalize(self.embed_tokens(tokens.input_ids), dim=-1)


class ClipReward(PerFrameReward):
    """The cosine of each picture and its own prompt, without the logit scale."""

    def __init__(self, name: str, config: ClipConfig, clip: Clip) -> None:
        super().__init__(name, config, [clip.model])
        self.clip = clip

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.similarity(images_NCHW, prompts)


def empty_clip(config: Any, otherwise: Mapping[str, Any] = VIT_H14) -> Clip:
    """A published CLIP without weights, of the size that the checkpoint's name tells.

    Args:
        config: a reward's, with checkpoint, fit and dtype.
        otherwise: the size where the name tells none.
    """
    check(config)
    size = size_of(config.checkpoint, SIZES, otherwise)
    model = empty_from(ScaledClip, CLIPConfig(**size), DTYPES[config.dtype])
    return Clip(model, stand_in_tokenizer(model.config.text_config.max_position_embeddings), config.fit)


def read_clip(config: ClipConfig, locate: Callable[[str], Path]) -> Clip:
    """Load the network that a Config names: a folder in transformers' layout, or a file in open_clip's.

    Raises:
        InputError: a setting is out of range, or the checkpoint or its tokenizer is missing, truncated or another one.
    """
    check(config)
    path, dtype = locate(config.checkpoint), DTYPES[config.dtype]
    folder = locate(config.tokenizer) if config.tokenizer else None
    if path.is_file():
        return load_open_clip(path, config.fit, dtype, folder)
    return load_clip(path, config.fit, dtype, folder)


def load_clip(
    folder: Path, fit: str = "squash", dtype: torch.dtype = torch.float32, tokenizer: Path | None = None
) -> Clip:
    """Load a CLIPModel and its tokenizer, by default the one in the same folder.

    Raises:
        InputError: the folder is missing, truncated, lacks weights or holds another kind of network.
    """
    model = load_frozen(ScaledClip, folder, dtype, "CLIP model")
    own = folder if (folder / "tokenizer.json").is_file() else tokenizer_beside(folder / "config.json")
    source = tokenizer or own
    with reading("tokenizer", source or folder):
        if source is None:
            raise ValueError("it has neither vocab.json nor tokenizer.json")
        return Clip(model, CLIPTokenizer.from_pretrained(source, local_files_only=True), fit)


def load_open_clip(
    path: Path, fit: str = "squash", dtype: torch.dtype = torch.float32, tokenizer: Path | None = None
) -> Clip:
    """Load a CLIP from a file in open_clip's layout (.pt, .pth, .safetensors), with exact GELU as in ViT-H-14.

    Raises:
        InputError: the file is missing, truncated or of another kind, or it has no tokenizer.
    """
    model = build_open_clip(read_tensors(path, "CLIP model"), dtype, path)
    vocabulary = model.config.text_config.vocab_size
    return Clip(model, read_tokenizer(path, tokenizer, vocabulary, path.name), fit)


def build_open_clip(
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    source: Path,
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> ScaledClip:
    """The frozen network around tensors under open_clip's keys: text at the top level, pictures under `visual.`.

    Raises:
        InputError: a tensor is missing, left over or misshapen.
    """
    with reading("CLIP model", source):
        vision = section(tensors, "visual.")
        text = {key: tensor for key, tensor in tensors.items() if not key.startswith(("visual.", "logit_scale"))}
        config = clip_config(vision, text, vision_heads=vision_heads, text_heads=text_heads)
        named = clip_weights(vision, text, tensors["logit_scale"])
    return build_frozen(lambda: ScaledClip(config), named, dtype, "CLIP model", source, kept=("logit_scale",))
