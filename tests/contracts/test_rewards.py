"""Every registered reward, with its default settings on embedded weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, random_look, render
from vader_nodes.vader_backend.rewards.base import Reward

FRAMES = 4


@pytest.fixture(scope="module", params=registry.names("rewards"))
def reward(request: pytest.FixtureRequest) -> Reward:
    module = registry.load("rewards", request.param)
    return module.build(module.Config())


@pytest.fixture
def videos() -> tuple[Tensor, list[str]]:
    scenes = SEEN_SCENES[::70]
    video = render(scenes, random_look(len(scenes), torch.Generator().manual_seed(0)), FRAMES)
    return video, [scene.caption for scene in scenes]


def test_a_score_per_video(reward: Reward, videos: tuple[Tensor, list[str]]) -> None:
    video, prompts = videos
    score = reward(video, prompts, range(FRAMES))
    assert (score.shape, score.dtype) == ((len(video),), torch.float32)
    assert score.isfinite().all()
    parts = reward.parts(video, prompts, range(FRAMES))
    assert all(part.shape == score.shape for part in parts.values())


def test_gradient_reaches_the_pixels_if_and_only_if_differentiable(
    reward: Reward, videos: tuple[Tensor, list[str]]
) -> None:
    video, prompts = videos
    video.requires_grad_()
    score = reward(video, prompts, range(FRAMES))
    assert score.requires_grad == reward.differentiable
    if reward.differentiable:
        (gradient,) = torch.autograd.grad(score.sum(), video)
        assert (gradient.flatten(2).abs().amax(2) > 0).all()
    for network in reward.networks():
        assert not any(p.requires_grad for p in network.parameters())


def test_the_gradient_points_uphill(reward: Reward, videos: tuple[Tensor, list[str]]) -> None:
    if not reward.differentiable:
        return
    video, prompts = videos
    video.requires_grad_()
    before = reward(video, prompts, range(FRAMES))
    (gradient,) = torch.autograd.grad(before.sum(), video)
    step = 0.02 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        after = reward(video + step, prompts, range(FRAMES))
    expected = 0.02 * gradient.flatten(1).norm(dim=1)
    assert ((after - before).sum() / expected.sum()).item() == pytest.approx(1, abs=0.15)


def test_samples_do_not_mix(reward: Reward, videos: tuple[Tensor, list[str]]) -> None:
    video, prompts = videos
    with torch.no_grad():
        together = reward(video, prompts, range(FRAMES))
        alone = torch.cat([reward(video[i : i + 1], prompts[i : i + 1], range(FRAMES)) for i in range(len(video))])
    assert (together - alone).abs().max() < 1e-4
