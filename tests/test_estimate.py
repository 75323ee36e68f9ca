"""The memory estimate: near what a real step holds, and falling where a trick is said to save."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Brightness, tiny_model
from torch import Tensor, nn
from vader_nodes.vader_backend.align import Settings, align
from vader_nodes.vader_backend.estimate import PHASES, PREVIEW, Estimate, estimate, measure
from vader_nodes.vader_backend.generate import VideoConfig
from vader_nodes.vader_backend.lora import LoraConfig
from vader_nodes.vader_backend.memory.options import PRESETS, MemoryConfig, preset_for
from vader_nodes.vader_backend.memory.tracker import MemoryTracker, tensors_of
from vader_nodes.vader_backend.mini.files import ROOT
from vader_nodes.vader_backend.models import modelscope
from vader_nodes.vader_backend.models.modelscope import ModelScope
from vader_nodes.vader_backend.objectives.vader import Config
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.trainer import Hooks, TrainOptions, TrainResult

CPU = torch.device("cpu")
NEAR = 0.05
LEAN = MemoryConfig(gradient_checkpointing=True, stepwise=True, one_by_one=True)


class Judge(Brightness):
    """Brightness through a network of some size."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 512, 8, 8)).requires_grad_(False)

    def networks(self) -> Sequence[nn.Module]:
        return [self.network]

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        return self.network(video_BTCHW.flatten(0, 1)).unflatten(0, video_BTCHW.shape[:2]).mean((1, 2, 3, 4))


@pytest.fixture(scope="module")
def mini() -> ModelScope:
    return modelscope.build(modelscope.Config(folder=str(ROOT / "modelscope")))


def settings(**objective: object) -> Settings:
    chosen = {"sampling_steps": 9, "reward_frames": "first", **objective}
    return Settings(Config(**chosen))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelScope:
    """Few layers, so that an estimate takes little time."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), torch.float32)


def predict(model: ModelScope, memory: MemoryConfig, **objective: object) -> Estimate:
    size = VideoConfig(3, 32, 32) if model.name == "tiny" else VideoConfig()
    return estimate(model, Judge(), replace(settings(**objective), video=size), memory)


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(gradient_checkpointing=True), LEAN])
def test_the_estimate_is_near_what_a_step_holds(mini: ModelScope, memory: MemoryConfig) -> None:
    weights = [tensor.clone() for tensor in tensors_of(mini.parts().values())]
    step = replace(settings(), train=TrainOptions(preview_every=1))
    guessed = estimate(mini, Judge(), step, memory)
    assert all(torch.equal(a, b) for a, b in zip(weights, tensors_of(mini.parts().values()), strict=True))
    real = measure(mini, Judge(), step, memory, CPU)
    assert {*PHASES, PREVIEW} <= guessed.phases.keys()
    for name in (*PHASES, PREVIEW):
        assert guessed.phases[name] == pytest.approx(real.phases[name], rel=NEAR), name
    assert guessed.peak == pytest.approx(real.peak, rel=NEAR)


def test_previews_count_only_where_there_are_any(small: ModelScope) -> None:
    size = replace(settings(), video=VideoConfig(9, 32, 32))
    lean = MemoryConfig(gradient_checkpointing=True)
    without, seen = (estimate(small, Judge(), replace(size, train=TrainOptions(preview_every=n)), lean) for n in (0, 1))
    assert PREVIEW not in without.phases
    assert seen.phases == {**without.phases, PREVIEW: seen.phases[PREVIEW]}
    assert seen.phases[PREVIEW] > without.phases["decode"]  # all frames, where the step decodes one
    assert seen.peak == max(seen.phases.values())


def test_the_denoiser_makes_room_for_the_text_encoder(small: ModelScope) -> None:
    whole, swapped = (predict(small, MemoryConfig(resident_gb=size)) for size in (0, 1e-6))
    assert swapped.phases["encode"] == whole.phases["encode"]
    assert swapped.resident < whole.resident


def test_any_number_of_steps_needs_the_memory_of_one(mini: ModelScope) -> None:
    one, eight = (measure(mini, Judge(), settings(k=k), LEAN, CPU).peak for k in (1, 8))
    assert eight <= 1.15 * one
    assert measure(mini, Judge(), settings(k=8), MemoryConfig(), CPU).peak > 3 * one


def test_each_rung_needs_less(small: ModelScope) -> None:
    """The ladder of the paper's Table 7, then the tricks that keep things in main memory."""
    ladder = [
        predict(small, MemoryConfig(), k=3, reward_frames="all"),
        predict(small, MemoryConfig(), k=3),
        predict(small, MemoryConfig()),
        predict(small, MemoryConfig(gradient_checkpointing=True)),
        predict(small, MemoryConfig(gradient_checkpointing=True, one_by_one=True, offload_idle=True, resident_gb=1e-6)),
    ]
    peaks = [found.peak for found in ladder]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_the_offloaded_graph_lies_in_main_memory(small: ModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vader_nodes.vader_backend.memory.graph_offload.SMALLEST", 4096)
    plain = predict(small, MemoryConfig())
    moved = predict(small, MemoryConfig(graph_offload=True))
    assert moved.phases["decode"] < 0.75 * plain.phases["decode"]
    assert moved.host - plain.host > 0.5 * (plain.phases["decode"] - moved.phases["decode"])


def test_a_low_bit_model_is_smaller(small: ModelScope) -> None:
    plain, eight, four = (
        predict(small, MemoryConfig(weight_storage=storage)).resident for storage in ("as loaded", "float8", "nf4")
    )
    assert plain > eight > four


def test_a_card_is_found() -> None:
    found = Estimate(peak=int(11e9), phases={}, resident=0, host=0)
    assert found.fits(12)
    assert not found.fits(11)
    assert preset_for(CPU) == "off"
    assert PRESETS["off"] == MemoryConfig()


# --- nothing is left behind ------------------------------------------------------------------


class Stop(Exception):
    """Raised in the middle of a run, as a cancel is."""


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled"])
def test_a_run_leaves_no_memory_behind(end: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", torch.float32)

    def progress(result: TrainResult, total: int, metrics: dict[str, float]) -> None:
        if end == "cancelled":
            raise Stop

    class Broken(Brightness):
        def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
            if end == "failed":
                raise Stop
            return super().__call__(video_BTCHW, prompts, indices)

    def run(folder: Path) -> None:
        chosen = Settings(
            Config(sampling_steps=2), lora=LoraConfig(rank=2), train=TrainOptions(steps=2), video=VideoConfig(3, 8, 8)
        )
        with suppress(Stop):
            align(
                model, Broken(), PromptSet(("a cat",), ()), chosen,
                root=folder, hooks=Hooks(progress=progress), memory=LEAN,
            )  # fmt: skip

    tracker, lives = MemoryTracker("cpu"), []
    with tracker:
        for number in range(3):  # what stays after a first run, such as caches, is no leak
            run(tmp_path / str(number))
            gc.collect()
            lives.append(tracker.main.live)
    assert lives[1] == lives[2]
    assert tracker.main.peak > lives[2] > 0
