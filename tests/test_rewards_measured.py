"""What the page of measured rewards says of videos whose content is known, and that its graphs are sound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, validate
from vader_nodes.tools import rewards_measured
from vader_nodes.vader_backend.mini.world import ALL_SCENES, random_look, render

CIRCLES = [scene for scene in ALL_SCENES if scene.shape == "circle"][:4]
PROMPTS = [scene.caption for scene in CIRCLES]
LOOK = random_look(4, torch.Generator().manual_seed(0))
BEFORE = render(CIRCLES, LOOK)


@pytest.mark.parametrize("name", rewards_measured.TRIALS)
def test_the_graph_holds_the_reward_and_fits(name: str) -> None:
    trial = rewards_measured.TRIALS[name]
    found = rewards_measured.nodes(trial)
    validate.check(found, NODE_CLASS_MAPPINGS)
    (train,) = (node for node in found.values() if node.class_type == "VaderTrainLoRA")
    assert found[train.inputs["reward"][0]].class_type == trial.reward
    assert train.inputs["k"] == train.inputs["sampling_steps"] == trial.steps


def test_what_is_gone_is_counted_among_the_videos_that_had_it() -> None:
    other = [replace(CIRCLES[0], shape="square"), *CIRCLES[1:3], replace(CIRCLES[3], shape="cross")]
    base = render([*CIRCLES[:3], other[3]], LOOK)
    said = rewards_measured.removed(base, render(other, LOOK), PROMPTS)
    assert "the base shows the circle in 3. It is gone in 33% of these" in said
    assert "circle 2, square 1." in said


def test_motions_are_compared_with_the_prompts() -> None:
    other = [replace(CIRCLES[0], motion="up"), replace(CIRCLES[1], motion="right"), *CIRCLES[2:]]
    wrong = sum(a.motion != b.motion for a, b in zip(CIRCLES, other, strict=True))
    said = rewards_measured.moved(render(other, LOOK), BEFORE, PROMPTS)
    assert f"right in {1 - wrong / 4:.0%} before and in 100% after" in said


def test_flicker_is_told_in_steps_of_255() -> None:
    shaken = BEFORE.lerp(torch.full_like(BEFORE, 0.5), 0.5)
    shaken[:, ::2] += 10 / 255
    said = rewards_measured.steadied(shaken, BEFORE, PROMPTS)
    assert "by 10.00 of 255 steps before and by 0.00 after; less in 100%" in said
