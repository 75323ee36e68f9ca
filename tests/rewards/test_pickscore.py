"""PickScore and CLIPScore: how they differ from each other and from HPS on one and the same network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import PROMPTS, video

Make = Callable[..., Any]


@pytest.mark.parametrize("size", [(24, 24), (20, 44), (44, 20)])
def test_pickscore_is_clipscore_times_the_learnt_scale(make: Make, size: tuple[int, int]) -> None:
    frames = video(2, *size)
    picked, cosine = (make(kind)(frames, PROMPTS, [0, 1]) for kind in ("pickscore", "clipscore"))
    scale = make("pickscore").clip.model.logit_scale.exp()
    assert float(scale) > 1.5
    torch.testing.assert_close(picked, scale * cosine)


def test_both_cut_the_edges_that_hps_squeezes_in(make: Make) -> None:
    frames = video(2, 16, 32)
    changed = frames.clone()
    changed[..., :6], changed[..., -6:] = 0, 1
    for kind, fit, seen in (
        ("pickscore", "crop", False),
        ("clipscore", "crop", False),
        ("pickscore", "squash", True),
        ("hps", "squash", True),
    ):
        reward = make(kind, fit=fit)
        assert torch.equal(reward(frames, PROMPTS, [0, 1]), reward(changed, PROMPTS, [0, 1])) != seen
    own = {kind: make(kind).clip.fit for kind in ("pickscore", "clipscore", "hps", "aesthetic")}
    assert own == {"pickscore": "crop", "clipscore": "crop", "hps": "squash", "aesthetic": "squash"}


def test_the_scale_is_exact_in_half_precision(make: Make, folder: Any) -> None:
    from vader_nodes.vader_backend.rewards import pickscore

    half = pickscore.build(pickscore.Config(checkpoint="clip", dtype="bfloat16"), lambda name: folder / name)
    whole = make("pickscore")
    assert half.clip.model.visual_projection.weight.dtype == torch.bfloat16
    assert torch.equal(half.clip.model.logit_scale, whole.clip.model.logit_scale)
    scores = [reward(video(), PROMPTS, [0, 1]) for reward in (half, whole)]
    assert scores[0].dtype == torch.float32
    assert 0 < float((scores[0] - scores[1]).abs().max()) < 0.1
