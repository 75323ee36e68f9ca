"""Scores of single videos: a table for people, a record for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

_LONGEST = 60  # characters of a prompt in the table


def table(scores: Mapping[str, Sequence[float]], prompts: Sequence[str]) -> str:
    """A line per video, in their order, then their mean and standard deviation.

    Args:
        scores: a value per video for each name, as `score_videos` gives them.
        prompts: one per video.
    """
    summary = _summary(scores)
    rows = [["video", *scores, "prompt"]]
    for i, prompt in enumerate(prompts):
        rows.append([str(i + 1), *(f"{values[i]:.4f}" for values in scores.values()), _short(prompt)])
    rows += [[name, *(f"{value:.4f}" for value in values.values()), ""] for name, values in summary.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def record(
    scores: Mapping[str, Sequence[float]], prompts: Sequence[str], description: Mapping[str, Any]
) -> dict[str, Any]:
    """The same as plain data for JSON; what is not a finite number is None.

    Args:
        description: of the reward.
    """
    videos = [
        {"video": i + 1, "prompt": prompt, "scores": {name: _finite(values[i]) for name, values in scores.items()}}
        for i, prompt in enumerate(prompts)
    ]
    summary = {
        part: {name: _finite(value) for name, value in values.items()} for part, values in _summary(scores).items()
    }
    return {"reward": dict(description), "videos": videos, **summary}


def _summary(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    spread = {name: pstdev(v) if all(map(math.isfinite, v)) else math.nan for name, v in scores.items()}
    return {"mean": {name: fmean(values) for name, values in scores.items()}, "std": spread}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip()
