"""Reward Table: any pictures or videos against any reward, a line for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..vader_backend.checkpoint import write_text
from ..vader_backend.config import InputError, option
from ..vader_backend.evaluation.reward_table import record, table
from ..vader_backend.evaluation.score import score_videos
from ..vader_backend.prompts import PromptSet
from ..vader_backend.rewards.base import Combined, Reward
from ..vader_backend.runs import check_name
from . import device, host, schema
from .images import to_videos

_PREFIX = "scores/vader"


@dataclass(frozen=True)
class Layout:
    """How the images are divided, and what they should show."""

    frames: int = option(
        0,
        "Frames of each video; 1 scores every picture by itself, 0 divides the images evenly among the prompts.",
        low=0,
        high=10000,
    )
    text: str = option(
        "",
        "Prompts, a line for each video or one line for all, where no prompts are connected; rewards that look at "
        "pictures alone need none.",
        multiline=True,
    )


class VaderRewardTable:
    DESCRIPTION = "Scores any pictures or videos by a reward or Combine Rewards: a table, JSON, and a report file."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("score images", "reward report", "benchmark rewards", "evaluate")
    FUNCTION = "score"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("table", "json")
    OUTPUT_TOOLTIPS = (
        "A line for each video, then mean and standard deviation.",
        "The same as JSON, with the reward's settings; what the report file holds.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "images": schema.link("IMAGE", "Pictures, or frames of videos, video after video."),
            "reward": schema.link("VADER_REWARD", "The reward; of Combine Rewards every part is a column."),
        }
        prompts = schema.link("VADER_PROMPTS", "One prompt per video, from the sampling node that made them.")
        prefix = schema.text(_PREFIX, "File name of the report in the output folder; a number and .json follow.")
        optional = {"prompts": prompts, **schema.inputs(Layout), "filename_prefix": prefix}
        return {"required": required, "optional": optional, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = _PREFIX) -> bool | str:
        if filename_prefix is None:
            return True
        return schema.verdict(lambda: check_name(filename_prefix, "filename_prefix"))

    def score(
        self,
        images: Tensor,
        reward: Reward,
        prompts: PromptSet | None = None,
        filename_prefix: str = _PREFIX,
        unique_id: str | None = None,
        **values: Any,
    ) -> dict[str, Any]:
        layout = schema.read(Layout, values)
        given = list(prompts.texts) if prompts else [line.strip() for line in layout.text.splitlines() if line.strip()]
        videos, texts = divided(images, given, layout.frames)
        judge = Combined([reward], [1.0]) if isinstance(reward, Combined) else reward  # the sum is a column, too
        with device.workspace(reward.networks()), host.progress("Scoring", unique_id) as show:
            scores = score_videos(judge, videos, texts, on_batch=show)
        text = table(scores, texts)
        report = json.dumps(record(scores, texts, reward.description), indent=2, allow_nan=False)
        path = host.new_file(filename_prefix, ".json")
        if host.is_main():
            write_text(path, report + "\n")
        host.note(text, unique_id)
        name = path.relative_to(host.current().output()).as_posix()
        return {"ui": {"text": [text, f"wrote output/{name}"]}, "result": (text, report)}


def divided(images: Tensor, prompts: list[str], frames: int) -> tuple[Tensor, list[str]]:
    """The images as videos [B, T, 3, H, W], and a prompt for each.

    Args:
        prompts: one for each video, one for all, or none.
        frames: of each video; 0: as many as the prompts leave to each.

    Raises:
        InputError: there are no images, they are grey or not finite, or they do not divide as prompts or frames say.
    """
    if not len(images):
        raise InputError("images is empty; connect at least one picture.")
    if images.shape[-1] < 3:
        raise InputError("images is grey, but rewards look at pictures in colour; convert it to RGB.")
    if not bool(images.isfinite().all()):
        raise InputError("images holds numbers that are not finite (NaN or infinite); look at what made it.")
    if frames and len(images) % frames:
        raise InputError(
            f"images has {len(images)} frames, which are no whole number of videos of {frames}; set frames."
        )
    count = len(images) // frames if frames else max(1, len(prompts))
    if len(prompts) not in (0, 1, count):
        raise InputError(
            f"There are {len(prompts)} prompts for {count} videos; give one for each, one for all of them, or none."
        )
    texts = prompts * (count // len(prompts)) if prompts else [""] * count
    return to_videos(images, count), texts
