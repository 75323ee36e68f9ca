"""What holds for every reward on single frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import PROMPTS, video

KINDS = ("aesthetic", "hps", "pickscore", "clipscore", "yolos")
Make = Callable[..., Any]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (20, 28), (13, 9)])
def test_pixel_gradient_agrees_with_finite_differences(make: Make, kind: str, size: tuple[int, int]) -> None:
    reward = make(kind, torch.float64)
    clip = video(2, *size, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(clip, PROMPTS, [0, 1]).sum(), clip)
    rng = torch.Generator().manual_seed(5)
    for direction in (gradient.sign(), torch.randn(clip.shape, generator=rng, dtype=torch.float64)):
        step = 1e-5 * direction
        with torch.no_grad():
            rise = reward(clip + step, PROMPTS, [0, 1]).sum() - reward(clip - step, PROMPTS, [0, 1]).sum()
        assert float(rise) == pytest.approx(float(2 * (gradient * step).sum()), rel=1e-5)
    assert gradient.flatten(2).abs().amax(2).min() > 0  # every frame counts


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_mix(make: Make, kind: str) -> None:
    reward, clip = make(kind), video().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(clip, PROMPTS, [0, 1])[0], clip)
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_singles_and_a_video_the_mean_of_its_frames(make: Make, kind: str) -> None:
    reward, clip = make(kind), video(3)
    together = reward(clip, PROMPTS, [0, 1, 2])
    singles = [reward(clip[i : i + 1], PROMPTS[i : i + 1], [0, 1, 2]) for i in range(2)]
    frames = [reward(clip[:, t : t + 1], PROMPTS, [t]) for t in range(3)]
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat(singles))
    torch.testing.assert_close(together, torch.stack(frames).mean(0))
    assert float((together[0] - together[1]).abs()) > 1e-4


@pytest.mark.parametrize("kind", ["hps", "pickscore", "clipscore"])
def test_each_picture_is_scored_against_its_own_prompt(make: Make, kind: str) -> None:
    reward, same = make(kind), video()[:1].expand(2, -1, -1, -1, -1)
    straight, crossed = reward(same, PROMPTS, [0, 1]), reward(same, PROMPTS[::-1], [0, 1])
    torch.testing.assert_close(straight, crossed.flip(0))
    assert float((straight[0] - straight[1]).abs()) > 1e-3


@pytest.mark.parametrize("kind", ["hps", "pickscore", "clipscore"])
def test_each_text_is_encoded_once(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = make(kind)
    encode, encoded = reward.clip._encode, list[str]()

    def counted(texts: list[str]) -> torch.Tensor:
        encoded.extend(texts)
        return encode(texts)  # type: ignore[no-any-return]

    monkeypatch.setattr(reward.clip, "_encode", counted)
    first = reward(video(), PROMPTS, [0, 1])
    assert torch.equal(reward(video(), PROMPTS, [0, 1]), first)
    assert encoded == list(PROMPTS)


@pytest.mark.parametrize("kind", ["hps", "pickscore", "clipscore"])
def test_an_overlong_prompt_is_cut_off(make: Make, kind: str) -> None:
    reward, clip = make(kind), video()[:1]
    long = " ".join(["red"] * 10)  # 12 tokens with start and end: just what fits
    score = reward(clip, [long], [0, 1])
    assert torch.equal(reward(clip, [long + " circle" * 50], [0, 1]), score)
    assert not torch.equal(reward(clip, ["red"], [0, 1]), score)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_frozen_and_the_description_names_them(make: Make, kind: str) -> None:
    reward = make(kind, frames=3, frame_choice="even")
    assert not [p for network in reward.networks() for p in network.parameters() if p.requires_grad]
    assert not [network for network in reward.networks() if network.training]
    assert reward.frames.pick(9) == [0, 4, 8]
    described = json.loads(json.dumps(reward.description))
    assert described["kind"] == kind
    assert described["frames"] == 3
    assert len(described["weights"]) == len(reward.networks())


@pytest.mark.parametrize("kind", KINDS)
def test_description_changes_with_the_weights(make: Make, kind: str) -> None:
    from vader_nodes.vader_backend.loading import fingerprint

    for network in make(kind).networks():
        before = fingerprint(network)
        next(network.parameters()).mul_(1.5)
        assert fingerprint(network) != before


@pytest.mark.parametrize("kind", KINDS)
def test_parts_hold_the_reward_itself(make: Make, kind: str) -> None:
    reward, clip = make(kind), video()
    torch.testing.assert_close(reward.parts(clip, PROMPTS, [0, 1])[reward.name], reward(clip, PROMPTS, [0, 1]))
