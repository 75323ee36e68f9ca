"""Aesthetic V2.5: its score from transformers' own SigLIP, its preprocessing, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import SiglipModel, SiglipVisionModel
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.rewards.aesthetic_v25 import AestheticV25, load_tower

from .conftest import PROMPTS, video
from .test_preprocessing import as_tensor, smooth_picture
from .tiny_beyond import make, save_aesthetic_v25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_aesthetic_v25(tmp_path_factory.mktemp("x") / "aesthetic_v25")


@pytest.fixture(scope="module")
def reward(folder: Path) -> AestheticV25:
    return make("aesthetic_v25", folder)


def test_score_is_the_head_on_unit_features_of_transformers_own_model(reward: AestheticV25, folder: Path) -> None:
    frames = video(1, 16, 16)
    model = SiglipModel.from_pretrained(folder / "siglip").eval()
    features = model.vision_model(pixel_values=frames[:, 0] * 2 - 1).pooler_output
    score = features / features.norm(dim=-1, keepdim=True)
    head = torch.load(folder / "head.pth", weights_only=True)
    for place in (0, 2, 4, 6, 8):
        score = score @ head[f"scoring_head.{place}.weight"].T + head[f"scoring_head.{place}.bias"]
    torch.testing.assert_close(reward(frames, PROMPTS, [0]), score[:, 0])


@pytest.mark.parametrize("size", [(40, 40), (33, 50), (50, 33), (10, 12)])
def test_pixels_are_those_of_siglips_processor(reward: AestheticV25, size: tuple[int, int]) -> None:
    picture = smooth_picture(*size)
    expected = as_tensor(picture.resize((16, 16), Image.Resampling.BICUBIC)) * 2 - 1
    assert float((reward.pixels(as_tensor(picture)) - expected).abs().max()) < 1.5 / 255 * 2
    own = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = own.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    theirs = processor(picture, return_tensors="pt").pixel_values
    assert float((reward.pixels(as_tensor(picture)) - theirs).abs().max()) < 1.5 / 255 * 2


def test_the_tower_alone_loads_as_well(reward: AestheticV25, folder: Path, tmp_path: Path) -> None:
    whole = SiglipModel.from_pretrained(folder / "siglip")
    alone = SiglipVisionModel(whole.config.vision_config)
    target = getattr(alone, "vision_model", alone)
    target.load_state_dict(whole.vision_model.state_dict())
    alone.save_pretrained(tmp_path / "alone")
    for name, tensor in load_tower(tmp_path / "alone").state_dict().items():
        assert torch.equal(tensor, reward.tower.state_dict()[name])


def test_heads_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    head = torch.load(folder / "head.pth", weights_only=True)
    cases = {
        "scoring_head": {**head, "layers.0.weight": torch.zeros(3, 3)},
        "16 wide": {**head, "scoring_head.0.weight": torch.zeros(12, 8)},
        "another shape": {**head, "scoring_head.4.weight": torch.zeros(8, 11)},
        "lacks 6.weight": {name: tensor for name, tensor in head.items() if name != "scoring_head.6.weight"},
        "2 numbers": {**head, "scoring_head.8.weight": torch.zeros(2, 6), "scoring_head.8.bias": torch.zeros(2)},
    }
    (tmp_path / "siglip").symlink_to(folder / "siglip")
    for message, tensors in cases.items():
        torch.save(tensors, tmp_path / "head.pth")
        with pytest.raises(InputError, match=message):
            make("aesthetic_v25", tmp_path)
