"""The embedded CLIP, aesthetic head and detector: their quality on fresh renders, and the recipe's own measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.loading import load_frozen
from vader_nodes.vader_backend.mini.files import locate, weights
from vader_nodes.vader_backend.mini.recipe import clip as clip_recipe
from vader_nodes.vader_backend.mini.recipe.aesthetic import judge_aesthetic
from vader_nodes.vader_backend.mini.recipe.detector import (
    average_precision,
    draw_stills,
    generalised_iou,
    iou,
    judge_detector,
)
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, Look, parse_caption, render
from vader_nodes.vader_backend.registry import load
from vader_nodes.vader_backend.rewards._clip import Clip, load_clip
from vader_nodes.vader_backend.rewards.aesthetic import load_head


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(weights("clip"))


def fresh(vivid: float = 0.8, haze: float = 0.2) -> tuple[torch.Tensor, list[str]]:
    """One video per some seen scenes, all of one look."""
    scenes = SEEN_SCENES[::12]
    one = torch.ones(len(scenes))
    middle = torch.full((len(scenes), 2), 32.0)
    look = Look(vivid=vivid * one, haze=haze * one, radius=10 * one, start=middle, speed=3 * one)
    return render(scenes, look), [scene.caption for scene in scenes]


def test_clip_finds_the_caption_among_eight(clip: Clip) -> None:
    judged = clip_recipe.judge_clip(clip.model, clip.tokenizer, trials=400)
    assert judged["right_of_8"] >= 0.95
    assert judged["vivid"] >= 0.9
    assert judged["haze"] >= 0.9


def test_aesthetic_head_follows_quality(clip: Clip) -> None:
    head = load_head(weights("aesthetic/head.safetensors"), clip.width)
    judged = judge_aesthetic(clip, head, trials=400)
    assert judged["correlation"] >= 0.9
    assert judged["mean_absolute_error"] <= 1.0


def test_detector_finds_shapes() -> None:
    from transformers import YolosForObjectDetection

    detector = load_frozen(YolosForObjectDetection, weights("detector"), torch.float32, "detector")
    assert judge_detector(detector, 300)["AP50"] >= 0.9


def test_aesthetic_reward_prefers_vivid_and_clear_videos() -> None:
    module = load("rewards", "aesthetic")
    reward = module.build(module.Config())
    scores = [reward(*fresh(vivid, haze), list(range(8))).mean() for vivid, haze in ((0, 1), (0.5, 0.5), (1, 0))]
    assert scores[0] + 2 < scores[1] < scores[2] - 2


def test_yolos_reward_tells_a_circle_from_none() -> None:
    module = load("rewards", "yolos")
    reward = module.build(module.Config(target="circle", mode="keep"))
    video, prompts = fresh()
    parts = reward.parts(video, prompts, list(range(8)))
    shows = torch.tensor([parse_caption(prompt).shape == "circle" for prompt in prompts])
    for score in parts.values():
        assert score[shows].mean() > score[~shows].mean() + 0.5


def test_embedded_weights_are_small_and_named() -> None:
    parts = [weights(name) for name in ("clip", "aesthetic", "detector")]
    assert sum(path.stat().st_size for part in parts for path in part.rglob("*.safetensors")) <= 5_000_000
    assert weights("aesthetic/head.safetensors").stat().st_size <= 500_000
    assert locate("mini/clip") == weights("clip")
    assert locate("some/folder") == Path("some/folder")
    for name in ("clop", "../recipe", "clip/absent"):
        with pytest.raises(InputError, match="no embedded weights"):
            weights(name)


# --- the recipe's own measures ---------------------------------------------------------------


def test_texts_say_only_what_is_true() -> None:
    frames = clip_recipe.draw_frames("test", 300)
    rng = torch.Generator().manual_seed(0)
    said = set()
    for scene, facts, vivid, haze in zip(frames.scenes, frames.facts, frames.look.vivid, frames.look.haze, strict=True):
        text, named = clip_recipe.describe(scene, facts, rng)
        words = {"vivid": vivid > 0.6, "pale": vivid < 0.4, "hazy": haze > 0.6, "clear": haze < 0.4}
        said |= {word for word in words if word in text}
        assert all(true for word, true in words.items() if word in text)
        assert f"{scene.color} {scene.shape}" in text
        assert ("vivid" in text or "pale" in text) == bool(named[1])
    assert said == {"vivid", "pale", "hazy", "clear"}


def test_frames_alike_but_for_the_motion_count_as_one() -> None:
    frames = clip_recipe.draw_frames("test", 300)
    shown = [(scene.color, scene.shape, scene.background) for scene in frames.scenes]
    kinds = frames.facts[:, 0].tolist()
    assert len(set(zip(shown, kinds, strict=True))) == len(set(shown)) == len(set(kinds))


def test_boxes_lie_around_the_shapes() -> None:
    images, boxes, classes = draw_stills("test", 60)
    assert {len(found) for found in boxes} == {0, 1, 2, 3}
    for picture, found, kinds in zip(images, boxes, classes, strict=True):
        assert len(found) == len(kinds)
        outside = torch.ones(64, 64, dtype=torch.bool)
        for x, y, width, height in (found * 64).round().int().tolist():
            outside[
                max(0, y - height // 2 - 2) : y + height // 2 + 2, max(0, x - width // 2 - 2) : x + width // 2 + 2
            ] = False
        if len(found):
            assert picture[:, outside].std(1).max() < 1e-3


def test_overlap_of_boxes() -> None:
    box = torch.tensor([0.5, 0.5, 0.2, 0.2])
    assert float(iou(box, box)) == pytest.approx(1)
    assert float(iou(box, torch.tensor([0.6, 0.5, 0.2, 0.2]))) == pytest.approx(1 / 3)
    apart = torch.tensor([0.9, 0.5, 0.2, 0.2])
    assert float(iou(box, apart)) == 0
    assert float(generalised_iou(box, apart)) == pytest.approx(-1 / 3)  # hull .6 x .2, of which .2 x .2 is empty


def test_average_precision_by_hand() -> None:
    one, two, off = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.5, 0.2, 0.2, 0.2]])
    truth = [torch.stack([one, two]), torch.empty(0, 4)]
    assert average_precision([(0.9, 0, one), (0.8, 0, two)], truth) == pytest.approx(1)
    assert average_precision([(0.9, 0, one), (0.8, 0, one), (0.7, 0, two)], truth) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision([(0.9, 1, one), (0.8, 0, two)], truth) == pytest.approx(0.5 * 0.5)
    assert average_precision([(0.9, 0, off)], truth) == 0
    assert average_precision([], truth) == 0
