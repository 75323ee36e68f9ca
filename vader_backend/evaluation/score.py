"""Scores of videos, and the table that compares two sets of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev

import torch
from torch import Tensor

from ..config import InputError
from ..rewards.base import Reward

_HEADS = ("score", "base", "base std", "aligned", "difference", "in base stds")


@torch.no_grad()
def score_videos(
    reward: Reward,
    video_BTCHW: Tensor,
    prompts: Sequence[str],
    batch: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Score whole videos by every part of a reward.

    Args:
        video_BTCHW: [B, T, 3, H, W] in [0, 1].
        batch: videos scored at a time.
        on_batch: told after each of them how many videos are scored, and how many there are.

    Returns:
        B values for each name of `reward.parts`.

    Raises:
        InputError: videos and prompts differ in number, there is none, or a video holds NaN or infinity.
    """
    if len(prompts) != len(video_BTCHW) or not len(prompts):
        raise InputError(f"There are {len(video_BTCHW)} videos and {len(prompts)} prompts; give one prompt per video.")
    broken = (~video_BTCHW.flatten(1).isfinite().all(1)).nonzero()
    if len(broken):
        raise InputError(f"video {int(broken[0]) + 1} holds numbers that are not finite; look at what made it.")
    device = next((p.device for network in reward.networks() for p in network.parameters()), video_BTCHW.device)
    frames = reward.frames.report(video_BTCHW.shape[1])
    scores: dict[str, list[float]] = {}
    for start in range(0, len(prompts), batch):
        part = video_BTCHW[start : start + batch, list(frames)].to(device)
        for name, values in reward.parts(part, prompts[start : start + batch], frames).items():
            scores.setdefault(name, []).extend(values.tolist())
        on_batch(start + len(part), len(prompts))
    return scores


def comparison_table(base: Mapping[str, Sequence[float]], aligned: Mapping[str, Sequence[float]]) -> str:
    """A line per score: mean and standard deviation of the base, mean of the aligned, their difference.

    The last column is the difference in standard deviations (over videos) of the base.

    Raises:
        InputError: the two sides do not hold the same scores, or one of them is empty.
    """
    if set(base) != set(aligned):
        raise InputError("Base and aligned videos were not scored by the same rewards; score both with one reward.")
    if not base or any(not len(values) for values in (*base.values(), *aligned.values())):
        raise InputError("There are no scores to compare; score at least one video on each side.")
    rows = [_HEADS, *(_row(name, base[name], aligned[name]) for name in base)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers])


def _row(name: str, base: Sequence[float], aligned: Sequence[float]) -> tuple[str, ...]:
    spread = pstdev(base) if all(map(math.isfinite, base)) else math.nan
    difference = fmean(aligned) - fmean(base)
    share = f"{difference / spread:+.2f}" if spread else "-"
    return name, f"{fmean(base):.4f}", f"{spread:.4f}", f"{fmean(aligned):.4f}", f"{difference:+.4f}", share
