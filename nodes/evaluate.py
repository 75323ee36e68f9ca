"""Score Video: what rewards say of videos, and how far they are from a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from ..vader_backend.evaluation.score import comparison_table, score_videos
from ..vader_backend.prompts import PromptSet
from ..vader_backend.rewards.base import Reward
from . import device, host, schema
from .images import to_videos


class VaderScoreVideo:
    DESCRIPTION = "Scores videos by a reward and each of its parts; with a baseline, compares the two."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("evaluate video", "reward score", "compare reward")
    FUNCTION = "score"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("table",)
    OUTPUT_TOOLTIPS = ("A table for the training prompts and one for the held-out prompts.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "images": schema.link("IMAGE", "Frames of the videos to score, video after video."),
            "prompts": schema.link("VADER_PROMPTS", "Their prompts, from the sampling node that made them."),
            "reward": schema.link("VADER_REWARD", "The reward; it need not be differentiable here."),
        }
        optional = {"baseline": schema.link("IMAGE", "Videos of the base model for the same prompts.")}
        return {"required": required, "optional": optional, "hidden": {"unique_id": "UNIQUE_ID"}}

    def score(
        self,
        images: Tensor,
        prompts: PromptSet,
        reward: Reward,
        baseline: Tensor | None = None,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        texts = prompts.texts
        videos = [to_videos(images, len(texts))]
        videos += [] if baseline is None else [to_videos(baseline, len(texts), "baseline")]
        with device.workspace(reward.networks()), host.progress("Scoring", unique_id) as show:
            scores, *rest = (score_videos(reward, part, texts, on_batch=show) for part in videos)
        base = rest[0] if rest else None
        split = len(prompts.train)
        parts = {"training prompts": slice(0, split), "held-out prompts": slice(split, None)}
        table = "\n\n".join(
            f"{len(texts[part])} {name}\n{_table(_cut(scores, part), _cut(base, part) if base else None)}"
            for name, part in parts.items()
            if texts[part]
        )
        host.note(table, unique_id)
        return {"ui": {"text": [table]}, "result": (table,)}


def _cut(scores: Mapping[str, Sequence[float]], part: slice) -> dict[str, Sequence[float]]:
    return {name: values[part] for name, values in scores.items()}


def _table(scores: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]] | None) -> str:
    if base is not None:
        return comparison_table(base, scores)
    width = max(map(len, scores))
    return "\n".join(f"{name:<{width}}  {fmean(v):.4f}  (std {pstdev(v):.4f})" for name, v in scores.items())
