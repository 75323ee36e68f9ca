"""How well single frames fit their prompt and please people: ImageReward, a BLIP network with a head on its text side.

Source: Xu et al. 2023, repository THUDM/ImageReward. Scores of people's pictures have mean 0 and deviation 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertTokenizer

from ..config import InputError, check, option
from ..loading import DTYPES, read_tensors, reading
from ..mini.files import locate as embedded
from ..stand_in import tokenizer as stand_in_tokenizer
from ._blip import build_text, build_vision, empty_towers
from ._fit import crop
from ._images import CLIP_NORM, ImageConfig, PerFrameReward, normalise, precision, widened
from ._linear_head import build_head, empty_head

TITLE = "ImageReward"
_CONFIG = "med_config.json"
MARKERS = {"checkpoint": _CONFIG}
_FILES = ("ImageReward.safetensors", "ImageReward.pt")
_TOKENS = 35
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the published scores


@dataclass(frozen=True)
class Config(ImageConfig):
    """checkpoint: a folder of ImageReward's files and of BERT's vocabulary."""

    checkpoint: str = option(
        "mini/imagereward",
        "Folder with ImageReward.pt and med_config.json of THUDM/ImageReward, and vocab.txt of bert-base-uncased.",
    )
    dtype: str = precision()


def build(config: Config, locate: Callable[[str], Path] = embedded) -> BlipReward:
    """Load the network and the tokenizer.

    Raises:
        InputError: a file is missing, truncated or of another kind.
    """
    check(config)
    folder = locate(config.checkpoint)
    path = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[-1])
    with reading("configuration", folder / _CONFIG):
        told = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    network = build_network(read_tensors(path, "ImageReward checkpoint"), told, path).to(DTYPES[config.dtype])
    return BlipReward(config, network, _tokenizer(folder, network.text.config.vocab_size))


def full_size(config: Config) -> BlipReward:
    """The published network without weights."""
    check(config)
    vision, text = empty_towers()
    network = ImageRewardNetwork(vision, text, empty_head(text.config.hidden_size)).eval().to(DTYPES[config.dtype])
    return BlipReward(config, network, stand_in_tokenizer(_TOKENS))


class ImageRewardNetwork(nn.Module):
    """The picture is read by the text tower, whose first token the head scores."""

    def __init__(self, vision: Any, text: Any, head: nn.Sequential) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head

    def forward(self, pixels_NCHW: Tensor, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """[N]; the mask is 1 where there is a token and 0 behind the text's end."""
        return self.read(self.look(pixels_NCHW), ids_NL, mask_NL)

    def look(self, pixels_NCHW: Tensor) -> Tensor:
        """The picture tower's features, [N, 1 + patches, width]."""
        return self.vision(pixels_NCHW).last_hidden_state

    def read(self, seen_NLD: Tensor, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """The score [N] of texts on pictures of these features."""
        read = self.text(input_ids=ids_NL, attention_mask=mask_NL, encoder_hidden_states=seen_NLD).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - _MEAN) / _STD


def build_network(tensors: Mapping[str, Tensor], told: Mapping[str, Any], source: Path) -> ImageRewardNetwork:
    """The network of a checkpoint's tensors and its med_config.json; BLIP's unused projections are left out.

    Raises:
        InputError: tensors are missing or of another shape.
    """
    vision = build_vision(_under("blip.visual_encoder.", tensors, source), source)
    text = build_text(_under("blip.text_encoder.", tensors, source), told, vision.config.hidden_size, source)
    head = build_head(_under("mlp.layers.", tensors, source), text.config.hidden_size, "ImageReward head", source)
    return ImageRewardNetwork(vision, text, head).eval()


class BlipReward(PerFrameReward):
    """See the module."""

    def __init__(self, config: Config, network: ImageRewardNetwork, tokenizer: BertTokenizer) -> None:
        super().__init__("imagereward", config, [network])
        self.network = network
        self.tokenizer = tokenizer

    def images(self, images_NCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.pixels(images_NCHW)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(pixels.device)
        return widened(self.network(pixels, tokens.input_ids, tokens.attention_mask))

    @property
    def limit(self) -> int:
        """The number of tokens that a prompt is cut to."""
        return min(_TOKENS, self.network.text.config.max_position_embeddings)

    def pixels(self, images_NCHW: Tensor) -> Tensor:
        """What the picture tower takes: as torchvision's Resize of a picture's short side, and CenterCrop."""
        weight = next(self.network.parameters())
        fitted = crop(images_NCHW, self.network.vision.config.image_size, halve=round)
        return normalise(fitted, CLIP_NORM).to(weight.device, weight.dtype)


def _under(prefix: str, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        raise InputError(f"{path.name} is not an ImageReward checkpoint: it holds nothing under {prefix}*.")
    return found


def _tokenizer(folder: Path, known: int) -> BertTokenizer:
    with reading("tokenizer", folder):
        if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            raise ValueError("it has no vocab.txt; take the one of bert-base-uncased")
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) > known:
            raise ValueError(f"its vocabulary has {len(tokenizer)} words, but the network knows {known}")
    return tokenizer
