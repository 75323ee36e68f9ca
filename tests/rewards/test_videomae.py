"""The action reward: which class a prompt names, the score against transformers' own, the preprocessing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VideoMAEForVideoClassification
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.rewards.videomae import _names, _phrases

from .conftest import video
from .test_preprocessing import smooth_picture
from .video_networks import ACTIONS, FRAMES, LABELS, SIZE, build, save_videomae

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSOR = {**IMAGENET, "size": {"shortest_edge": 40}, "crop_size": {"height": SIZE, "width": SIZE}, "resample": 2}
LEVEL = 1.001 / 255 / min(IMAGENET["image_std"])  # Pillow rounds to whole levels after each of two passes


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("videomae")
    save_videomae(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("a cat riding a bike", "riding a bike"),
        ("A dog is Playing the Guitar.", "playing guitar"),
        ("a bear playing bass guitar on a stage", "playing bass guitar"),
        ("playing chess", "playing chess"),
        ("a fox jogging while a dog is playing chess", "playing chess"),
    ],
)
def test_the_longest_class_that_a_prompt_names(classifier: Path, prompt: str, label: str) -> None:
    assert build("videomae", classifier).target(prompt) == LABELS.index(label)


def test_a_prompt_that_names_no_class_is_told_the_nearest(classifier: Path) -> None:
    reward = build("videomae", classifier)
    with pytest.raises(InputError, match=r"names none of the 6 actions.* did you mean 'eating doughnuts' or"):
        reward(video(FRAMES), ("a person eating donuts", "a cat jogging"), range(FRAMES))
    with pytest.raises(InputError, match=r"'a bike riding cat' names none.* did you mean 'riding a bike' or"):
        reward.target("a bike riding cat")


def test_keywords_name_classes_and_are_checked(classifier: Path) -> None:
    told = build("videomae", classifier, keywords="donuts = eating doughnuts\n\n bike=Riding a Bike")
    assert told.target("a person with donuts") == LABELS.index("eating doughnuts")
    assert told.target("a bike") == LABELS.index("riding a bike")
    with pytest.raises(InputError, match="must read like"):
        build("videomae", classifier, keywords="donuts")
    with pytest.raises(
        InputError, match=r"keywords names the class 'eating', which .* did you mean 'eating doughnuts'"
    ):
        build("videomae", classifier, keywords="donuts = eating")


def test_one_action_for_all_videos(classifier: Path) -> None:
    fixed, clip = build("videomae", classifier, action=" Jogging "), video(FRAMES)
    named = build("videomae", classifier)(clip, ("jogging", "jogging"), range(FRAMES))
    torch.testing.assert_close(fixed(clip, ("anything", "a cat"), range(FRAMES)), named)
    with pytest.raises(InputError, match=r"action names the class 'joging', which .* did you mean 'jogging'"):
        build("videomae", classifier, action="joging")


def test_what_stands_in_brackets_need_not_be_said_but_counts() -> None:
    classes = {"passing football (in game)": 0, "passing football (not in game)": 1}
    phrases = _phrases(classes, "")
    assert [index for name, index in phrases.items() if _names("a bear passing a football", name)] == [0]
    assert phrases["passing football (not in game)"] == 1
    assert _names("passing football (not in game)", "passing football (not in game)")


@pytest.mark.parametrize("frames", [FRAMES, 2, 8])
def test_score_is_that_of_transformers_model(classifier: Path, frames: int) -> None:
    model = VideoMAEForVideoClassification.from_pretrained(classifier, num_frames=frames)
    reward, clip = build("videomae", classifier, frames=frames, fit="squash"), video(frames, SIZE, SIZE)
    mean, std = (torch.tensor(IMAGENET[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        output = model(pixel_values=(clip - mean) / std)
    parts = reward.parts(clip, ACTIONS, range(frames))
    losses = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
    torch.testing.assert_close(parts["videomae"], -losses)
    torch.testing.assert_close(parts["videomae probability"], output.logits.softmax(-1)[[0, 1], labels])
    assert float(losses.max() - losses.min()) > 0.1


def test_squash_shows_the_whole_frame(classifier: Path) -> None:
    picture = smooth_picture(48, 80)
    squashed = build("videomae", classifier, fit="squash").view
    small = np.array(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255
    expected = (small - IMAGENET["image_mean"]) / IMAGENET["image_std"]
    got = squashed(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)[None, None])
    assert np.abs(got[0, 0].permute(1, 2, 0).numpy() - expected).max() < LEVEL


def test_a_damaged_processor_file_is_refused(classifier: Path, tmp_path: Path) -> None:
    for path in classifier.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(InputError, match=r"preprocessor configuration .* cannot be read"):
        build("videomae", tmp_path)
