"""VideoReward: parity with the original, its layouts, its pixels against Qwen2-VL's processor, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.beyond import video_reward
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.loading import read_tensors
from vader_nodes.vader_backend.rewards._qwen2vl import merged
from vader_nodes.vader_backend.rewards._qwen2vl_pixels import fitted, patches
from vader_nodes.vader_backend.rewards.videoreward import ASPECTS, QwenVideoReward

from .conftest import PROMPTS, video
from .test_preprocessing import as_tensor, smooth_picture
from .tiny_beyond import MARKS, NORM, TEMPLATE, make, save_videoreward

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_videoreward(tmp_path_factory.mktemp("x") / "videoreward")


@pytest.fixture(scope="module")
def reward(folder: Path) -> QwenVideoReward:
    return make("videoreward", folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["videoreward", "videoreward_heads"])
def test_it_equals_the_original_implementation(name: str) -> None:
    results = compare(read(FIXTURES / f"{name}.safetensors"), video_reward)
    assert {output for output, _, _ in results} == {"patches", "logits"}
    assert all(good for _, _, good in results), results


def test_an_adapter_and_the_whole_file_give_one_network(reward: QwenVideoReward, tmp_path: Path) -> None:
    other = make("videoreward", save_videoreward(tmp_path / "adapter", adapter=True))
    for name, tensor in reward.network.state_dict().items():
        assert torch.equal(tensor, other.network.state_dict()[name]), name


def test_updates_are_added_with_their_scale(reward: QwenVideoReward, folder: Path) -> None:
    published = read_tensors(folder / "VideoReward" / "checkpoint-30" / "model.pth", "file")
    layer = "base_model.model.model.layers.1.mlp.down_proj"
    down, up = (published[f"{layer}.lora_{part}.default.weight"] for part in "AB")
    expected = published[f"{layer}.base_layer.weight"] + 6 / 2 * up @ down
    torch.testing.assert_close(reward.network.language.layers[1].mlp.down_proj.weight, expected)


def test_an_update_without_its_other_half_is_refused() -> None:
    with pytest.raises(InputError, match=r"lora_B"):
        merged({"a.weight": torch.zeros(2, 2), "a.lora_A.weight": torch.zeros(1, 2)}, 1.0)


def test_aspects_are_reported_normalised_and_summed(reward: QwenVideoReward, folder: Path) -> None:
    clip = video(4, 24, 36)
    parts = reward.parts(clip, PROMPTS, range(4))
    each = [parts[f"videoreward {aspect}"] for aspect in ASPECTS]
    torch.testing.assert_close(parts["videoreward"], torch.stack(each).sum(0))
    alone = make("videoreward", folder, aspect="motion quality")
    torch.testing.assert_close(alone(clip, PROMPTS, range(4)), each[1])
    cut, grids = reward.pixels(clip)
    ids = reward.tokenizer.convert_tokens_to_ids(["<|video_pad|>", *MARKS])
    raw = reward.network(cut, grids, reward.tokens(PROMPTS, int(grids[0].prod()) // 4), ids[0], ids[1:])
    torch.testing.assert_close(each[2], (raw[:, 2] - NORM["TA_mean"]) / NORM["TA_std"])


def test_of_a_longer_video_evenly_spread_frames_are_used(reward: QwenVideoReward) -> None:
    clip = video(10, 24, 36).requires_grad_()
    score = reward(clip, PROMPTS, range(10))
    torch.testing.assert_close(score, reward(clip[:, [0, 3, 6, 9]], PROMPTS, [0, 3, 6, 9]))
    (gradient,) = torch.autograd.grad(score.sum(), clip)
    used = gradient.flatten(2).abs().amax(2) > 0
    assert used.tolist() == [[i in (0, 3, 6, 9) for i in range(10)]] * 2


def test_an_odd_last_frame_counts_twice(reward: QwenVideoReward) -> None:
    clip = video(3, 24, 36)
    torch.testing.assert_close(
        reward(clip, PROMPTS, range(3)), reward(clip[:, [0, 1, 2, 2]], PROMPTS, [0, 1, 2, 2]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [(28, 28), (40, 60), (300, 90), (56, 29), (700, 400)])
def test_pixels_are_those_of_qwens_processor(size: tuple[int, int]) -> None:
    own = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    low, high = 56 * 56, 20 * 28 * 28
    processor = own.Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
    picture = smooth_picture(*size)
    theirs = processor(picture, return_tensors="pt")
    goal = fitted(*size, 28, low, high)
    assert (theirs.image_grid_thw[0, 1:] * 14).tolist() == list(goal)
    small = as_tensor(picture.resize(goal[::-1], 3))[:, None]
    cut, grid = patches(small, 14, 2, 2)  # one frame is repeated, as for a picture
    assert grid.tolist() == theirs.image_grid_thw.tolist()
    assert float((cut - theirs.pixel_values).abs().max()) < 1e-5


def test_patches_of_different_frames_lie_where_the_network_looks() -> None:
    clip = torch.zeros(1, 4, 3, 4, 8)
    clip[0, 3, 2, 3, 5] = 1.0  # second pair, its second frame, blue, row 3, column 5
    cut, grid = patches(clip, 2, 2, 2)
    assert grid.tolist() == [[2, 2, 4]]
    assert cut.shape == (16, 24)
    row, place = np.unravel_index(int(cut[:, 16:].argmax()), (16, 8))
    # blocks of 2 x 2 patches: the second block holds columns 4 to 7, and its third patch row 2, column 4
    assert (row, place) == (8 + 4 + 2, 4 + 2 + 1)


@pytest.mark.parametrize(("size", "low", "high"), [((40, 56), 2048, 2304), ((12, 12), 2048, 2304), ((7, 900), 16, 800)])
def test_sizes_are_whole_and_within_bounds(size: tuple[int, int], low: int, high: int) -> None:
    height, width = fitted(*size, 4, low, high)
    assert height % 4 == width % 4 == 0
    assert height * width <= high or height == 4


def test_prompts_of_unequal_length_do_not_disturb_each_other(reward: QwenVideoReward) -> None:
    clip, prompts = video(4, 24, 36), ["red", "a very long prompt that says much more than the other"]
    together = reward(clip, prompts, range(4))
    alone = [reward(clip[i : i + 1], prompts[i : i + 1], range(4)) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_narrow_videos_and_prompts_with_its_own_words_are_refused(reward: QwenVideoReward) -> None:
    with pytest.raises(InputError, match="sides differ"):
        reward(video(2, 8, 1700), PROMPTS, [0, 1])
    with pytest.raises(InputError, match="MQ_reward"):
        reward(video(2), ["a", "b <|MQ_reward|>"], [0, 1])


def test_braces_in_a_prompt_are_plain_text(reward: QwenVideoReward) -> None:
    tokens = reward.tokens(["{text} {0}"], 1)[0]
    assert TEMPLATE.replace("{text_prompt}", "{text} {0}") in reward.tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prompt_template.py", None, "prompt_template.py of github.com/KwaiVGI/VideoAlign"),
        ("prompt_template.py", "X = 1\n", "lacks DETAILED_PROMPT"),
        ("prompt_template.py", "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = 'no'\n", "lacks the prompt"),
        ("prompt_template.py", "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = open('x')\n", "cannot be read"),
        ("model_config.json", None, "model_config.json"),
        ("model_config.json", {"model_config": {"use_special_tokens": False}}, "reward tokens"),
        ("checkpoint-30", None, "checkpoint-4"),
    ],
)
def test_files_that_are_missing_or_wrong_are_named(copy: Path, name: str, change: Any, message: str) -> None:
    path = copy / "VideoReward" / name
    if isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    elif change is not None:
        path.write_text(change)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=message):
        make("videoreward", copy)


def test_half_precision_is_kept_and_scored_in_float32(folder: Path) -> None:
    reward = make("videoreward", folder, dtype="bfloat16")
    assert {p.dtype for p in reward.network.parameters()} == {torch.bfloat16}
    clip = video(4, 24, 36).requires_grad_()
    score = reward(clip, PROMPTS, range(4))
    assert score.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.sum(), clip)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
