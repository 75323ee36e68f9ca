"""ViCLIP: parity with the original, every key of the published file, and what holds for a reward on whole videos."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vader_nodes.tools.parity import viclip as parity
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer
from vader_nodes.vader_backend.rewards._viclip import build_viclip, trained_frames
from vader_nodes.vader_backend.rewards.viclip import Config, ViClip, build

from .conftest import PROMPTS, video
from .video_networks import save_viclip, viclip_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
FRAMES = 4  # that the small network was trained on
ALL = range(FRAMES)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return viclip_tensors(len(save_tokenizer(tmp_path_factory.mktemp("words"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("viclip")
    save_viclip(root)
    return root


@pytest.fixture
def make(folder: Path) -> Callable[..., ViClip]:
    def build_one(dtype: torch.dtype = torch.float32, **settings: object) -> ViClip:
        reward = build(Config(**{"checkpoint": "ViClip.pth", **settings}), lambda name: folder / name)  # type: ignore[arg-type]
        for network in reward.networks():
            network.to(dtype)
        return reward

    return build_one


# --- the original ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "still"), [("viclip", {"video_raw_1frame"}), ("viclip_pairs", set())])
def test_it_equals_the_original_implementation(name: str, still: set[str]) -> None:
    """The second has patches of two frames each, and takes no single ones."""
    results = compare(read(FIXTURES / f"{name}.safetensors"), parity.viclip)
    assert {name for name, _, _ in results} >= {"video_raw", "text_raw", "cosine", "sims"} | still
    assert all(ok for _, _, ok in results), results


def test_every_weight_of_the_published_file_is_used() -> None:
    listed = json.loads(gzip.decompress((FIXTURES / "clip_keys.json.gz").read_bytes()))["viclip"]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in listed["keys"].items()}
    model = build_viclip(tensors, torch.float32, Path("ViClip-InternVid-10M-FLT.pth"))
    assert sum(p.numel() for p in model.parameters()) == listed["n_params"]
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.num_hidden_layers, vision.num_attention_heads) == (224, 24, 16)
    assert (text.max_position_embeddings, text.num_hidden_layers, text.num_attention_heads) == (32, 12, 12)
    assert (vision.hidden_act, text.hidden_act, model.config.projection_dim) == ("quick_gelu", "quick_gelu", 768)
    assert trained_frames(model) == 8


# --- the reward ------------------------------------------------------------------------------


def test_pixel_gradient_agrees_with_finite_differences(make: Callable[..., ViClip]) -> None:
    reward = make(torch.float64)
    clip = video(FRAMES, 30, 41, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(clip, PROMPTS, ALL).sum(), clip)
    step = 1e-5 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        rise = reward(clip + step, PROMPTS, ALL).sum() - reward(clip - step, PROMPTS, ALL).sum()
    assert float(rise) == pytest.approx(float(2 * (gradient * step).sum()), rel=1e-5)
    assert gradient.flatten(2).abs().amax(2).min() > 0  # every frame counts
    assert all(p.grad is None and not p.requires_grad for network in reward.networks() for p in network.parameters())


def test_samples_do_not_mix_and_a_batch_equals_its_singles(make: Callable[..., ViClip]) -> None:
    reward, clip = make(), video(FRAMES).requires_grad_()
    together = reward(clip, PROMPTS, ALL)
    assert (together.shape, together.dtype) == ((2,), torch.float32)
    (gradient,) = torch.autograd.grad(together[0], clip)
    assert gradient[0].any()
    assert not gradient[1].any()
    singles = [reward(clip[i : i + 1], PROMPTS[i : i + 1], ALL) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(singles))
    assert float((together[0] - together[1]).detach().abs()) > 1e-3


def test_the_order_of_frames_and_each_videos_own_prompt_count(make: Callable[..., ViClip]) -> None:
    reward, same = make(), video(FRAMES)[:1].expand(2, -1, -1, -1, -1)
    straight, crossed = reward(same, PROMPTS, ALL), reward(same, PROMPTS[::-1], ALL)
    torch.testing.assert_close(straight, crossed.flip(0))
    assert float((straight[0] - straight[1]).abs()) > 1e-3
    assert float((straight - reward(same.flip(1), PROMPTS, ALL)).abs().min()) > 1e-3


def test_frames_are_taken_at_the_published_stride(make: Callable[..., ViClip]) -> None:
    frames = make().frames
    assert frames.pick(FRAMES) == [0, 1, 2, 3]
    assert frames.pick(FRAMES * 2) == [0, 2, 4, 6]
    assert frames.pick(FRAMES * 4 + 3) == [0, 4, 8, 12]


def test_pixels_are_the_plain_bilinear_ones(make: Callable[..., ViClip]) -> None:
    reward, clip = make(), video(FRAMES, 56, 84)
    mean, std = (torch.tensor(part)[:, None, None] for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    columns = torch.arange(28) * 3 + 1  # the middle of three; of two rows the mean
    halves = (clip[..., ::2, :] + clip[..., 1::2, :])[..., columns] / 2
    torch.testing.assert_close(reward.view(clip), (halves - mean) / std)
    assert not torch.allclose(make(antialias=True).view(clip), reward.view(clip))


def test_a_single_frame_is_scored_as_a_picture(make: Callable[..., ViClip]) -> None:
    reward = make(frames=1)
    assert reward.frames.pick(9) == [0]
    assert reward(video(1), PROMPTS, [0]).isfinite().all()


def test_half_precision_scores_nearly_alike(make: Callable[..., ViClip], folder: Path) -> None:
    small = build(Config(checkpoint="ViClip.pth", dtype="bfloat16"), lambda name: folder / name)
    clip = video(FRAMES).requires_grad_()
    score = small(clip, PROMPTS, ALL)
    assert score.dtype == torch.float32
    assert small.clip.model.visual_projection.weight.dtype == torch.bfloat16
    assert float((score - make()(clip, PROMPTS, ALL)).detach().abs().max()) < 0.03
    assert torch.autograd.grad(score.sum(), clip)[0].flatten(2).any(2).all()


# --- what is refused -------------------------------------------------------------------------


def test_frames_that_it_was_not_trained_on_are_refused(make: Callable[..., ViClip]) -> None:
    with pytest.raises(InputError, match="frames is 3, but this ViCLIP takes 4 frames, or 1"):
        make(frames=3)


def test_other_checkpoints_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], head_tensors: dict[str, Tensor]
) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "other.pth"
    foreign = read(FIXTURES / "hpsv2.safetensors").weights
    lacking = {key: tensor for key, tensor in tensors.items() if key != "vision_encoder.ln_pre.bias"}
    for wrong in (foreign, head_tensors, lacking, {**tensors, "more": torch.zeros(2)}):
        torch.save({"model": wrong}, path)
        with pytest.raises(InputError, match=r"ViCLIP model in .* cannot be read"):
            build(Config(checkpoint=str(path)))
    torch.save({"model": tensors}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"ViCLIP model in .* cannot be read"):
        build(Config(checkpoint=str(path)))


def test_it_needs_its_tokenizer(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "ViClip.pth"
    torch.save({"model": tensors}, path)
    with pytest.raises(InputError, match=r"ViClip.pth has no tokenizer: put CLIP's vocab.json and merges.txt"):
        build(Config(checkpoint=str(path)))
    save_tokenizer(tmp_path / "words")
    build(Config(checkpoint=str(path), tokenizer=str(tmp_path / "words")))
    torch.save({"model": read(FIXTURES / "viclip.safetensors").weights}, path)
    with pytest.raises(InputError, match=r"tokens, ViClip.pth's text encoder 97"):
        build(Config(checkpoint=str(path), tokenizer=str(tmp_path / "words")))
