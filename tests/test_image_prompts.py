"""Start images: where they come from, their captions and split, and how they reach a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.generate import start_images
from vader_nodes.vader_backend.mini.oracle import read
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, UNSEEN_SCENES
from vader_nodes.vader_backend.prompts import PromptSet, images
from vader_nodes.vader_backend.prompts.images import Config, build
from vader_nodes.vader_backend.types import VideoSpec


def none(name: str) -> Path:
    raise AssertionError(f"nobody asked for the folder {name}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, color in enumerate(("red", "lime", "blue", "white")):
        Image.new("RGB", (20 + number, 10), color).save(tmp_path / f"{number}_{color}.png")
    (tmp_path / "2_blue.txt").write_text("the sea,\nat noon\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_mini_images_show_what_their_captions_say() -> None:
    prompts = build(Config(), none)
    assert prompts.train == tuple(scene.caption for scene in SEEN_SCENES)
    assert prompts.held_out == tuple(scene.caption for scene in UNSEEN_SCENES)
    assert len(prompts.images) == len(prompts.texts)
    first = prompts.train_images[0]
    for reading, scene in zip(read(torch.stack(prompts.images)[:, None]), SEEN_SCENES + UNSEEN_SCENES, strict=True):
        assert (reading.color, reading.shape, reading.background) == (scene.color, scene.shape, scene.background)
    assert torch.equal(first, build(Config(), none).train_images[0])
    assert not torch.equal(first, build(Config(seed=1), none).train_images[0])


def test_a_folder_gives_pictures_with_captions(folder: Path) -> None:
    prompts = build(Config(source="folder", folder="pictures", held_out_fraction=0.25), lambda name: folder)
    assert sorted(prompts.texts) == ["0 red", "1 lime", "3 white", "the sea, at noon"]
    assert (len(prompts.train), len(prompts.held_out)) == (3, 1)
    for text, image in zip(prompts.texts, prompts.images, strict=True):
        color = {"0": (1, 0, 0), "1": (0, 1, 0), "t": (0, 0, 1), "3": (1, 1, 1)}[text[0]]
        assert image.float().mean((1, 2)).tolist() == [255 * part for part in color]


def test_a_second_folder_is_held_out_whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (9, 9), "red").save(other / "0_red.png")
    Image.new("RGB", (9, 9), "lime").save(other / "maltese.png")
    folders = {"seen": folder, "unseen": other}
    prompts = build(Config(source="folder", folder="seen", held_out_folder="unseen"), folders.__getitem__)
    assert prompts.train == ("0 red", "1 lime", "the sea, at noon", "3 white")
    assert prompts.held_out == ("0 red", "maltese")
    assert [tuple(image.shape) for image in prompts.held_out_images] == [(3, 9, 9)] * 2
    limited = build(Config(source="folder", folder="seen", held_out_folder="unseen", limit=1), folders.__getitem__)
    assert (len(limited.train), len(limited.held_out)) == (1, 1)


def test_a_limit_keeps_captions_with_their_images(folder: Path) -> None:
    prompts = build(Config(source="folder", folder="x", limit=2, held_out_fraction=0.0), lambda name: folder)
    whole = build(Config(source="folder", folder="x", held_out_fraction=0.0), lambda name: folder)
    assert len(prompts.train) == len(prompts.train_images) == 2
    for text, image in zip(prompts.train, prompts.train_images, strict=True):
        assert torch.equal(image, whole.train_images[whole.train.index(text)])


@pytest.mark.parametrize(
    ("text", "expected"), [("one\n\ntwo", ("one", "two")), ("both", ("both",) * 2), ("", ("", ""))]
)
def test_connected_images_take_a_line_each(text: str, expected: tuple[str, ...]) -> None:
    pictures = torch.rand(2, 3, 4, 4)
    prompts = build(Config(source="connected", text=text, held_out_fraction=0.0), none, list(pictures))
    assert prompts.train == expected
    assert torch.equal(torch.stack(prompts.train_images), pictures)


def test_what_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No image is connected"):
        build(Config(source="connected"), none)
    with pytest.raises(InputError, match="3 captions for 2 images"):
        build(Config(source="connected", text="a\nb\nc"), none, list(torch.rand(2, 3, 4, 4)))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "._0_red.png").write_bytes(b"left by another system")
    with pytest.raises(InputError, match=r"broken\.png cannot be read"):
        build(Config(source="folder", folder="x"), lambda name: folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        build(Config(source="folder", folder="x"), lambda name: tmp_path / "empty")


def test_start_images_are_scaled_and_cut_around_the_middle() -> None:
    assert start_images((), VideoSpec(1, 8, 8)) is None
    wide = torch.zeros(3, 16, 48)
    wide[:, :, 16:32] = 1  # the middle third
    tall = torch.rand(3, 8, 8)
    found = start_images((wide, tall), VideoSpec(4, 8, 8))
    assert isinstance(found, Tensor)
    assert found.shape == (2, 3, 8, 8)
    assert (found[0] - 1).abs().max() < 0.05
    assert torch.equal(found[1], tall)


def test_a_selection_keeps_both_parts_in_step() -> None:
    shades = tuple(torch.full((3, 2, 2), float(i)) for i in range(4))
    prompts = PromptSet(("a", "b"), ("c", "d"), shades[:2], shades[2:]).select([1], [1, 0])
    assert prompts.texts == ("b", "d", "c")
    assert [float(image.mean()) for image in prompts.images] == [1.0, 3.0, 2.0]


def test_grey_pictures_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    shades = torch.linspace(0, 65535, 64).round().int().view(8, 8)
    Image.fromarray(shades.numpy().astype("uint16")).save(tmp_path / "ramp.png")
    prompts = build(Config(source="folder", folder="x", held_out_fraction=0.0), lambda name: tmp_path)
    found = start_images(prompts.images, VideoSpec(1, 8, 8))
    assert isinstance(found, Tensor)
    assert (found[0, 0] - shades / 65535).abs().max() < 0.005


def test_pictures_that_the_limit_leaves_out_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def picture(path: Path) -> Tensor:
        read.append(path.name)
        return torch.zeros(3, 1, 1)

    monkeypatch.setattr(images, "_picture", picture)
    prompts = build(Config(source="folder", folder="x", limit=1, held_out_fraction=0.5), lambda name: folder)
    assert len(prompts.texts) == len(read) == 2
