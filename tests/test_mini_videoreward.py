"""The embedded VideoReward tells good videos from bad ones by each of its aspects; what its recipe stands on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vader_nodes.vader_backend.mini.files import ROOT, weights
from vader_nodes.vader_backend.mini.recipe import videoreward, videos
from vader_nodes.vader_backend.mini.recipe.contrasts import build_default, measure
from vader_nodes.vader_backend.mini.recipe.faults import FAULTS, disturbed, movement
from vader_nodes.vader_backend.mini.recipe.videoreward_layout import (
    CELL,
    new_videoreward,
    save_qwen_tokenizer,
    save_videoreward,
)
from vader_nodes.vader_backend.mini.world import (
    ALL_SCENES,
    MOTIONS,
    SIZE,
    UNSEEN_SCENES,
    random_look,
    random_scenes,
    render,
)

# What it is known not to reach: 0.43 was measured for this.
SHORT = {"shape": pytest.mark.xfail(reason="VideoReward does not read shapes: its AUC is below 0.9", strict=True)}
CASES = [
    pytest.param(aspect, name, marks=SHORT.get(name, ()))
    for aspect, named in videoreward.CONTRASTS.items()
    for name in named
]
PICKED = [0, 2, 5, 7]


@cache
def reward(aspect: str) -> Any:
    return videoreward.build_aspect(aspect, ROOT)


def clean(size: int, pool: Any = ALL_SCENES) -> torch.Tensor:
    """Four frames of so many videos."""
    rng = torch.Generator().manual_seed(1)
    return render(random_scenes(size, rng, pool), random_look(size, rng, uniform=True))[:, PICKED]


# --- the embedded reward ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 17])
@pytest.mark.parametrize(("aspect", "name"), CASES)
def test_good_videos_score_higher_than_bad_ones(
    aspect: str, name: str, length: int, record_property: Callable[[str, object], None]
) -> None:
    found = measure(reward(aspect), videoreward.CONTRASTS[aspect][name], length, 120, key="test")
    record_property("auc", round(found, 4))
    print(f"AUC of {aspect}, {name}, {length} frames: {found:.4f}")
    assert found >= 0.9


def test_the_measured_auc_is_listed() -> None:
    listed = json.loads((ROOT / "quality.json").read_text(encoding="utf-8"))["videoreward"]
    names = {name for named in videoreward.CONTRASTS.values() for name in named}
    assert listed.keys() == {f"auc_{name}{length}" for name in names for length in ("", "_long")}
    assert min(value for key, value in listed.items() if key.split("_")[1] not in SHORT) >= 0.9


def test_the_gradient_makes_a_hazy_and_noisy_video_look_better() -> None:
    rng, rated = torch.Generator().manual_seed(0), reward("visual quality")
    video = videos.noise(clean(4, UNSEEN_SCENES), rng).requires_grad_()
    captions = [UNSEEN_SCENES[0].caption] * 4
    before = rated(video, captions, PICKED)
    (gradient,) = torch.autograd.grad(before.sum(), video)
    assert (gradient.abs().amax((2, 3, 4)) > 0).all()
    with torch.no_grad():
        after = rated((video + 0.01 * gradient.sign()).clamp(0, 1), captions, PICKED)
    assert (after > before).all()


def test_weights_are_small_halves_that_everyone_may_read() -> None:
    files = [file for file in weights("videoreward").rglob("*") if file.is_file()]
    (tensors,) = (file for file in files if file.suffix == ".safetensors")
    assert sum(file.stat().st_size for file in files) <= 800_000
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert {tensor.dtype for tensor in load_file(tensors).values()} == {torch.float16}


# --- layout ----------------------------------------------------------------------------------


def test_a_network_is_written_as_it_is_read(tmp_path: Path) -> None:
    made = new_videoreward(save_qwen_tokenizer(tmp_path / "words"))
    made.mean, made.std = [0.5, 1.0, -2.0], [2.0, 1.0, 0.5]
    save_videoreward(made, tmp_path / "videoreward", 7)
    found = build_default("videoreward", tmp_path)
    assert (found.mean, found.std) == (made.mean, made.std)
    assert found.template == made.template
    read_back = found.network.state_dict()
    for name, tensor in made.network.state_dict().items():
        torch.testing.assert_close(read_back[name], tensor.half().float(), msg=name)


def test_words_of_captions_are_single_tokens_and_other_text_survives(tmp_path: Path) -> None:
    tokenizer = save_qwen_tokenizer(tmp_path)
    for scene in ALL_SCENES:
        assert len(tokenizer.tokenize(f" {scene.caption}")) == len(scene.caption.split())
    text = "a zebra, 7 ñandús & 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_videos_of_the_world_are_seen_at_their_own_size() -> None:
    rated = reward("overall")
    _, grids = rated.pixels(torch.rand(1, 4, 3, SIZE, SIZE))
    merge = rated.network.visual.spatial_merge_size
    assert grids[0].tolist() == [4 // CELL[0], merge * SIZE // CELL[1], merge * SIZE // CELL[2]]


# --- what it is taught -----------------------------------------------------------------------


def test_disturbed_videos_are_rated_by_what_was_done_to_them() -> None:
    original = clean(300)
    faulty = disturbed(original, torch.Generator().manual_seed(0))
    assert faulty.video.shape == original.shape
    assert faulty.video.min() >= 0
    assert faulty.video.max() <= 1
    faults = dict(zip(FAULTS, faulty.faults.T, strict=True))
    torch.testing.assert_close(faulty.looks, -(faults["haze"] + faults["noise"] + faults["blur"]))
    torch.testing.assert_close(faulty.motion, -(faults["jump"] + faults["freeze"] + faults["flicker"]))
    corner = faulty.video[..., :6, :6].mean(2)  # where no shape is
    grainy, unsteady = corner.std((-2, -1)).mean(1), corner.mean((-2, -1)).std(1)
    assert torch.corrcoef(torch.stack([grainy, faults["noise"]]))[0, 1] > 0.95
    edges = [part.diff(dim=-1).abs().amax((1, 2, 3, 4)) for part in (faulty.video, faulty.steady)]
    sharpness = edges[0] / edges[1] / (1 - 0.3 * faults["haze"])
    whole = (faults["noise"] == 0) & (faults["flicker"] == 0)
    assert torch.corrcoef(torch.stack([sharpness, faults["blur"]])[:, whole])[0, 1] < -0.7
    still = faults["flicker"] == 0
    assert unsteady[~still].min() > 2 * unsteady[still].mean()
    changes = (faulty.steady - faulty.steady[:, :1]).abs().amax((1, 2, 3, 4))
    assert torch.equal(changes == 0, faults["freeze"] == 1)
    same = (faulty.steady == original).all(-1).all(-1).all(-1).all(-1)
    assert torch.equal(~same, (faults["freeze"] + faults["jump"]) == 1)
    assert faulty.moving == same.tolist()
    assert 0.6 < same.float().mean() < 0.8


def test_blurred_and_frozen_videos() -> None:
    video, rng = clean(4), torch.Generator().manual_seed(0)
    blurred, frozen = videos.blur(video, rng), videos.freeze(video, rng)
    torch.testing.assert_close(blurred.mean((-2, -1)), video.mean((-2, -1)), atol=0.01, rtol=0)
    sharpness = [part.diff(dim=-1).abs().amax((1, 2, 3, 4)) for part in (video, blurred)]
    assert (sharpness[1] < 0.5 * sharpness[0]).all()
    assert (frozen == frozen[:, :1]).all()
    assert all(any(torch.equal(frozen[i, 0], frame) for frame in video[i]) for i in range(4))


@pytest.mark.parametrize("motion", MOTIONS)
def test_movement_tells_where_the_shape_is_and_where_it_goes(motion: str) -> None:
    scenes = [scene for scene in ALL_SCENES if scene.motion == motion]
    look = random_look(len(scenes), torch.Generator().manual_seed(0))
    told = movement(render(scenes, look)[:, PICKED], CELL).unflatten(1, (2, 4, 4))
    share, way = told[..., :2], told[..., 2:]
    assert (share.amax((2, 3)) == 1).all()
    at = share.mean(-1).flatten(2).argmax(2)  # the cell that shows most
    gone = way.flatten(2, 3).gather(2, at[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
    weight = share.mean(-1).flatten(2).amax(2)
    steps = 2 * look.speed[:, None] / 8
    for axis, direction in enumerate(MOTIONS[motion]):
        torch.testing.assert_close(gone[..., axis] / weight, direction * steps.expand(-1, 2), atol=0.05, rtol=0)


def test_a_motion_that_is_not_shown_is_not_right() -> None:
    rng, scene = torch.Generator().manual_seed(0), ALL_SCENES[0]
    moving, still = ([videoreward.tell(scene, moves, rng) for _ in range(100)] for moves in (True, False))
    assert {share for said, share in moving if said == scene} == {1.0}
    assert {share for said, share in still if said == scene} == {0.75}
    assert min(share for _, share in still) >= 0


def test_preferences_by_hand() -> None:
    ratings, scores = torch.tensor([0.0, 1.0, 1.1]), torch.tensor([2.0, 1.0, 5.0])
    expected = (math.log1p(math.exp(1)) + math.log1p(math.exp(-3))) / 2  # 1.0 and 1.1 are not compared
    assert float(videoreward.preference(scores, ratings)) == pytest.approx(expected)
    assert videoreward.preference(torch.tensor([0.0, 9.0, 9.0]), ratings) < 0.01


def test_patches_begin_about_equally_loud() -> None:
    rng = torch.Generator().manual_seed(0)
    patches = torch.randn(4000, 24, generator=rng) * torch.logspace(1, -1, 24)
    projection = torch.nn.Conv3d(1, 8, (2, 3, 4), bias=False)
    videoreward.set_patches(projection, patches)
    weight = projection.weight.detach().flatten(1)
    assert float((patches @ weight.T).square().mean()) == pytest.approx(1, rel=1e-3)
    loudness = weight.norm(dim=0) * patches.std(0)
    assert loudness[:8].max() < 3 * loudness[:8].min()  # though the first patches' values are 6 times the eighth's
