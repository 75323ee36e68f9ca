"""Reward Table: how images become videos, the table, the JSON and the report file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_graph import Redness
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, rewards
from vader_nodes.nodes.reward_table import VaderRewardTable, divided
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.evaluation.reward_table import record, table
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.rewards.base import Combined, Towards

IMAGES = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 4, 5, 3).clone()
IMAGES[..., 1:] = 0


def test_every_picture_by_itself(empty_base: Path) -> None:
    told = VaderRewardTable().score(IMAGES, Redness(), frames=1)
    text, report = told["result"]
    lines = text.splitlines()
    assert lines[0].split() == ["video", "redness", "prompt"]
    assert [float(line.split()[1]) for line in lines[1:7]] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert lines[7].split() == ["mean", "0.5000"]
    assert lines[8].split() == ["std", "0.3416"]
    (path,) = (empty_base / "output" / "scores").iterdir()
    assert path.name == "vader_00001.json"
    assert json.loads(path.read_text()) == json.loads(report)
    assert told["ui"]["text"] == [text, "wrote output/scores/vader_00001.json"]


@pytest.mark.usefixtures("empty_base")
def test_a_combination_has_its_parts_and_its_sum() -> None:
    both = Combined([Redness(), Towards(Combined([Redness()], [3.0]), 1.0)], [2.0, 0.5])
    text, report = VaderRewardTable().score(IMAGES, both, PromptSet(("a", "b"), ("c",)))["result"]
    told = json.loads(report)
    assert [video["prompt"] for video in told["videos"]] == ["a", "b", "c"]
    first = told["videos"][0]["scores"]
    assert first["redness"] == pytest.approx(0.1)
    assert first["combined"] == pytest.approx(2 * 0.1 - 0.5 * (1 - 0.3))
    assert told["mean"]["redness"] == pytest.approx(0.5)
    assert told["reward"] == both.description
    assert text.splitlines()[1].split()[-1] == "a"


@pytest.mark.parametrize(
    ("prompts", "frames", "count", "texts"),
    [
        ([], 0, 1, [""]),
        (["a"], 0, 1, ["a"]),
        (["a", "b"], 0, 2, ["a", "b"]),
        (["a"], 2, 3, ["a"] * 3),
        ([], 6, 1, [""]),
        (["a", "b", "c"], 2, 3, ["a", "b", "c"]),
    ],
)
def test_images_are_divided(prompts: list[str], frames: int, count: int, texts: list[str]) -> None:
    videos, own = divided(IMAGES, prompts, frames)
    assert videos.shape == (count, 6 // count, 3, 4, 5)
    assert torch.equal(videos.flatten(0, 1)[:, 0, 0, 0], IMAGES[:, 0, 0, 0])
    assert own == texts


@pytest.mark.parametrize(
    ("images", "prompts", "frames", "message"),
    [
        (IMAGES, ["a"] * 4, 0, "6 images, which do not divide into 4"),
        (IMAGES, [], 4, "no whole number of videos of 4"),
        (IMAGES, ["a", "b"], 2, "2 prompts for 3 videos"),
        (IMAGES[..., :1], [], 0, "grey"),
        (IMAGES / 0, [], 0, "not finite"),
        (IMAGES[:0], [], 1, "images is empty"),
    ],
)
@pytest.mark.usefixtures("empty_base")
def test_bad_input_is_one_sentence(images: torch.Tensor, prompts: list[str], frames: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VaderRewardTable().score(images, Redness(), frames=frames, text="\n".join(prompts))


def test_long_prompts_are_cut_and_what_is_not_finite_is_null() -> None:
    scores = {"one": [1.0, float("nan")], "two": [2.0, 4.0]}
    text = table(scores, ["word " * 30, "b\nc"])
    assert max(map(len, text.splitlines())) < 100
    assert text.splitlines()[2].endswith("b c")
    told = json.loads(json.dumps(record(scores, ["a", "b"], {}), allow_nan=False))
    assert told["videos"][1]["scores"] == {"one": None, "two": 4.0}
    assert told["mean"] == {"one": None, "two": 3.0}
    assert told["std"] == {"one": None, "two": 1.0}


def test_names_that_leave_the_folder_are_refused_early() -> None:
    assert "filename_prefix" in str(VaderRewardTable.VALIDATE_INPUTS("../x"))
    assert NODE_CLASS_MAPPINGS["VaderRewardTable"].VALIDATE_INPUTS(None) is True


def test_rewards_offer_embedded_weights_and_what_lies_there(empty_base: Path) -> None:
    folder = empty_base / "models" / "reward_models"
    for name in ("mine/med_config.json", "clip/config.json", "head.pth"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    node = NODE_CLASS_MAPPINGS["VaderRewardImagereward"].INPUT_TYPES()["optional"]
    assert node["checkpoint"][0] == ["mini/imagereward", "mine"]
    other = NODE_CLASS_MAPPINGS["VaderRewardAestheticV25"].INPUT_TYPES()["optional"]
    assert other["checkpoint"][0] == ["mini/aesthetic_v25/siglip", "clip", "hub: google/siglip-so400m-patch14-384"]
    assert other["head"][0] == ["mini/aesthetic_v25/head.safetensors", "head.pth"]
    with pytest.raises(InputError, match="ImageReward"):
        NODE_CLASS_MAPPINGS["VaderRewardImagereward"]().make(checkpoint="ImageReward")
    assert not rewards._checkpoints(SimpleNamespace(Config=rewards.Weights))  # type: ignore[arg-type]
