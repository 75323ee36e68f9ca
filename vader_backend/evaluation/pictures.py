"""Pictures that show what changed: captioned side-by-side videos, contact sheets, the reward curve."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..checkpoint import atomic_path
from ..config import InputError
from ..video_file import shown_size

_GAP = 8
_FONT = 13
_INK, _PAPER = (25, 25, 25), (255, 255, 255)


def side_by_side(
    before_BTCHW: Tensor, after_BTCHW: Tensor, titles: Sequence[str], *, heads: tuple[str, str] = ("base", "aligned")
) -> Tensor:
    """One video: a column per prompt under its title, the videos before on top, those after below.

    Args:
        before_BTCHW, after_BTCHW: [B, T, 3, H, W] in [0, 1], equal in shape.
        titles: one caption per column.

    Returns:
        [T, 3, H', W'] in [0, 1]; small videos are enlarged by a whole factor.

    Raises:
        InputError: the shapes differ, or titles are not one per column.
    """
    if before_BTCHW.shape != after_BTCHW.shape or not len(before_BTCHW) or len(titles) != len(before_BTCHW):
        raise InputError(
            f"Side by side needs equally many videos of one size and a title for each, but has {_size(before_BTCHW)} "
            f"before, {_size(after_BTCHW)} after and {len(titles)} titles; sample both from the same prompts."
        )
    grid = [_rows(part) for part in (before_BTCHW, after_BTCHW)]  # frames of one row: [T, B, H, W, 3]
    return _frames(
        [
            _sheet([list(row[t]) for row in grid], list(titles), list(heads))
            for t in range(before_BTCHW.shape[1])
        ]
    )  # fmt: skip


def contact_sheet(path: Path, rows_BTCHW: Mapping[str, Tensor], titles: Sequence[str], *, frames: int = 4) -> None:
    """Write a PNG of still frames: a block of columns per title, a row per entry of `rows_BTCHW`.

    Args:
        rows_BTCHW: [B, T, 3, H, W] in [0, 1] by the name that stands at the left, e.g. "base" and "aligned".
        titles: one per video.
        frames: evenly spaced frames shown of each video.

    Raises:
        InputError: titles are not one per video, or the file cannot be written.
    """
    if not rows_BTCHW or any(len(video) != len(titles) for video in rows_BTCHW.values()):
        raise InputError(f"The contact sheet has {len(titles)} titles; give it equally many videos in every row.")
    grid = []
    for video in rows_BTCHW.values():
        total = video.shape[1]
        picks = torch.linspace(0, total - 1, min(frames, total)).round().long()
        shown = _rows(video[:, picks])  # [T, B, H, W, 3]
        shown = np.pad(shown, ((0, 0), (0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)  # frames stay apart
        grid.append([np.concatenate(list(shown[:, column]), axis=1) for column in range(len(titles))])
    sheet = _sheet(grid, list(titles), list(rows_BTCHW))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def reward_curve(
    path: Path, steps: Sequence[int], rewards: Sequence[float], held_out: Sequence[tuple[int, float]] | None = None
) -> None:
    """Write a PNG of the reward over optimizer steps; `held_out` are (step, reward) pairs of prompts not trained on.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="#2a6fdb", alpha=0.35 if held_out else 1.0, label="training prompts")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c0392b", marker="o", markersize=4, label="held-out prompts")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="reward")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        canvas.print_png(str(temporary))


def _rows(video_BTCHW: Tensor) -> np.ndarray:
    """uint8 [T, B, H, W, 3], enlarged by a whole factor where small."""
    factor = shown_size(*video_BTCHW.shape[-2:])
    pixels = (video_BTCHW.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    pixels = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return pixels.permute(1, 0, 3, 4, 2).numpy()


def _sheet(grid: list[list[np.ndarray]], titles: list[str], heads: list[str]) -> Image.Image:
    """Lay out a grid of equally large pictures with titles above the columns and heads at the left."""
    height, width = grid[0][0].shape[:2]
    font = ImageFont.load_default(_FONT)
    wrapped = [textwrap.wrap(title, max(8, round(width / (0.55 * _FONT)))) for title in titles]
    top = _GAP + max(map(len, wrapped)) * (_FONT + 4) + _GAP
    left = _GAP + round(max(font.getlength(head) for head in heads)) + _GAP
    sheet = Image.new("RGB", (left + len(titles) * (width + _GAP), top + len(heads) * (height + _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        for i, line in enumerate(lines):
            pen.text((left + column * (width + _GAP), _GAP + i * (_FONT + 4)), line, _INK, font)
    for row, (head, pictures) in enumerate(zip(heads, grid, strict=True)):
        y = top + row * (height + _GAP)
        pen.text((_GAP, y + height // 2), head, _INK, font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + column * (width + _GAP), y))
    return sheet


def _frames(sheets: Sequence[Image.Image]) -> Tensor:
    pixels = np.stack([np.asarray(sheet) for sheet in sheets])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _size(video_BTCHW: Tensor) -> str:
    return "x".join(map(str, video_BTCHW.shape))
