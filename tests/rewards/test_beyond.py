"""What holds for ImageReward, Aesthetic V2.5 and VideoReward alike, on tiny checkpoints in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import PROMPTS, video
from .tiny_beyond import SAVE, make

KINDS = tuple(SAVE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp("beyond") / kind) for kind, save in SAVE.items()}


@pytest.fixture(params=KINDS)
def reward(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return make(request.param, folders[request.param])


def double(reward: Any) -> Any:
    for network in reward.networks():
        network.double()
    return reward


@pytest.mark.parametrize("size", [(40, 56), (12, 12), (37, 25)])
def test_pixel_gradient_agrees_with_finite_differences(reward: Any, size: tuple[int, int]) -> None:
    reward = double(reward)
    clip = video(4, *size, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(clip, PROMPTS, range(4)).sum(), clip)
    rng = torch.Generator().manual_seed(5)
    # Qwen2-VL rounds to float32 inside its norms: scores then differ by about 1e-6.
    length, rel, noise = (1e-5, 5e-3, 2e-6) if reward.name == "videoreward" else (1e-6, 1e-5, 0)
    for direction in (gradient.sign(), torch.randn(clip.shape, generator=rng, dtype=torch.float64)):
        step = length * direction
        with torch.no_grad():
            rise = reward(clip + step, PROMPTS, range(4)).sum() - reward(clip - step, PROMPTS, range(4)).sum()
        assert float(rise) == pytest.approx(float(2 * (gradient * step).sum()), rel=rel, abs=noise)
    assert gradient.flatten(2).abs().amax(2).min() > 0  # every frame counts


def test_samples_do_not_mix_and_a_batch_equals_its_singles(reward: Any) -> None:
    clip = video(4, 24, 36)
    together = reward(clip.requires_grad_(), PROMPTS, range(4))
    (gradient,) = torch.autograd.grad(together[0], clip)
    assert gradient[0].any()
    assert not gradient[1].any()
    singles = [reward(clip[i : i + 1], PROMPTS[i : i + 1], range(4)) for i in range(2)]
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat(singles), rtol=1e-4, atol=1e-5)
    assert float((together[0] - together[1]).detach().abs()) > 1e-3


def test_networks_are_frozen_and_the_description_names_them(reward: Any) -> None:
    parameters = [p for network in reward.networks() for p in network.parameters()]
    assert parameters
    clip = video(4, 24, 36).requires_grad_()
    reward(clip, PROMPTS, range(4)).sum().backward()
    assert not [p for p in parameters if p.requires_grad or p.grad is not None or p.is_meta]
    assert not [network for network in reward.networks() if network.training]
    described = json.loads(json.dumps(reward.description))
    assert described["kind"] == reward.name
    assert len(described["weights"]) == len(reward.networks())


def test_parts_hold_the_reward_itself(reward: Any) -> None:
    clip = video(4, 24, 36)
    parts = reward.parts(clip, PROMPTS, range(4))
    torch.testing.assert_close(parts[reward.name], reward(clip, PROMPTS, range(4)))


@pytest.mark.parametrize("kind", ["imagereward", "videoreward"])
def test_each_video_is_scored_against_its_own_prompt(kind: str, folders: dict[str, Path]) -> None:
    reward, same = make(kind, folders[kind]), video(4)[:1].expand(2, -1, -1, -1, -1)
    straight, crossed = reward(same, PROMPTS, range(4)), reward(same, PROMPTS[::-1], range(4))
    torch.testing.assert_close(straight, crossed.flip(0), rtol=1e-4, atol=1e-5)
    assert float((straight[0] - straight[1]).abs()) > 1e-3
