"""ImageReward: parity with the original, its preprocessing against Pillow, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.beyond import image_reward
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.rewards._blip import build_text, build_vision
from vader_nodes.vader_backend.rewards._images import CLIP_NORM
from vader_nodes.vader_backend.rewards.imagereward import BlipReward

from .conftest import video
from .test_preprocessing import as_tensor, smooth_picture
from .tiny_beyond import blip_shapes, make, save_imagereward

FIXTURE = Path(__file__).parents[1] / "fixtures" / "imagereward.safetensors"
MEAN, STD = (torch.tensor(part)[:, None, None] for part in CLIP_NORM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_imagereward(tmp_path_factory.mktemp("x") / "imagereward")


@pytest.fixture(scope="module")
def reward(folder: Path) -> BlipReward:
    return make("imagereward", folder)


def test_it_equals_the_original_implementation() -> None:
    results = compare(read(FIXTURE), image_reward)
    assert {name for name, _, _ in results} == {"image_embeds", "reward"}
    assert all(good for _, _, good in results), results


@pytest.mark.parametrize("size", [(40, 40), (33, 50), (50, 33), (10, 13), (12, 90)])
def test_pixels_are_pillows(reward: BlipReward, size: tuple[int, int]) -> None:
    picture, goal = smooth_picture(*size), reward.network.vision.config.image_size
    height, width = (int(goal * side / min(size)) for side in size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - goal) / 2), round((height - goal) / 2)
    expected = (as_tensor(small.crop((left, top, left + goal, top + goal))) - MEAN) / STD
    assert float((reward.pixels(as_tensor(picture)) - expected).abs().max()) < 1.5 / 255 / float(STD.min())


def test_an_overlong_prompt_is_cut_off(reward: BlipReward) -> None:
    clip, long = video()[:1], " ".join(["red"] * 33)  # 35 tokens with start and end
    score = reward(clip, [long], [0, 1])
    assert torch.equal(reward(clip, [long + " circle" * 9], [0, 1]), score)
    assert not torch.equal(reward(clip, ["red"], [0, 1]), score)


def test_every_key_of_the_published_sizes_is_used() -> None:
    shapes = blip_shapes(width=1024, text=768, layers=12, side=14, patch=16)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    parts = {
        part: {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        for part in ("blip.visual_encoder.", "blip.text_encoder.")
    }
    seen = build_vision(parts["blip.visual_encoder."], Path("x")).config
    assert (seen.hidden_size, seen.num_attention_heads, seen.image_size, seen.patch_size) == (1024, 16, 224, 16)
    told = {"hidden_size": 768, "intermediate_size": 24, "num_attention_heads": 12, "num_hidden_layers": 12,
            "max_position_embeddings": 40, "vocab_size": 17, "encoder_width": 768}  # fmt: skip
    assert build_text(parts["blip.text_encoder."], told, 1024, Path("x")).config.encoder_hidden_size == 1024
    lacking = {k: v for k, v in parts["blip.visual_encoder."].items() if k != "blocks.3.attn.proj.bias"}
    with pytest.raises(InputError, match="missing: 1"):
        build_vision(lacking, Path("x"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ImageReward.pt", "no file .*ImageReward.pt"),
        ("med_config.json", "configuration in .*med_config.json"),
        ("vocab.txt", "vocab.txt; take the one of bert-base-uncased"),
    ],
)
def test_each_file_is_needed(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    for path in folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=message):
        make("imagereward", tmp_path)


def test_a_vocabulary_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text() + "word\nmore\n")
    with pytest.raises(InputError, match="19 words, but the network knows 17"):
        make("imagereward", tmp_path)
