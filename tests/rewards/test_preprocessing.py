"""Preprocessing against Pillow, which the published processors stand on, and the scores against plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vader_nodes.vader_backend.rewards._clip import load_clip
from vader_nodes.vader_backend.rewards._images import CLIP_NORM

from .conftest import HEIGHT_FIRST, PROMPTS, video

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as ImageProcessor

MEAN, STD = (torch.tensor(part)[:, None, None] for part in CLIP_NORM)


def smooth_picture(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [0.5 + 0.3 * np.sin(5 * x + 3 * y + phase) for phase in (0.0, 1.0, 2.0)]
    return Image.fromarray((np.stack(waves, -1) * 255).round().astype("uint8"))


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", [(40, 40), (33, 50), (50, 33), (10, 12)])
def test_squash_is_pillows_bilinear(folder: Path, size: tuple[int, int]) -> None:
    picture = smooth_picture(*size)
    expected = (as_tensor(picture.resize((16, 16), Image.Resampling.BILINEAR)) - MEAN) / STD
    got = load_clip(folder / "clip", "squash").pixels(as_tensor(picture))
    assert float((got - expected).abs().max()) < 1.5 / 255 / float(STD.min())


@pytest.mark.parametrize(("size", "scaled"), [((40, 40), (16, 16)), ((33, 50), (16, 24)), ((50, 33), (24, 16))])
def test_crop_keeps_the_shape_and_cuts_the_centre(folder: Path, size: tuple[int, int], scaled: tuple[int, int]) -> None:
    picture = smooth_picture(*size)
    top, left = (scaled[0] - 16) // 2, (scaled[1] - 16) // 2
    small = as_tensor(picture.resize(scaled[::-1], Image.Resampling.BICUBIC))
    expected = (small[..., top : top + 16, left : left + 16] - MEAN) / STD
    got = load_clip(folder / "clip", "crop").pixels(as_tensor(picture))
    assert float((got - expected).abs().max()) < 1.5 / 255 / float(STD.min())


def noise(height: int, width: int) -> Image.Image:
    """Black and white all over, where bicubic waves would leave the range."""
    rng = np.random.default_rng(4)
    return Image.fromarray((rng.integers(0, 2, (height, width, 3)) * 255).astype("uint8"))


height_first = pytest.mark.skipif(not HEIGHT_FIRST, reason="before version 13 Pillow scales the width first")


@pytest.mark.parametrize(
    "size",
    [(16, 16), (40, 40), (33, 50), (50, 33), (17, 24), (10, 12), (12, 10), (9, 61), (61, 9), (8, 16), (25, 90),
     pytest.param((90, 25), marks=height_first), pytest.param((301, 97), marks=height_first)],
)  # fmt: skip
@pytest.mark.parametrize("draw", [smooth_picture, noise])
def test_crop_equals_the_networks_own_processor(
    folder: Path, draw: Callable[[int, int], Image.Image], size: tuple[int, int]
) -> None:
    picture = draw(*size)
    processor = ImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = processor(picture, return_tensors="pt").pixel_values
    got = load_clip(folder / "clip", "crop").pixels(as_tensor(picture))
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 1.5 / 255 / float(STD.min())


def in_floats(picture: Image.Image, height: int, width: int) -> Tensor:
    """Resized by Pillow's bicubic waves, without bringing them back into the range of pictures."""
    channels = [Image.fromarray(plane) for plane in as_tensor(picture)[0].numpy()]
    return torch.stack([torch.tensor(np.array(c.resize((width, height), Image.Resampling.BICUBIC))) for c in channels])


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((40, 40), (16, 16)), ((33, 50), (11, 16)), ((50, 26), (16, 8)), ((7, 5), (16, 11)), ((9, 300), (1, 16))],
)
@pytest.mark.parametrize("draw", [smooth_picture, noise])
def test_pad_lays_the_picture_on_black_as_the_official_scorer(
    folder: Path, draw: Callable[[int, int], Image.Image], size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    picture = draw(*size)
    top, left = (16 - scaled[0]) // 2, (16 - scaled[1]) // 2
    expected = torch.zeros(1, 3, 16, 16)
    expected[..., top : top + scaled[0], left : left + scaled[1]] = in_floats(picture, *scaled)
    got = load_clip(folder / "clip", "pad").pixels(as_tensor(picture))
    torch.testing.assert_close(got, (expected - MEAN) / STD, rtol=0, atol=1e-4)


def test_scores_are_cosines_of_the_transformers_model(folder: Path, make: Callable[..., Any]) -> None:
    reward, clip = make("hps"), load_clip(folder / "clip")
    frames = video(1, 16, 16)
    tokens = clip.tokenizer(list(PROMPTS), padding=True, truncation=True, max_length=12, return_tensors="pt")
    output = clip.model(**tokens, pixel_values=(frames[:, 0] - MEAN) / STD)
    torch.testing.assert_close(reward(frames, PROMPTS, [0]), (output.image_embeds * output.text_embeds).sum(1))
    torch.testing.assert_close(make("pickscore")(frames, PROMPTS, [0]), output.logits_per_image.diagonal())
