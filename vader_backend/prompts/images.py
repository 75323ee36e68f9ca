"""Image prompts: start images with captions, split into training and held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..config import InputError, check, option
from ..mini.world import SEEN_SCENES, UNSEEN_SCENES, Scene, large_look, render
from ..rng import generator
from . import PromptSet, limited, split

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Config:
    """Where start images and their captions come from, and how they are split."""

    source: str = option(
        "mini",
        "connected: the images that are wired to this node; folder: a folder of pictures; mini: first frames drawn "
        "for the embedded model, with combinations that it never saw as held-out prompts.",
        choices=("mini", "folder", "connected"),
    )
    folder: str = option(
        "", "With folder: its name in the input folder. A picture's caption is the text file of the same name, or its "
        "own name.",
    )  # fmt: skip
    text: str = option(
        "", "With connected: one caption per image and line; a single line holds for all.", multiline=True
    )
    held_out_fraction: float = option(
        0.2, "Share of the images kept out of training; mini keeps its own.", low=0.0, high=0.9, step=0.05
    )
    seed: int = option(0, "Seed of the split, of the choice under a limit and of mini's pictures.", low=0, high=2**53)
    limit: int = option(0, "At most this many training and this many held-out images; 0 takes all.", low=0, high=10000)
    held_out_folder: str = option(
        "", "With folder: another folder of the input folder, whose pictures are all held out; empty splits the first."
    )


def build(config: Config, folder: Callable[[str], Path], connected: Sequence[Tensor] = ()) -> PromptSet:
    """Read, caption, split and limit the images; equal settings and files give equal prompts in equal order.

    Args:
        folder: the folder of that name among the user's input files.
        connected: images [3, H, W] in [0, 1] for the source "connected".

    Raises:
        InputError: a setting is wrong, a picture cannot be read, or captions and images differ in number.
    """
    check(config)
    if config.source == "mini":
        return limited(_drawn(config.seed), config.limit, config.seed)
    if config.source == "connected":
        captions = _captions(config.text, len(connected))
        return _parted(PromptSet(captions, captions, tuple(connected), tuple(connected)), config)
    train, held_out = _files(config, folder)
    return PromptSet(_captions_of(train), _captions_of(held_out), _pictures(train), _pictures(held_out))


def _files(config: Config, folder: Callable[[str], Path]) -> list[list[Path]]:
    """The chosen pictures of both parts; only those are read, since there may be many."""
    names = tuple(map(str, pictures(folder(config.folder))))
    if config.held_out_folder:
        others = tuple(map(str, pictures(folder(config.held_out_folder))))
        chosen = limited(PromptSet(names, others), config.limit, config.seed)
    else:
        chosen = _parted(PromptSet(names, names), config)
    return [[Path(name) for name in part] for part in (chosen.train, chosen.held_out)]


def _parted(everything: PromptSet, config: Config) -> PromptSet:
    """A set whose two parts are the same, split and limited."""
    rows = split(len(everything.train), config.held_out_fraction, config.seed)
    return limited(everything.select(*rows), config.limit, config.seed)


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names. Raises InputError where there are none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not found:
        raise InputError(f"There are no pictures ({', '.join(SUFFIXES)}) in the folder {folder}; put them there.")
    return found


def _drawn(seed: int) -> PromptSet:
    """The first frame of one video per scene."""

    def first_frames(scenes: Sequence[Scene]) -> tuple[Tensor, ...]:
        return tuple(render(scenes, large_look(len(scenes), generator(seed, "image prompts", len(scenes))))[:, 0])

    train, held_out = (tuple(scene.caption for scene in pool) for pool in (SEEN_SCENES, UNSEEN_SCENES))
    return PromptSet(train, held_out, first_frames(SEEN_SCENES), first_frames(UNSEEN_SCENES))


def _captions_of(files: Iterable[Path]) -> tuple[str, ...]:
    return tuple(_caption(file) for file in files)


def _pictures(files: Iterable[Path]) -> tuple[Tensor, ...]:
    return tuple(_picture(file) for file in files)


def _caption(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        return picture.stem.replace("_", " ").strip()
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise InputError(f"The caption {text.name} is not UTF-8 text; save it as UTF-8.") from error


def _picture(path: Path) -> Tensor:
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits of grey
                picture = picture.point(lambda value: value * (1 / 257)).convert("L")
            pixels = np.array(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"The picture {path.name} cannot be read ({error}); save it again as PNG or JPEG.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _captions(text: str, count: int) -> tuple[str, ...]:
    if not count:
        raise InputError("No image is connected; wire Load Image to images, or choose another source.")
    captions = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if len(captions) == 1:
        captions *= count
    if len(captions) != count:
        raise InputError(
            f"There are {len(captions)} captions for {count} images; write one line per image, or a single one."
        )
    return tuple(captions)
