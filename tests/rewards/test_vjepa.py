"""The V-JEPA reward: parity with the original, V-JEPA 2 against transformers, masks, what the gradient reaches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from vader_nodes.tools.parity import vjepa as parity
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.rewards._vjepa import Grid
from vader_nodes.vader_backend.rewards._vjepa_masks import Blocks, draw
from vader_nodes.vader_backend.rewards._vjepa_original import build_vjepa
from vader_nodes.vader_backend.rng import generator

from .conftest import video
from .video_networks import ACTIONS, FIXTURE, FRAMES, SIZE, build, save_vjepa, save_vjepa2, vjepa_parts

KINDS = ("vjepa", "vjepa2")
ALL = range(FRAMES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vjepa")
    torch.manual_seed(0)
    save_vjepa(root / "vjepa")
    save_vjepa2(root / "vjepa2")
    return {kind: root / kind for kind in KINDS}


def test_networks_and_loss_equal_the_original() -> None:
    results = compare(read(FIXTURE), parity.vjepa)
    assert len(results) == 12
    assert all(ok for _, _, ok in results), results


def test_every_weight_of_the_published_checkpoint_is_used() -> None:
    listed = json.loads(gzip.decompress((FIXTURE.parent / "vjepa_keys.json.gz").read_bytes()))
    tensors = {key: torch.empty(shape, device="meta") for key, shape in listed["keys"].items()}
    for part in ("encoder", "target_encoder"):
        table = torch.zeros(tensors[f"{part}/module.backbone.pos_embed"].shape)
        table[0, :, 0] = torch.arange(8).repeat_interleave(14 * 14).sin()
        tensors[f"{part}/module.backbone.pos_embed"] = table
    network = build_vjepa(tensors, Path("vitl16.pth.tar"))
    assert len(network.state_dict()) == len(tensors) == listed["n_keys"]
    assert sum(p.numel() for p in network.parameters()) == listed["n_params"]
    assert (network.cell, network.video) == ((2, 16), (16, 224))
    assert network.encoder.blocks[0].attn.heads == network.predictor.predictor_blocks[0].attn.heads == 16


def test_safetensors_with_the_same_keys_score_the_same(sources: dict[str, Path], tmp_path: Path) -> None:
    flat = {
        f"{part}/{key}": tensor.contiguous() for part, table in vjepa_parts().items() for key, tensor in table.items()
    }
    save_file(flat, tmp_path / "vitl16.safetensors")
    (tmp_path / "vitl16.safetensors").rename(tmp_path / "model.safetensors")
    clip = video(FRAMES)
    both = [build(kind, path)(clip, ACTIONS, ALL) for kind, path in (("vjepa", sources["vjepa"]), ("vjepa2", tmp_path))]
    assert torch.equal(*both)


def test_a_checkpoint_without_a_part_is_refused(tmp_path: Path) -> None:
    whole = vjepa_parts()
    torch.save({"target_encoder": whole["target_encoder"], "epoch": 3}, tmp_path / "vitl16.pth.tar")
    with pytest.raises(InputError, match=r"is not a V-JEPA checkpoint.* it lacks encoder, predictor"):
        build("vjepa", tmp_path)
    del whole["predictor"]["module.backbone.predictor_norm.bias"]
    torch.save(whole, tmp_path / "vitl16.pth.tar")
    with pytest.raises(InputError, match=r"weights missing: 1, such as predictor.predictor_norm.bias"):
        build("vjepa", tmp_path)


def test_vjepa2_predicts_what_transformers_predicts(sources: dict[str, Path]) -> None:
    reward = build("vjepa2", sources["vjepa2"])
    model, clips = reward.predictive.model, reward.view(video(FRAMES, SIZE, SIZE))
    every, hidden = torch.arange(32).expand(2, -1), torch.tensor([[3, 7, 30], [0, 11, 12]])
    with torch.no_grad():
        theirs = model(clips, context_mask=[every], target_mask=[hidden])
        ours = reward.predictive.predict(clips.transpose(1, 2), every, hidden, 1)
        first = reward.predictive.predict(clips.transpose(1, 2), every, hidden, 0)
        target = reward.predictive.targets(clips.transpose(1, 2))
    torch.testing.assert_close(ours, theirs.predictor_output.last_hidden_state)
    torch.testing.assert_close(target, F.layer_norm(theirs.last_hidden_state, (24,)))
    assert not torch.allclose(first, ours, atol=1e-3)  # each setting of masks has its own mask token


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_does_not_see_what_is_hidden(sources: dict[str, Path], kind: str) -> None:
    reward = build(kind, sources[kind])
    mask = reward.masks[1]
    clips = reward.view(video(FRAMES, SIZE, SIZE)).transpose(1, 2).requires_grad_()
    seen, hidden = mask.seen_K.expand(2, -1), mask.hidden_M.expand(2, -1)
    predicted = reward.predictive.predict(clips, seen, hidden, mask.kind)
    (gradient,) = torch.autograd.grad(predicted.square().sum(), clips)
    cells = gradient.unflatten(2, (2, 2)).unflatten(4, (4, 8)).unflatten(6, (4, 8)).abs().sum((1, 3, 5, 7)).flatten(1)
    assert cells.bool().tolist() == [[i in mask.seen_K.tolist() for i in range(32)]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_keep_their_places_in_whatever_order_they_come(sources: dict[str, Path], kind: str) -> None:
    reward = build(kind, sources[kind])
    clips = reward.view(video(FRAMES, SIZE, SIZE)).transpose(1, 2)
    seen, hidden = (torch.tensor(places).expand(2, -1) for places in ([5, 9, 20, 31], [3, 7]))
    with torch.no_grad():
        straight, turned = (reward.predictive.predict(clips, some, hidden, 0) for some in (seen, seen.flip(1)))
        elsewhere = reward.predictive.predict(clips, seen, hidden + 1, 0)
    torch.testing.assert_close(straight, turned)
    assert not torch.allclose(straight, elsewhere, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_without_target_gradient_the_target_counts_as_given(sources: dict[str, Path], kind: str) -> None:
    clip = video(FRAMES, SIZE, SIZE).requires_grad_()
    settings: dict[str, Any] = {"fit": "squash", "small_blocks": 0}
    with_target, without = (build(kind, sources[kind], target_gradient=on, **settings) for on in (True, False))
    assert torch.equal(with_target(clip, ACTIONS, ALL), without(clip, ACTIONS, ALL))
    whole, partial = (torch.autograd.grad(r(clip, ACTIONS, ALL).sum(), clip)[0] for r in (with_target, without))

    def cells(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.unflatten(3, (4, 8)).unflatten(5, (4, 8)).abs().sum((1, 2, 4, 6)).flatten(1)[0]

    (mask,) = without.masks
    seen = mask.seen_K[mask.seen_K < 16].tolist()
    assert cells(whole).bool().all()
    assert cells(partial).bool().tolist() == [i in seen for i in range(16)]
    assert clip.requires_grad
    with torch.no_grad():
        assert not with_target(clip, ACTIONS, ALL).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_minus_the_mean_loss_over_the_masks(sources: dict[str, Path], kind: str) -> None:
    clip = video(FRAMES)
    reward = build(kind, sources[kind], masks=3)
    assert [mask.kind for mask in reward.masks] == [0, 1, 0, 1, 0, 1]
    clips = reward.view(clip).transpose(1, 2)
    losses = []
    for mask in reward.masks:
        seen, hidden = mask.seen_K.expand(2, -1), mask.hidden_M.expand(2, -1)
        target = reward.predictive.targets(clips)[:, mask.hidden_M]
        losses.append((reward.predictive.predict(clips, seen, hidden, mask.kind) - target).abs().mean((1, 2)))
    torch.testing.assert_close(reward(clip, ACTIONS, ALL), -torch.stack(losses).mean(0))
    assert float(torch.stack(losses).std(0).min()) > 1e-4


def test_which_masks_are_drawn_is_a_setting(sources: dict[str, Path]) -> None:
    def masks(**settings: Any) -> list[list[int]]:
        return [mask.hidden_M.tolist() for mask in build("vjepa", sources["vjepa"], **settings).masks]

    assert masks() == masks()
    assert masks() == masks(masks=5)[:2]
    assert masks(mask_seed=1) != masks()
    assert len(set(map(tuple, masks(masks=5)))) > 5
    assert len(masks(large_blocks=0)) == len(masks(small_blocks=0)) == 1
    with pytest.raises(InputError, match="both 0"):
        masks(small_blocks=0, large_blocks=0)
    with pytest.raises(InputError, match=r"above max_aspect; set it to 1.5 or less"):
        masks(min_aspect=2.0)
    with pytest.raises(InputError, match=r"2 blocks that each cover 0.9 of the frame leave nothing"):
        masks(large_scale=0.9, min_aspect=1.0, max_aspect=1.0)


@pytest.mark.parametrize(("count", "scale"), [(8, 0.15), (2, 0.7), (1, 0.3)])
def test_masks_are_blocks_through_the_whole_video(count: int, scale: float) -> None:
    grid, sizes = Grid(8, 14, 14), set()
    for number in range(20):
        mask = draw(Blocks(count, scale, (0.75, 1.5)), grid, 0, generator(0, number))
        places = torch.cat([mask.seen_K, mask.hidden_M])
        assert places.sort().values.equal(torch.arange(len(grid)))
        hidden = torch.zeros(len(grid), dtype=torch.bool).index_fill(0, mask.hidden_M, value=True).view(8, 14, 14)
        assert (hidden == hidden[:1]).all()
        area = int(hidden[0].sum())
        assert scale * 196 * 0.85 < area < min(196, count * scale * 196 * 1.15)
        rows, columns = hidden[0].any(1).sum(), hidden[0].any(0).sum()
        sizes.add((int(rows), int(columns)))
        if count == 1:
            assert area == rows * columns
            assert 0.6 < rows / columns < 1.8
    assert len(sizes) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_short_side_is_scaled_and_the_centre_cut(sources: dict[str, Path], kind: str, tmp_path: Path) -> None:
    view = build(kind, sources[kind]).view
    assert (view.size, view.short, view.mode) == (SIZE, 36, "bilinear")
    for path in sources[kind].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    told = {"size": {"shortest_edge": 40}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(told))
    view = build(kind, tmp_path).view
    assert (view.short, view.norm) == (40, ((0.5,) * 3, (0.25,) * 3))
    assert view(video(1, 50, 30)).shape == (2, 1, 3, SIZE, SIZE)
