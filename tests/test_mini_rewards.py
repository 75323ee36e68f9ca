"""Every embedded reward tells good videos from bad ones; what the recipe of the newer rewards stands on."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vader_nodes.vader_backend.mini.files import ROOT, weights
from vader_nodes.vader_backend.mini.oracle import flicker, read
from vader_nodes.vader_backend.mini.recipe import (
    aesthetic_v25,
    contrasts,
    imagereward,
    preferences,
    viclip,
    videomae,
    videos,
    vjepa,
)
from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer
from vader_nodes.vader_backend.mini.world import (
    ALL_SCENES,
    SEEN_SCENES,
    UNSEEN_SCENES,
    random_look,
    random_scenes,
    render,
)
from vader_nodes.vader_backend.rewards._vjepa import Grid
from vader_nodes.vader_backend.rewards._vjepa_original import _grid

CONTRASTS = {
    **contrasts.CONTRASTS,
    "imagereward": imagereward.CONTRASTS,
    "aesthetic_v25": {"look": contrasts.looks},
}
# What a mini reward is known not to reach. Flicker, grain and leaps are what V-JEPA is for; 0.81 was measured for this.
SHORT = {("vjepa", "shuffle"): pytest.mark.xfail(reason="V-JEPA's AUC for shuffled frames is below 0.9", strict=True)}
CASES = [
    pytest.param(kind, name, marks=SHORT.get((kind, name), ())) for kind, named in CONTRASTS.items() for name in named
]
WEIGHTS = {  # bytes at most
    "videomae": 500_000,
    "vjepa": 900_000,
    "viclip": 500_000,
    "imagereward": 500_000,
    "aesthetic_v25": 350_000,
}


@cache
def reward(kind: str) -> Any:
    return contrasts.build_default(kind, ROOT)


# --- the embedded rewards --------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 17])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_good_videos_score_higher_than_bad_ones(
    kind: str, name: str, length: int, record_property: Callable[[str, object], None]
) -> None:
    found = contrasts.measure(reward(kind), CONTRASTS[kind][name], length, 120, key="test")
    record_property("auc", round(found, 4))
    print(f"AUC of {kind}, {name}, {length} frames: {found:.4f}")
    assert found >= 0.9


@pytest.mark.parametrize("kind", CONTRASTS)
def test_the_measured_auc_is_listed(kind: str) -> None:
    listed = json.loads((ROOT / "quality.json").read_text(encoding="utf-8"))
    own = listed[kind] if kind in WEIGHTS else listed["image_rewards"][kind]
    lengths = ("", "_long") if kind in contrasts.CONTRASTS else ("",)
    for name in CONTRASTS[kind].keys() - {name for short, name in SHORT if short == kind}:
        assert min(own[f"auc_{name}{length}"] for length in lengths) >= 0.9


def test_videomae_names_the_motion_of_unseen_scenes() -> None:
    model, drawn = reward("videomae"), videos.draw_videos("test", 300, UNSEEN_SCENES)
    motions = [videos.scores(model, drawn.all(), [name] * 300) for name in videomae.CLASSES]
    named = [videomae.CLASSES[i] for i in torch.stack(motions).argmax(0).tolist()]
    right = [name == f"moving {scene.motion}" for name, scene in zip(named, drawn.scenes, strict=True)]
    assert sum(right) / len(right) >= 0.97
    assert all(model.classes[f"moving {s.motion}"] == model.target(s.caption) for s in ALL_SCENES)


@pytest.mark.parametrize("length", [8, 17])
@pytest.mark.parametrize("name", videos.SPOILED)
def test_vjepa_prefers_each_video_to_what_is_made_of_it(name: str, length: int) -> None:
    model = reward("vjepa")
    draw = partial(videos.draw_videos, "test", 120, UNSEEN_SCENES, frames=model.frames, lengths=[length])
    good, bad = (videos.scores(model, v.all(), v.captions) for v in contrasts.CONTRASTS["vjepa"][name](draw))
    assert (good > bad).float().mean() >= 0.95


def test_viclip_finds_the_caption_among_eight() -> None:
    assert viclip.right_of_8(reward("viclip"), 100) >= 0.9


def test_imagereward_finds_the_caption_among_eight() -> None:
    assert imagereward.judge_imagereward(reward("imagereward"), 100)["right_of_8"] >= 0.9


def test_aesthetic_v25_follows_quality() -> None:
    judged = aesthetic_v25.judge_aesthetic_v25(reward("aesthetic_v25"), 300)
    assert judged["correlation"] >= 0.95
    assert judged["mean_absolute_error"] <= 0.5


@torch.no_grad()
def test_features_to_predict_differ_from_place_to_place() -> None:
    model, drawn = reward("vjepa"), videos.draw_videos("test", 60, UNSEEN_SCENES)
    features = model.predictive.targets(model.view(drawn.all()).transpose(1, 2))
    loss = -videos.scores(model, drawn.all(), drawn.captions).mean()
    assert loss < 0.6 * (features - features.mean(1, keepdim=True)).abs().mean()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_small_halves_that_everyone_may_read(kind: str) -> None:
    files = [file for file in weights(kind).rglob("*") if file.is_file()]
    tensors = [file for file in files if file.suffix == ".safetensors"]
    assert 0 < sum(file.stat().st_size for file in tensors) <= WEIGHTS[kind]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert {tensor.dtype for file in tensors for tensor in load_file(file).values()} == {torch.float16}


# --- good and bad videos ---------------------------------------------------------------------


def test_auc_by_hand() -> None:
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    assert contrasts.auc(good, bad) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert contrasts.auc(bad, bad) == 0.5
    assert contrasts.auc(bad - 5, good) == 0


@pytest.mark.parametrize("name", ["caption", "motion"])
def test_captions_are_wrong_in_what_they_should_be(name: str) -> None:
    good, bad = contrasts.CONTRASTS["viclip"][name](lambda **_: videos.draw_videos("test", 40))
    assert torch.equal(good.frames, bad.frames)
    for own, other in zip(good.scenes, bad.scenes, strict=True):
        still = (own.color, own.shape, own.background) == (other.color, other.shape, other.background)
        assert still == (name == "motion")
        assert own != other
    assert len({scene.motion for scene in bad.scenes}) == 4


def test_looks_and_circles_are_told_by_the_oracle() -> None:
    draw: Callable[..., videos.Videos] = lambda **given: videos.draw_videos("test", 60, lengths=[8], **given)  # noqa: E731
    vivid, pale = ([r.strength for r in read(part.all()) if r.color] for part in contrasts.looks(draw))
    assert min(vivid) > max(pale)
    without, having = ([r.shape for r in read(part.all())] for part in contrasts.circles(draw))
    assert len(without) + len(having) == 60
    assert without.count("circle") <= 1
    assert having.count("circle") >= len(having) - 1


@pytest.mark.parametrize("name", videos.SPOILED)
def test_spoiled_videos_keep_what_is_not_spoiled(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    video = render(ALL_SCENES[:6], random_look(6, rng))
    bad = videos.SPOILED[name](video, rng)
    assert bad.shape == video.shape
    assert bad.min() >= 0
    assert bad.max() <= 1
    frames, others = (part.flatten(2).sort(-1).values for part in (video, bad))
    gaps = (frames[:, :, None] - others[:, None]).abs().amax(-1)  # [B, T, T]: of every two frames' pixels
    if name in ("flicker", "noise"):
        assert gaps.amin(-1).min() > 0.01
        assert (bad - video).abs().mean() < 0.15
    elif name == "shuffle":
        distance = (video[:, :, None] - bad[:, None]).abs().amax((3, 4, 5))
        assert (distance.amin(1) == 0).all()
        assert (distance.diagonal(dim1=1, dim2=2) > 0).any(1).all()
    else:
        assert (gaps.diagonal(dim1=1, dim2=2) == 0).all()
        assert ((bad - video).abs().amax((2, 3, 4)) > 0.1).sum(1).min() >= 5


def test_hazy_videos_have_less_contrast() -> None:
    good, bad = preferences.hazy(lambda **given: videos.draw_videos("test", 60, lengths=[8], **given))
    contrast = [(part.all() - 0.5).abs().mean((1, 2, 3, 4)) for part in (good, bad)]
    assert contrast[0].min() > contrast[1].max()
    assert not [scene for scene in (*good.scenes, *bad.scenes) if scene.background == "gray"]


def test_captions_are_right_in_the_share_that_is_told() -> None:
    rng = torch.Generator().manual_seed(0)
    names = tuple(preferences.VALUES)
    shares = []
    for scene in random_scenes(400, rng, SEEN_SCENES):
        other, share = preferences.partly_right(scene, names, rng)
        assert share == sum(getattr(other, name) == getattr(scene, name) for name in names) / len(names)
        shares.append(share)
    assert set(shares) == {0, 0.25, 0.5, 0.75, 1}
    assert 0.4 < shares.count(1) / len(shares) < 0.6


def test_flicker_is_told_by_the_oracle() -> None:
    rng = torch.Generator().manual_seed(0)
    video = render(ALL_SCENES[:6], random_look(6, rng))
    assert flicker(video).max() == 0  # moving shapes are none
    shift = 0.1 * torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0])[None, :, None, None, None]
    torch.testing.assert_close(flicker(video.lerp(torch.full_like(video, 0.5), 0.5) + shift), torch.full((6,), 0.1))
    assert flicker(videos.SPOILED["noise"](video, rng)).min() > 0.02


def test_longer_videos_are_cut_to_the_same_number_of_frames() -> None:
    drawn = videos.draw_videos("test", 150, lengths=[8, 17])
    assert drawn.frames.shape == (150, 8, 3, 64, 64)
    shown = [reading.motion == scene.motion for reading, scene in zip(read(drawn.all()), drawn.scenes, strict=True)]
    assert sum(shown) >= 148
    assert torch.equal(drawn.at(torch.tensor([3, 5])), drawn.all()[[3, 5]])


# --- layouts ---------------------------------------------------------------------------------


def test_positions_tell_the_grid_that_they_are_for() -> None:
    for grid in (Grid(4, 8, 8), Grid(3, 2, 2)):
        table = vjepa.positions(grid, 48)
        assert table.shape == (1, len(grid), 48)
        assert _grid(table.half()) == grid
        assert (torch.cdist(table[0], table[0]) + torch.eye(len(grid)) > 0.1).all()


def test_what_no_good_video_has_is_loud() -> None:
    encoder = vjepa.new_vjepa().encoder
    good = videos.draw_videos("test", 60, change=videos.soften).all()
    vjepa.fix_patches(encoder, vjepa.normalise(good, vjepa.IMAGENET_NORM).transpose(1, 2))

    def loudness(video_BTCHW: Tensor) -> float:
        patches = encoder.patch_embed(vjepa.normalise(video_BTCHW, vjepa.IMAGENET_NORM).transpose(1, 2))
        return float((patches.flatten(2).transpose(1, 2) + encoder.pos_embed.mean((0, 1))).square().mean().sqrt())

    own = loudness(good)
    assert own == pytest.approx(vjepa._LOUDNESS, rel=1e-3)
    rng = torch.Generator().manual_seed(0)
    assert min(loudness(change(good, rng)) for change in videos.SPOILED.values()) > 1.2 * own
    assert not any(p.requires_grad for p in encoder.patch_embed.parameters())


def test_an_untrained_vjepa_is_read_back(tmp_path: Path) -> None:
    network = vjepa.new_vjepa()
    vjepa.save_vjepa(network, tmp_path / "vjepa" / "vjepa.safetensors")
    read_back = contrasts.build_default("vjepa", tmp_path)
    for key, tensor in read_back.predictive.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[key].half().float()), key
    video = torch.rand(1, 8, 3, 64, 64)
    assert torch.equal(read_back.view(video), vjepa.normalise(video, vjepa.IMAGENET_NORM))


def test_the_target_encoder_follows_slower_and_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vjepa, "_POOL", 20)
    network = vjepa.train_vjepa(tmp_path, steps=3)
    first = vjepa.new_vjepa()
    for part in (first.encoder, first.target_encoder):
        part.patch_embed.load_state_dict(network.encoder.patch_embed.state_dict())
    moved = {
        part: _moved(getattr(first, part).state_dict(), getattr(network, part).state_dict())
        for part in ("encoder", "target_encoder")
    }
    assert 0 < moved["target_encoder"] < 0.1 * moved["encoder"]
    for part in (network.encoder, network.target_encoder):
        assert torch.equal(part.pos_embed, first.encoder.pos_embed)


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return float(sum((after[key] - tensor).norm() for key, tensor in before.items()))


def test_a_viclip_is_written_as_it_is_read(tmp_path: Path) -> None:
    words = len(save_tokenizer(tmp_path / "viclip"))
    model = viclip.new_viclip(words)
    tensors = viclip.published(model, words)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == viclip.shapes(words)
    viclip.save_viclip(model, words, tmp_path / "viclip" / "model.safetensors")
    read_back = contrasts.build_default("viclip", tmp_path).clip.model.state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(read_back[key], tensor.half().float(), rtol=1e-3, atol=1e-4, msg=key)


def save_untrained(kind: str, root: Path) -> Any:
    """Write fresh weights where the reward's default settings look for them."""
    if kind == "aesthetic_v25":
        made: Any = aesthetic_v25.new_aesthetic_v25()
        aesthetic_v25.save_aesthetic_v25(made, root / kind)
    else:
        made = imagereward.new_imagereward(imagereward.save_bert_tokenizer(root / "words"))
        imagereward.save_imagereward(made, root / kind)
    return made


@pytest.mark.parametrize("kind", ["imagereward", "aesthetic_v25"])
def test_networks_are_written_as_they_are_read(kind: str, tmp_path: Path) -> None:
    made = save_untrained(kind, tmp_path)
    for ours, theirs in zip(made.networks(), contrasts.build_default(kind, tmp_path).networks(), strict=True):
        read_back = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(read_back[name], tensor.half().float(), msg=name)


def test_words_of_captions_are_single_pieces_and_other_text_survives(tmp_path: Path) -> None:
    tokenizer = imagereward.save_bert_tokenizer(tmp_path)
    for scene in ALL_SCENES:
        assert tokenizer.tokenize(scene.caption) == scene.caption.split()
    text = "a zebra, 7 boats & more"
    pieces = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(pieces).replace(" ", "") == text.replace(" ", "")
