"""Scores, the comparison table, pictures and video files."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.evaluation.pictures import contact_sheet, reward_curve, side_by_side
from vader_nodes.vader_backend.evaluation.score import comparison_table, score_videos
from vader_nodes.vader_backend.rewards.base import Combined, SingleReward
from vader_nodes.vader_backend.types import FrameSpec
from vader_nodes.vader_backend.video_file import read_mp4, write_mp4


class Brightness(SingleReward):
    """Mean brightness over the frames given, plus the prompt's length."""

    name = "brightness"
    frames = FrameSpec("first", 1)

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def networks(self) -> Sequence[nn.Module]:
        return []

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        assert video_BTCHW.shape[1] == len(indices)
        self.sizes.append(len(video_BTCHW))
        return video_BTCHW.mean((1, 2, 3, 4)) + torch.tensor([float(len(p)) for p in prompts])


class Redness(Brightness):
    name = "redness"

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        return video_BTCHW[:, :, 0].mean((1, 2, 3))


def videos(batch: int, frames: int = 4, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(batch))


def test_scores_cover_all_frames_and_keep_the_order() -> None:
    video, prompts = videos(5), ["a", "bb", "ccc", "dddd", "eeeee"]
    reward = Brightness()
    scores = score_videos(reward, video.requires_grad_(), prompts, batch=2)
    assert reward.sizes == [2, 2, 1]
    expected = [float(v.mean()) + len(p) for v, p in zip(video.detach(), prompts, strict=True)]
    assert scores == {"brightness": pytest.approx(expected)}


def test_a_combination_reports_every_part_over_all_frames() -> None:
    video = videos(3)
    scores = score_videos(Combined([Brightness(), Redness()], [1.0, 0.0]), video, ["", "", ""])
    assert scores["redness"] == pytest.approx(video[:, :, 0].mean((1, 2, 3)).tolist())
    assert scores["brightness"] == pytest.approx(video.mean((1, 2, 3, 4)).tolist())


class Two(Redness):
    """Takes two frames and no other number."""

    name = "two"
    frames = FrameSpec("even", 2, exact=True)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        assert video_BTCHW.shape[1] == len(indices) == 2
        return super().__call__(video_BTCHW, prompts, indices)


def test_a_reward_of_a_fixed_length_scores_its_own_frames() -> None:
    video = videos(3, frames=5)
    ends = video[:, [0, 4], 0].mean((1, 2, 3)).tolist()
    assert score_videos(Two(), video, ["", "", ""]) == {"two": pytest.approx(ends)}
    scores = score_videos(Combined([Brightness(), Two()], [1.0, 1.0]), video, ["", "", ""])
    assert scores["brightness"] == pytest.approx(video.mean((1, 2, 3, 4)).tolist())
    assert scores["two"] == pytest.approx(ends)


def test_videos_and_prompts_must_match() -> None:
    with pytest.raises(InputError, match="3 videos and 2 prompts"):
        score_videos(Brightness(), videos(3), ["a", "b"])
    with pytest.raises(InputError):
        score_videos(Brightness(), videos(3)[:0], [])


def test_table_states_means_and_differences() -> None:
    table = comparison_table(
        {"aesthetic": [1.0, 3.0], "flat": [2.0, 2.0]}, {"aesthetic": [4.0, 6.0], "flat": [1.0, 2.0]}
    )
    head, first, second = (line.split() for line in table.splitlines())
    assert head[0] == "score"
    assert first == ["aesthetic", "2.0000", "1.0000", "5.0000", "+3.0000", "+3.00"]
    assert second == ["flat", "2.0000", "0.0000", "1.5000", "-0.5000", "-"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_table_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(InputError):
        comparison_table({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(InputError):
        comparison_table({"a": [1.0]}, {"a": []})


def test_side_by_side_shows_every_video_under_its_title() -> None:
    before = torch.zeros(2, 3, 3, 64, 64)
    before[1, :, 0] = 1  # red
    after = torch.zeros(2, 3, 3, 64, 64)
    after[0, :, 2] = 1  # blue
    after[1, :, 1] = 1  # green
    titles = ["a cat", "a very long title that needs more than one line above a narrow column"]
    shown = side_by_side(before, after, titles)
    assert shown.shape[:2] == (3, 3)
    _, _, height, width = shown.shape
    assert height > 2 * 192
    assert width > 2 * 192
    colors = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)]
    for color in colors:
        area = (shown[0] == torch.tensor(color)[:, None, None]).all(0).sum()
        assert int(area) == 192 * 192, color
    red = (shown[0] == torch.tensor(colors[0])[:, None, None]).all(0).nonzero().float().mean(0)
    green = (shown[0] == torch.tensor(colors[2])[:, None, None]).all(0).nonzero().float().mean(0)
    assert red[1] == green[1]
    assert red[0] < green[0]
    untitled = side_by_side(before, after, ["", ""])
    assert (untitled < 0.5).any(0).sum() < (shown < 0.5).any(0).sum(), "the titles are drawn"


def test_side_by_side_refuses_unequal_sides() -> None:
    with pytest.raises(InputError, match="titles"):
        side_by_side(videos(2), videos(2), ["one"])
    with pytest.raises(InputError):
        side_by_side(videos(2), videos(2, frames=5), ["one", "two"])


def test_contact_sheet_is_a_png_with_all_frames(tmp_path: Path) -> None:
    rows = {"base": torch.zeros(2, 8, 3, 64, 64), "aligned": torch.zeros(2, 8, 3, 64, 64)}
    rows["aligned"][:, :, 1] = 1
    path = tmp_path / "sheets" / "sheet.png"
    contact_sheet(path, rows, ["one", "two"], frames=3)
    with Image.open(path) as image:
        pixels = np.asarray(image)
    assert int((pixels == (0, 255, 0)).all(-1).sum()) == 2 * 3 * 192 * 192
    with pytest.raises(InputError, match="titles"):
        contact_sheet(path, rows, ["one"])


def test_reward_curve_draws_both_lines(tmp_path: Path) -> None:
    reward_curve(tmp_path / "one.png", range(3), [0.0, 1.0, 2.0])
    reward_curve(tmp_path / "two.png", range(3), [0.0, 1.0, 2.0], held_out=[(0, 0.5), (2, 1.5)])
    one, two = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("one.png", "two.png"))
    assert one.shape == two.shape
    red = [int(((p[..., 0] > 180) & (p[..., 1] < 90) & (p[..., 2] < 80)).sum()) for p in (one, two)]
    assert red[0] == 0
    assert red[1] > 100


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(64, 64, (192, 192)), (33, 65, (100, 196)), (200, 301, (200, 302))]
)
def test_mp4_round_trip(tmp_path: Path, height: int, width: int, shape: tuple[int, int]) -> None:
    ramp = torch.linspace(0.1, 0.9, width).expand(height, width)
    video = torch.stack([torch.stack([ramp, ramp.flip(1), ramp * 0 + t / 8]) for t in range(8)])
    write_mp4(tmp_path / "deep" / "video.mp4", video, 8)
    found = read_mp4(tmp_path / "deep" / "video.mp4")
    assert found.shape == (8, 3, *shape)
    factor = max(1, -(-192 // max(height, width)))
    expected = video.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    error = (found[..., : expected.shape[-2], : expected.shape[-1]] - expected).abs()
    assert float(error.mean()) < 0.02
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["video.mp4"]


def test_mp4_refuses_what_is_no_video(tmp_path: Path) -> None:
    for video, fps in ((torch.zeros(4, 1, 8, 8), 8), (torch.zeros(0, 3, 8, 8), 8), (torch.zeros(2, 3, 8, 8), 0)):
        with pytest.raises(InputError):
            write_mp4(tmp_path / "no.mp4", video, fps)
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(InputError, match="cannot be read"):
            read_mp4(tmp_path / name)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with full_disk(2000), pytest.raises(InputError, match="cannot be written"):
        write_mp4(path, videos(1, 16, 256, 256)[0], 8)
    assert path.read_bytes() == b"old"
    with full_disk(500), pytest.raises(InputError, match="cannot be written"):
        reward_curve(tmp_path / "curve.png", [0, 1], [0.0, 1.0])
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken"):
        write_mp4(tmp_path / "taken" / "video.mp4", videos(1)[0], 8)
