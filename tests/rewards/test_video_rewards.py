"""What holds for every reward on whole videos: VideoMAE, and V-JEPA from either source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.types import FrameSpec

from .conftest import video
from .video_networks import ACTIONS, FRAMES, SOURCES, build

KINDS = tuple(SOURCES)
ALL = range(FRAMES)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    for kind, (_, save, _) in SOURCES.items():
        save(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (20, 28), (50, 37)])
@pytest.mark.parametrize("kind", KINDS)
def test_pixel_gradient_agrees_with_finite_differences(
    sources: dict[str, Path], kind: str, size: tuple[int, int], fit: str
) -> None:
    reward = build(kind, sources[kind], torch.float64, fit=fit)
    clip = video(FRAMES, *size, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(clip, ACTIONS, ALL).sum(), clip)
    rng = torch.Generator().manual_seed(5)
    for direction in (gradient.sign(), torch.randn(clip.shape, generator=rng, dtype=torch.float64)):
        step = 1e-6 * direction
        with torch.no_grad():
            rise = reward(clip + step, ACTIONS, ALL).sum() - reward(clip - step, ACTIONS, ALL).sum()
        assert float(rise) == pytest.approx(float(2 * (gradient * step).sum()), rel=1e-4)
    assert gradient.flatten(2).abs().amax(2).min() > 0  # every frame counts


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_chosen_frames_and_no_parameter(sources: dict[str, Path], kind: str) -> None:
    reward = build(kind, sources[kind], frame_choice="strided")
    whole = video(9).requires_grad_()
    chosen = reward.frames.pick(9)
    assert chosen == [0, 2, 4, 6]
    reward(whole[:, chosen], ACTIONS, chosen).sum().backward()
    assert whole.grad is not None
    assert whole.grad.flatten(2).abs().amax(2).bool().tolist() == [[i in chosen for i in range(9)]] * 2
    for network in reward.networks():
        assert not network.training
        assert not [p for p in network.parameters() if p.requires_grad or p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_mix_and_a_batch_equals_its_singles(sources: dict[str, Path], kind: str) -> None:
    reward, clip = build(kind, sources[kind]), video(FRAMES).requires_grad_()
    together = reward(clip, ACTIONS, ALL)
    assert (together.shape, together.dtype) == ((2,), torch.float32)
    assert float((together[0] - together[1]).detach().abs()) > 1e-5
    (gradient,) = torch.autograd.grad(together[0], clip)
    assert gradient[0].any()
    assert not gradient[1].any()
    with torch.no_grad():
        singles = [reward(clip[i : i + 1], ACTIONS[i : i + 1], ALL) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(singles))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_frames_matters(sources: dict[str, Path], kind: str) -> None:
    reward, clip = build(kind, sources[kind]), video(FRAMES)
    assert not torch.allclose(reward(clip, ACTIONS, ALL), reward(clip.flip(1), ACTIONS, ALL), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_scores_are_near(sources: dict[str, Path], kind: str) -> None:
    clip = video(FRAMES)
    half, full = (build(kind, sources[kind], dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert {p.dtype for network in half.networks() for p in network.parameters()} == {torch.bfloat16}
    assert half(clip, ACTIONS, ALL).dtype == torch.float32
    torch.testing.assert_close(half(clip, ACTIONS, ALL), full(clip, ACTIONS, ALL), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_the_networks_own_unless_told(sources: dict[str, Path], kind: str) -> None:
    assert build(kind, sources[kind]).frames == FrameSpec("even", FRAMES, exact=True)
    more = build(kind, sources[kind], frames=6, frame_choice="first")
    assert more.frames == FrameSpec("first", 6, exact=True)
    assert more(video(6), ACTIONS, range(6)).isfinite().all()
    with pytest.raises(InputError, match="scores 6 frames at a time, but was given 7; leave reward_frames"):
        more(video(7), ACTIONS, range(7))
    with pytest.raises(InputError, match="groups of 2; set a multiple"):
        build(kind, sources[kind], frames=5)


@pytest.mark.parametrize("kind", KINDS)
def test_description_tells_settings_and_weights(sources: dict[str, Path], kind: str) -> None:
    told = json.loads(json.dumps(build(kind, sources[kind], fit="squash").description))
    assert (told["kind"], told["fit"]) == (SOURCES[kind][0], "squash")
    assert len(told["weights"]) == 1
