"""What every registered reward says to bad videos and bad files: one clear sentence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.evaluation.score import score_videos

from . import every
from .conftest import PROMPTS, video

WEIGHTS = (".safetensors", ".pt", ".pth", ".tar")
# Rewards on CLIP share a checkpoint, so none of them is another's.
OTHERS = [kind for kind in every.NETWORKS if kind not in ("hps", "pickscore", "clipscore")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every.save_all(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module", params=every.KINDS)
def reward(request: pytest.FixtureRequest, root: Path) -> Any:
    return every.build(request.param, root)


def fewest(reward: Any) -> int:
    """Frames of the shortest video that a reward takes."""
    if reward.name in ("videomae", "vjepa", "viclip"):
        return int(reward.frames.count)
    return 2 if reward.name == "videoreward" else 1


def is_sentence(error: pytest.ExceptionInfo[InputError]) -> bool:
    return bool(re.fullmatch(r"[^\n]+[.?]", str(error.value))) and len(str(error.value)) < 500


# --- videos ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 20, 28), (4, 20, 28), (3, 64, 1)])
@pytest.mark.parametrize("method", ["__call__", "parts"])
def test_frames_without_colour_or_pixels(reward: Any, shape: tuple[int, ...], method: str) -> None:
    count = fewest(reward)
    with pytest.raises(InputError, match=r"in colour of 8 x 8 pixels or more, but was given \d+ x \d+ with") as error:
        getattr(reward, method)(torch.rand(2, count, *shape), PROMPTS, range(count))
    assert is_sentence(error)


@pytest.mark.parametrize("method", ["__call__", "parts"])
def test_too_few_frames(reward: Any, method: str) -> None:
    count = fewest(reward)
    with pytest.raises(InputError, match=f"at least {count} frames? of each video, but was given {count - 1}") as error:
        getattr(reward, method)(video(3)[:, : count - 1], PROMPTS, range(count - 1))
    assert is_sentence(error)
    assert reward(video(count), PROMPTS, range(count)).isfinite().all()


def test_a_video_that_is_not_finite_is_no_score_and_spares_its_neighbour(reward: Any) -> None:
    count = fewest(reward)
    clip = video(count)
    clean = reward(clip, PROMPTS, range(count))
    clip[1, -1, 0, 3, 4] = torch.nan
    with pytest.raises(InputError, match=r"video 2 holds numbers that are not finite") as error:
        score_videos(reward, clip, PROMPTS)
    assert is_sentence(error)
    if reward.differentiable:  # training skips such a step
        clip[1] = torch.nan
        broken = reward(clip, PROMPTS, range(count))
        torch.testing.assert_close(broken[0], clean[0])
        assert broken[1].isnan()


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", every.NETWORKS)
def test_the_checkpoint_of_another_reward(kind: str, other: str, root: Path) -> None:
    own, foreign = every.SETTINGS[kind]["checkpoint"], every.SETTINGS[other]["checkpoint"]
    if own == foreign:
        return
    with pytest.raises(InputError) as error:
        every.build(kind, root, checkpoint=foreign)
    assert is_sentence(error)


def test_a_folder_of_another_kind_is_told_from_its_configuration(root: Path) -> None:
    with pytest.raises(InputError, match="it holds a network of the kind clip, not videomae"):
        every.build("videomae", root, checkpoint="clip")


@pytest.mark.parametrize("field", ["checkpoint", "head", "base"])
@pytest.mark.parametrize("kind", every.NETWORKS)
def test_a_missing_file(kind: str, field: str, root: Path) -> None:
    if field in every.path_fields(kind):
        with pytest.raises(InputError, match="absent") as error:
            every.build(kind, root, **{field: f"absent/{every.SETTINGS[kind][field]}"})
        assert is_sentence(error)


@pytest.fixture(scope="module", params=["truncated", "text", "empty", "renamed"])
def spoilt(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder, every file of weights cut, overwritten, emptied, or of the other format under its name."""
    copy = shutil.copytree(root, tmp_path_factory.mktemp(request.param) / "every")
    tensors = (root / "clip" / "model.safetensors").read_bytes()
    pickle = (root / "videoreward" / "VideoReward" / "checkpoint-30" / "model.pth").read_bytes()
    for path in [path for path in copy.rglob("*") if path.suffix in WEIGHTS]:
        kept = path.read_bytes()[:-1000]
        other = pickle if path.suffix == ".safetensors" else tensors
        path.write_bytes({"truncated": kept, "text": b"not weights\n", "empty": b"", "renamed": other}[request.param])
    return copy


@pytest.mark.parametrize("kind", every.NETWORKS)
def test_a_damaged_file_or_one_under_a_wrong_suffix(kind: str, spoilt: Path) -> None:
    with pytest.raises(InputError, match="cannot be read") as error:
        every.build(kind, spoilt)
    assert is_sentence(error)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("hps", "checkpoint"), ("viclip", "checkpoint"), ("vjepa", "checkpoint"), ("aesthetic", "head"),
     ("aesthetic_v25", "head")],
)  # fmt: skip
def test_a_suffix_that_no_weights_have(kind: str, field: str, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.exe"
    shutil.copyfile(root / every.SETTINGS["viclip"]["checkpoint"], path)
    with pytest.raises(InputError, match=r"cannot be weights.exe; choose a file that ends in .safetensors,") as error:
        every.build(kind, root, **{field: str(path)})
    assert is_sentence(error)
