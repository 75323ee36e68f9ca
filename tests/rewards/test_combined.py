"""Sums of rewards, distances to targets, and the pixel oracle as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.world import ALL_SCENES, Look, random_look, random_scenes, render
from vader_nodes.vader_backend.registry import load
from vader_nodes.vader_backend.rewards.base import Combined, SingleReward, Towards
from vader_nodes.vader_backend.types import FrameSpec

from .conftest import PROMPTS, video

Make = Callable[..., Any]


class FirstPixel(SingleReward):
    """The mean of the frames' first pixel; remembers which frames it was shown."""

    def __init__(self, name: str, frames: FrameSpec, *, differentiable: bool = True) -> None:
        self.name, self.frames, self.differentiable = name, frames, differentiable
        self.description = {"kind": name}
        self.shown: list[tuple[int, ...]] = []

    def networks(self) -> Sequence[torch.nn.Module]:
        return ()

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        self.shown.append(tuple(indices))
        return video_BTCHW[:, :, 0, 0, 0].mean(1)


def numbered(frames: int) -> Tensor:
    """One video whose frame t holds the value t."""
    return torch.arange(frames, dtype=torch.float32)[None, :, None, None, None].expand(1, frames, 3, 2, 2)


def test_each_part_gets_its_own_frames_out_of_the_union() -> None:
    ends, start = FirstPixel("ends", FrameSpec("even", 2)), FirstPixel("start", FrameSpec("first", 3))
    both = Combined([ends, start], [1.0, 10.0])
    indices = both.frames.pick(8)
    assert list(indices) == [0, 1, 2, 7]
    decoded = numbered(8)[:, list(indices)]
    torch.testing.assert_close(both(decoded, ["x"], indices), torch.tensor([3.5 + 10 * 1.0]))
    assert (ends.shown, start.shown) == ([(0, 7)], [(0, 1, 2)])
    parts = both.parts(decoded, ["x"], indices)
    assert {name: float(score) for name, score in parts.items()} == {"ends": 3.5, "start": 1.0}


def test_random_frames_of_parts_are_their_own() -> None:
    one, other = FirstPixel("one", FrameSpec("random", 2)), FirstPixel("other", FrameSpec("random", 1))
    both = Combined([one, other], [1.0, 1.0])
    indices = both.frames.pick(8, torch.Generator().manual_seed(0))
    parts = both.parts(numbered(8)[:, list(indices)], ["x"], indices)
    for reward in (one, other):
        (shown,) = reward.shown
        assert float(parts[reward.name]) == pytest.approx(sum(shown) / len(shown))


def test_sum_of_real_rewards_is_weighted(make: Make) -> None:
    rewards, clip = [make("hps"), make("yolos")], video()
    together = Combined(rewards, [2.0, -0.5])(clip, PROMPTS, [0, 1])
    scores = [reward(clip, PROMPTS, [0, 1]) for reward in rewards]
    torch.testing.assert_close(together, 2 * scores[0] - 0.5 * scores[1])


def test_a_part_of_weight_zero_is_reported_but_not_trained_on() -> None:
    learned = FirstPixel("learned", FrameSpec("all"))
    watched = FirstPixel("watched", FrameSpec("all"), differentiable=False)
    assert Combined([learned, watched], [1.0, 0.0]).differentiable
    assert not Combined([learned, watched], [1.0, 0.1]).differentiable
    both = Combined([learned, watched], [1.0, 0.0])
    both(numbered(2), ["x"], [0, 1])
    assert not watched.shown
    assert set(both.parts(numbered(2), ["x"], [0, 1])) == {"learned", "watched"}


def test_a_sum_inside_a_sum_is_reported_with_its_parts() -> None:
    one, other, third = (FirstPixel(name, FrameSpec("all")) for name in ("one", "other", "third"))
    parts = Combined([Combined([one, other], [1.0, 2.0]), third], [1.0, 1.0]).parts(numbered(2), ["x"], [0, 1])
    assert set(parts) == {"one", "other", "combined", "third"}
    torch.testing.assert_close(parts["combined"], parts["one"] + 2 * parts["other"])


def test_nothing_to_train_on_is_refused() -> None:
    part = FirstPixel("part", FrameSpec("all"))
    with pytest.raises(InputError, match="zero"):
        Combined([part, part], [0.0, 0.0])
    with pytest.raises(InputError, match="no reward"):
        Combined([], [])


@pytest.mark.parametrize(
    ("form", "target", "score", "slope"),
    [
        ("distance", 9.0, -0.5 * 2, 0.5),
        ("distance", 5.0, -0.5 * 2, -0.5),
        ("hinge", 9.0, -1.0, 0.5),
        ("hinge", 5.0, 0.0, 0.0),
    ],
)
def test_distance_to_a_target(form: str, target: float, score: float, slope: float) -> None:
    part = FirstPixel("part", FrameSpec("all"))
    wrapped = Towards(part, target, 0.5, form)  # type: ignore[arg-type]
    clip = torch.full((1, 1, 3, 1, 1), 7.0, requires_grad=True)
    loss = wrapped(clip, ["x"], [0])
    assert float(loss.detach()) == pytest.approx(score)
    (gradient,) = torch.autograd.grad(loss.sum(), clip)
    assert float(gradient[0, 0, 0, 0, 0]) == pytest.approx(slope)
    assert wrapped.parts(clip, ["x"], [0])["part"].tolist() == [7]


def oracle() -> Any:
    module = load("rewards", "mini_oracle")
    return module.build(module.Config())


def rendered() -> tuple[list[Any], Tensor]:
    rng = torch.Generator().manual_seed(0)
    scenes = random_scenes(4, rng, ALL_SCENES)
    look: Look = random_look(4, rng, uniform=True)
    return scenes, render(scenes, look)


def test_vividness_is_the_strength_of_the_colour() -> None:
    module = load("rewards", "mini_vividness")
    reward, rng = module.build(module.Config()), torch.Generator().manual_seed(1)
    scenes, look = random_scenes(40, rng, ALL_SCENES), random_look(40, rng, uniform=True)
    clip = render(scenes, look)
    scores = reward(clip, [scene.caption for scene in scenes], list(range(clip.shape[1])))
    assert float(torch.corrcoef(torch.stack([scores, look.quality]))[0, 1]) > 0.95
    grey = clip.mean(2, keepdim=True).expand_as(clip)
    assert not reward(grey, [scene.caption for scene in scenes], list(range(clip.shape[1]))).any()


def test_oracle_agrees_with_renders_and_names_what_is_wrong() -> None:
    scenes, clip = rendered()
    reward, indices = oracle(), list(range(clip.shape[1]))
    prompts = [scene.caption for scene in scenes]
    assert not reward.differentiable
    assert reward.frames.pick(8) == indices
    assert torch.equal(reward(clip, prompts, indices), torch.ones(4))
    away = {"left": "right", "right": "left", "up": "down", "down": "up"}[scenes[0].motion]
    prompts[0] = prompts[0].replace(scenes[0].motion, away)
    parts = reward.parts(clip, prompts, indices)
    assert parts["oracle motion"].tolist() == [0, 1, 1, 1]
    for name in ("background", "color", "shape"):
        assert parts[f"oracle {name}"].tolist() == [1, 1, 1, 1]
    assert parts["oracle"].tolist() == [0.75, 1, 1, 1]
    assert torch.equal(parts["oracle"], reward(clip, prompts, indices))


def test_oracle_needs_captions_of_the_mini_world() -> None:
    _, clip = rendered()
    with pytest.raises(InputError, match="a bear playing chess"):
        oracle()(clip, ["a bear playing chess"] * 4, list(range(8)))
