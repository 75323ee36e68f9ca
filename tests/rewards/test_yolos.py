"""The object reward: its classes, its smooth and its published score, the size at which it looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.registry import load
from vader_nodes.vader_backend.rewards.yolos import by_short_side, mean_detection, presence

from .conftest import PROMPTS, video

Make = Callable[..., Any]


@pytest.mark.parametrize(("name", "hint"), [("boook", "did you mean 'book'"), ("zebra", "choose one of")])
def test_an_unknown_class_lists_the_valid_ones(make: Make, name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as caught:
        make("yolos", target=name)
    assert "book, cup, teddy bear" in str(caught.value)
    assert "n/a" not in str(caught.value).lower()


def test_class_names_are_read_kindly(make: Make) -> None:
    assert make("yolos", target=" Teddy Bear").target == 3


def test_keep_and_remove_are_opposites(make: Make) -> None:
    keep, remove = (make("yolos", mode=mode).parts(video(), PROMPTS, [0, 1]) for mode in ("keep", "remove"))
    assert set(keep) == {"yolos", "yolos published"}
    for name, score in keep.items():
        torch.testing.assert_close(score, 1 - remove[name])


def test_published_score_is_the_mean_over_boxes_above_the_threshold() -> None:
    odds = torch.tensor(
        [
            [[0.60, 0.10, 0.30], [0.40, 0.25, 0.35], [0.15, 0.05, 0.80], [0.30, 0.50, 0.20], [0.35, 0.05, 0.60]],
            [[0.19, 0.01, 0.80], [0.10, 0.80, 0.10], [0.00, 0.00, 1.00], [0.05, 0.05, 0.90], [0.00, 0.00, 1.00]],
        ]
    )
    torch.testing.assert_close(mean_detection(odds, 0), torch.tensor([0.45, 0.0]))
    torch.testing.assert_close(mean_detection(odds, 1), torch.tensor([0.5, 0.8]))


def test_smooth_score_has_a_gradient_where_the_published_one_has_none() -> None:
    odds = torch.tensor([[[0.1, 0.9], [0.05, 0.95]]], requires_grad=True)
    smooth = presence(odds, 0)
    torch.testing.assert_close(smooth, torch.tensor([1 - 0.9 * 0.95]))
    (gradient,) = torch.autograd.grad(smooth.sum(), odds)
    torch.testing.assert_close(gradient[0, :, 0], torch.tensor([0.95, 0.9]))
    (nothing,) = torch.autograd.grad(mean_detection(odds, 0).sum(), odds)
    assert not nothing.any()


def test_presence_of_a_certain_object_stays_finite() -> None:
    odds = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    score = presence(odds, 0)
    score.sum().backward()
    assert score.tolist() == pytest.approx([1])
    assert odds.grad is not None
    assert odds.grad.isfinite().all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((320, 512), (800, 1280)), ((512, 320), (1280, 800)), ((480, 832), (768, 1328)), ((832, 480), (1328, 768)),
     ((418, 1343), (416, 1328)), ((1343, 418), (1344, 416)), ((333, 333), (800, 800))],
)  # fmt: skip
def test_the_published_processors_size_follows_the_short_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert by_short_side(*size, longest=1344 if 1343 in size else 1333) == expected


@pytest.mark.parametrize(
    ("told", "height", "expected"),
    [
        ({"size": {"height": 24, "width": 32}}, 0, (24, 32)),
        ({"size": {"height": 24, "width": 32}}, 50, (50, 70)),
        ({"size": {"shortest_edge": 64, "longest_edge": 133}}, 0, (64, 80)),
        ({"size": {"shortest_edge": 64, "longest_edge": 70}}, 0, (48, 64)),
        ({"size": 64, "max_size": 70}, 0, (48, 64)),
        ({"size": {"shortest_edge": 3}}, 0, (8, 8)),
        (None, 0, (512, 716)),
    ],
)
def test_size_at_which_frames_are_looked_at(
    folder: Path, tmp_path: Path, told: dict[str, Any] | None, height: int, expected: tuple[int, int]
) -> None:
    for path in (folder / "detector").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if told is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    module = load("rewards", "yolos")
    reward = module.build(module.Config(checkpoint="x", target="cup", height=height), lambda _: tmp_path)
    seen: list[torch.Size] = []
    reward.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"].shape[-2:]), with_kwargs=True
    )
    reward(video(1, 20, 28)[:1], PROMPTS[:1], [0])
    assert seen == [torch.Size(expected)]
