"""Prompt lists with a split into training and held-out prompts.

The activity prompts are those of DDPO and VADER, to the letter. All other lists are our own
stand-ins, written anew in the manner of the paper's: load the originals from a text file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import InputError, check, option
from ..mini.world import SEEN_SCENES, UNSEEN_SCENES
from ..rng import generator

# name -> (training list, held-out list); without a held-out list the training list is split by `held_out_fraction`
_FILES: dict[str, tuple[str, str | None]] = {
    "activities": ("activities", None),
    "hps_actions": ("actions", None),
    "hps_actions_to_activities": ("actions", "activities"),
    "animals_with_instruments": ("animals_with_instruments", "animals_with_instruments_unseen"),
    "animals_in_clothes": ("animals_in_clothes", "animals_in_clothes_unseen"),
    "book_and_cup": ("book_and_cup", None),
    "fashion_portraits": ("fashion_portraits", None),
    "kinetics_actions": ("kinetics_actions", None),
}
BUILT_IN = ("mini", "mini_unseen", *_FILES)


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on and prompts that no training sees.

    For image-to-video models each prompt has its start image, [3, H, W], in [0, 1] or uint8; sizes may differ.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    train_images: tuple[Tensor, ...] = ()
    held_out_images: tuple[Tensor, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Training prompts, then held-out prompts."""
        return self.train + self.held_out

    @property
    def images(self) -> tuple[Tensor, ...]:
        """The start images of `texts`; empty where there are none."""
        return self.train_images + self.held_out_images

    def select(self, train: Sequence[int], held_out: Sequence[int]) -> PromptSet:
        """The given prompts of each part, in the given order."""
        return PromptSet(
            tuple(self.train[i] for i in train),
            tuple(self.held_out[i] for i in held_out),
            tuple(self.train_images[i] for i in train if self.train_images),
            tuple(self.held_out_images[i] for i in held_out if self.held_out_images),
        )


@dataclass(frozen=True)
class Config:
    """Where prompts come from and how they are split."""

    source: str = option(
        "mini",
        "typed: the text below; file: a text file; else a built-in set. Those of the embedded model are mini and "
        "mini_unseen (held-out prompts only); all but activities are our own stand-ins for the paper's lists.",
        choices=(*BUILT_IN, "typed", "file"),
    )
    text: str = option("", "With typed: one prompt per line.", multiline=True)
    file: str = option("", "With file: name of a UTF-8 text file in the input folder, one prompt per line.")
    held_out_fraction: float = option(
        0.2,
        "Share of the prompts kept out of training; built-in sets with a published or unseen test list keep their own.",
        low=0.0,
        high=0.9,
        step=0.05,
    )
    seed: int = option(0, "Seed of the split and of the choice under a limit.", low=0, high=2**53)
    limit: int = option(0, "At most this many training and this many held-out prompts; 0 takes all.", low=0, high=10000)
    held_out_file: str = option(
        "", "With file: another text file, whose prompts are all held out; empty splits the first."
    )


def build(config: Config, read_file: Callable[[str], str]) -> PromptSet:
    """Read, clean, split and limit the prompts; equal settings give equal prompts in equal order.

    Args:
        read_file: gives the text of a file in the user's input folder.

    Raises:
        InputError: a setting is wrong, the file cannot be read, or there is no prompt.
    """
    check(config)
    train, held_out = _lists(config, read_file)
    train = _clean(train)
    if held_out is None:
        rows = split(len(train), config.held_out_fraction, config.seed)
        train, held_out = (tuple(train[i] for i in part) for part in rows)
    else:
        held_out = tuple(p for p in _clean(held_out) if p not in set(train))
    if not train and not held_out:
        raise InputError(f"{_place(config)} holds no prompt; write at least one line that is not blank.")
    return limited(PromptSet(train, held_out), config.limit, config.seed)


def built_in_list(name: str) -> list[str]:
    """The prompts of one shipped text file, without the line that says where they are from."""
    lines = (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def _lists(config: Config, read_file: Callable[[str], str]) -> tuple[Iterable[str], Iterable[str] | None]:
    if config.source == "typed":
        return config.text.splitlines(), None
    if config.source == "file":
        other = _read(config.held_out_file, read_file).splitlines() if config.held_out_file else None
        return _read(config.file, read_file).splitlines(), other
    if config.source.startswith("mini"):
        seen = SEEN_SCENES if config.source == "mini" else ()
        return [s.caption for s in seen], [s.caption for s in UNSEEN_SCENES]
    first, second = _FILES[config.source]
    return built_in_list(first), built_in_list(second) if second else None


def _read(name: str, read_file: Callable[[str], str]) -> str:
    if not name.strip():
        raise InputError("The prompts' file has no name; enter a text file of the input folder.")
    try:
        return read_file(name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt file {name} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"The prompt file {name} cannot be read ({reason}); put it into the input folder.") from error


def _clean(lines: Iterable[str]) -> tuple[str, ...]:
    """Without surrounding space, blank lines and repetitions."""
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def split(total: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and a seeded draw of rows to hold out; at least one stays to train on."""
    count = max(0, min(round(fraction * total), total - 1))
    chosen = set(torch.randperm(total, generator=generator(seed, "prompts", "split"))[:count].tolist())
    return [i for i in range(total) if i not in chosen], sorted(chosen)


def limited(prompts: PromptSet, limit: int, seed: int) -> PromptSet:
    """A seeded draw of at most `limit` prompts of each part, in their order; 0 takes all."""

    def draw(total: int, part: str) -> list[int]:
        if not limit or total <= limit:
            return list(range(total))
        order = torch.randperm(total, generator=generator(seed, "prompts", part, "limit"))
        return sorted(order[:limit].tolist())

    return prompts.select(draw(len(prompts.train), "train"), draw(len(prompts.held_out), "held out"))


def _place(config: Config) -> str:
    return {"typed": "The prompts' text", "file": f"The prompt file {config.file}"}.get(config.source, config.source)
