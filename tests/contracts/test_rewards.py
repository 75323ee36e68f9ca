"""What every registered reward keeps, on embedded weights, or on tiny random ones where none are embedded."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards import every
from torch import Tensor
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, random_look, render
from vader_nodes.vader_backend.rewards.base import Combined, Reward

TOTAL = 17  # frames of the whole video: more than any of these networks takes
SCENES = SEEN_SCENES[::90]
# Relative error of a directional derivative by central differences in float64, its step, and the noise of a score.
# Qwen2-VL rounds to float32 inside its norms.
EXACT, ROUNDED = (1e-4, 1e-6, 0.0), (1e-2, 1e-5, 4e-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every.save_all(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module", params=every.KINDS)
def reward(request: pytest.FixtureRequest, root: Path) -> Reward:
    return every.build_default(request.param, root)


@pytest.fixture
def trainable(reward: Reward) -> Reward:
    if not reward.differentiable:
        pytest.skip("this reward is for reports: it has no gradient")
    return reward


@pytest.fixture(scope="module")
def whole() -> Tensor:
    """Three videos [3, TOTAL, 3, 64, 64]."""
    return render(SCENES, random_look(len(SCENES), torch.Generator().manual_seed(0)), TOTAL)


PROMPTS = [scene.caption for scene in SCENES]


def chosen(reward: Reward) -> list[int]:
    return list(reward.frames.pick(TOTAL, torch.Generator().manual_seed(2)))


def parameters(reward: Reward) -> list[torch.nn.Parameter]:
    return [parameter for network in reward.networks() for parameter in network.parameters()]


def leaves(score: Tensor) -> Iterator[Tensor]:
    """Whatever a backward pass from `score` would give a gradient to."""
    found, ahead = set(), [score.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        ahead += [source for source, _ in node.next_functions]


def kept_bytes(reward: Reward, clip: Tensor, frames: list[int]) -> int:
    """How much a forward pass keeps for the backward pass, weights aside."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        score = reward(clip, PROMPTS, frames)
    assert score.requires_grad
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters(reward)}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def test_a_finite_score_per_video_in_float32(reward: Reward, whole: Tensor) -> None:
    frames = chosen(reward)
    score = reward(whole[:, frames], PROMPTS, frames)
    assert (score.shape, score.dtype) == ((len(whole),), torch.float32)
    assert score.isfinite().all()
    parts = reward.parts(whole[:, frames], PROMPTS, frames)
    torch.testing.assert_close(parts[reward.name], score)
    assert all((part.shape, part.dtype) == (score.shape, torch.float32) for part in parts.values())


def test_a_whole_video_is_scored_as_reports_do_it(reward: Reward, whole: Tensor) -> None:
    frames = list(reward.frames.report(TOTAL))
    for part in reward.parts(whole[:, frames], PROMPTS, frames).values():
        assert part.shape == (len(whole),)
        assert part.isfinite().all()


def test_it_has_a_gradient_if_and_only_if_it_says_so(reward: Reward, whole: Tensor) -> None:
    frames = chosen(reward)
    score = reward(whole[:, frames].requires_grad_(), PROMPTS, frames)
    assert score.requires_grad == reward.differentiable


def test_gradient_reaches_the_frames_used_and_no_others(trainable: Reward, whole: Tensor) -> None:
    others = registry.load("rewards", "mini_vividness")
    both = Combined([others.build(others.Config()), trainable], [0.0, 1.0])
    video = whole.clone().requires_grad_()
    frames = both.frames.pick(TOTAL, torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(both(video[:, list(frames)], PROMPTS, frames).sum(), video)
    assert len(frames) == TOTAL
    used = [i in frames.shares[1] for i in range(TOTAL)]
    assert gradient.flatten(2).abs().amax(2).bool().tolist() == [used] * len(whole)
    assert not all(used)


def test_directional_derivative_agrees_with_finite_differences(trainable: Reward, whole: Tensor) -> None:
    exact = deepcopy(trainable)
    for network in exact.networks():
        network.double()
    frames = chosen(exact)
    clip = (0.1 + 0.8 * whole[:, frames].double()).requires_grad_()  # away from where pixels are cut off
    (gradient,) = torch.autograd.grad(exact(clip, PROMPTS, frames).sum(), clip)
    rel, length, noise = ROUNDED if trainable.name == "videoreward" else EXACT
    weights = torch.rand(clip.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step = length * gradient.sign() * weights
    with torch.no_grad():
        rise = (exact(clip + step, PROMPTS, frames) - exact(clip - step, PROMPTS, frames)).sum()
    expected = 2 * float((gradient * step).sum())
    assert expected > 0
    assert float(rise) == pytest.approx(expected, rel=rel, abs=noise)


def test_a_step_along_the_gradient_raises_every_score(trainable: Reward, whole: Tensor) -> None:
    frames = chosen(trainable)
    clip = whole[:, frames].clone().requires_grad_()
    before = trainable(clip, PROMPTS, frames)
    (gradient,) = torch.autograd.grad(before.sum(), clip)
    size = 0.001 if trainable.name == "videoreward" else 0.02  # its random weights bend the score within less
    step = size * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        assert (trainable(clip + step, PROMPTS, frames) > before).all()


def test_the_second_sample_does_not_touch_the_first(reward: Reward, whole: Tensor) -> None:
    frames = chosen(reward)
    clip = whole[:, frames]
    changed = clip.clone()
    changed[1] = clip[1].flip(-1) * 0.5
    told = [PROMPTS[0], PROMPTS[2], PROMPTS[2]]
    with torch.no_grad():
        first, *_ = reward(clip, PROMPTS, frames)
        assert torch.equal(reward(changed, PROMPTS, frames)[0], first)
        torch.testing.assert_close(reward(changed, told, frames)[0], first, rtol=1e-5, atol=1e-5)


def test_a_batch_equals_its_samples_one_by_one(reward: Reward, whole: Tensor) -> None:
    frames = chosen(reward)
    clip = whole[:, frames]
    with torch.no_grad():
        together = reward(clip, PROMPTS, frames)
        alone = [reward(clip[i : i + 1], PROMPTS[i : i + 1], frames) for i in range(len(clip))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_no_parameter_receives_a_gradient(trainable: Reward, whole: Tensor) -> None:
    frames = chosen(trainable)
    clip = whole[:, frames].clone().requires_grad_()
    score = trainable(clip, PROMPTS, frames)
    assert [leaf is clip for leaf in leaves(score)] == [True]
    score.sum().backward()
    assert clip.grad is not None
    assert not [p for p in parameters(trainable) if p.requires_grad or p.grad is not None or p.is_meta]
    assert not [network for network in trainable.networks() if network.training]


def test_frozen_weights_take_no_memory_for_their_gradients(trainable: Reward, whole: Tensor) -> None:
    frames = chosen(trainable)
    clip = whole[:, frames].clone().requires_grad_()
    free: Any = deepcopy(trainable)
    for parameter in parameters(free):
        parameter.requires_grad_(True)
    assert 0 < kept_bytes(trainable, clip, frames) < kept_bytes(free, clip, frames)


@pytest.mark.parametrize("kind", every.NETWORKS)
def test_half_precision_scores_and_their_gradient_come_out_in_float32(kind: str, root: Path, whole: Tensor) -> None:
    half, full = (every.build(kind, root, dtype=dtype) for dtype in ("bfloat16", "float32"))
    frames = chosen(full)
    clip = whole[:, frames].clone().requires_grad_()
    assert torch.bfloat16 in {parameter.dtype for parameter in parameters(half)}
    score = half(clip, PROMPTS, frames)
    assert score.dtype == torch.float32
    if kind != "videoreward":  # with random weights its two layers of text turn rounding into 0.4 of a score
        torch.testing.assert_close(score, full(clip, PROMPTS, frames), atol=0.1, rtol=0.1)
    (gradient,) = torch.autograd.grad(score.sum(), clip)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert gradient.flatten(2).any(2).all()
