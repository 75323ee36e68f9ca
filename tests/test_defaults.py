"""What a setting left at 0 stands for: the settings that the VADER paper's code was published with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_opensora
import torch
from tiny import VIDEO, Brightness, tiny_model
from torch import nn
from vader_nodes.vader_backend import align as alignment
from vader_nodes.vader_backend.align import Settings, align
from vader_nodes.vader_backend.generate import VideoConfig
from vader_nodes.vader_backend.lora import LoraConfig, applied, attached, export
from vader_nodes.vader_backend.mini.files import weights
from vader_nodes.vader_backend.models import ltx, modelscope, opensora, svd, videocrafter2, wan
from vader_nodes.vader_backend.models.base import Defaults
from vader_nodes.vader_backend.models.modelscope import ModelScope
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.trainer import TrainOptions
from vader_nodes.vader_backend.types import VideoSpec

# size, frames, fps | steps, guidance, eta | rank, alpha, dropout | learning rate
PUBLISHED = {
    "videocrafter2": (VideoSpec(12, 320, 512, 24), (25, 12, 1), LoraConfig(16, 8, 0.01), 2e-4),
    "opensora": (VideoSpec(51, 276, 368, 24), (30, 7, 0), LoraConfig(16, 8, 0.01), 2e-4),
    "modelscope": (VideoSpec(16, 384, 384), (25, 9, 0), LoraConfig(16, 16, 0.1), 2e-4),
}
FOUND = {"videocrafter2": videocrafter2.PUBLISHED, "opensora": opensora.PUBLISHED, "modelscope": modelscope.PUBLISHED}


def resolved(own: Defaults, config: LoraConfig | None = None) -> LoraConfig:
    return (config or LoraConfig()).resolve(SimpleNamespace(defaults=own))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", PUBLISHED)
def test_settings_of_the_paper(family: str) -> None:
    own = FOUND[family]
    sampling = (own.steps, own.guidance, own.eta)
    assert (own.video, sampling, resolved(own), own.learning_rate) == PUBLISHED[family]


def test_layers_of_the_paper(tmp_path: Path) -> None:
    assert videocrafter2.VideoCrafter2.lora_targets == ("to_q", "to_k", "to_v")
    assert opensora.OpenSora.lora_targets == ("qkv", "q_linear", "kv_linear")
    model = published_modelscope(tmp_path)
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    layers = {name for name, module in model.denoiser.named_modules() if isinstance(module, kinds)}
    assert set(model.lora_targets) == layers
    assert {"conv_in", "time_embedding.linear_1", "down_blocks.0.temp_convs.0.conv4.3"} < layers


def published_modelscope(folder: Path) -> ModelScope:
    """The tiny network, whose configuration names the published size."""
    model: Any = tiny_model(folder, torch.float32)
    model.denoiser.register_to_config(sample_size=32)
    return ModelScope("big", model.denoiser, model.vae, model.text_encoder, model.tokenizer, model.process)


def test_a_lora_on_every_layer_is_written_and_read(tmp_path: Path) -> None:
    model = published_modelscope(tmp_path)
    z, cond = torch.randn(1, 4, 3, 4, 4), dict(model.encode(["a red circle"], VIDEO).positive)
    with attached(model, LoraConfig(rank=2), seed=0) as parameters, torch.no_grad():
        assert len(parameters) == 2 * len(model.lora_targets)
        for parameter in parameters.values():
            parameter.normal_(std=0.1)
        expected = model.predict(z, 500, cond)
        lora = export(model, dict(parameters), 1.0, {})
    with applied(model, lora), torch.no_grad():
        assert (model.predict(z, 500, cond) - expected).abs().max() < 1e-4
    with torch.no_grad():
        assert (model.predict(z, 500, cond) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("frames", [14, 25])
def test_stable_video_diffusion(frames: int) -> None:
    own = svd._defaults(SimpleNamespace(config=SimpleNamespace(num_frames=frames, sample_size=96)), 8)  # type: ignore[arg-type]
    assert own == Defaults(VideoSpec(frames, 576, 1024, 7), steps=25, guidance=3, first_guidance=1)


@pytest.mark.parametrize("own", [wan._WAN_2_1, wan._WAN_2_2, ltx._PUBLISHED])
def test_families_that_the_paper_did_not_train(own: Defaults) -> None:
    assert resolved(own) == LoraConfig(16, 16, 0)
    assert (own.learning_rate, own.eta) == (2e-4, 0)


def test_the_embedded_modelscope() -> None:
    model = modelscope.build(modelscope.Config(folder=str(weights("modelscope"))))
    assert model.defaults == Defaults(VideoSpec(8, 64, 64), steps=20, guidance=2.5, rank=8, learning_rate=1e-3)
    assert resolved(model.defaults) == LoraConfig(8, 8, 0)
    assert tuple(model.lora_targets) == ("to_q", "to_k", "to_v", "to_out.0")


def test_what_is_set_stays_and_the_ratio_follows_the_rank() -> None:
    own = FOUND["videocrafter2"]
    assert resolved(own, LoraConfig(rank=4)) == LoraConfig(4, 2, 0.01)
    assert resolved(own, LoraConfig(alpha=4, dropout=0)) == LoraConfig(16, 4, 0)


def test_the_published_ratio_goes_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    tiny_opensora.save_tiny(tmp_path / "checkpoint")
    model = opensora.build(opensora.Config(folder=str(tmp_path / "checkpoint")))
    scales: list[float] = []

    def noted(model: Any, tensors: Any, scale: float, metadata: Any) -> Any:
        scales.append(scale)
        return export(model, tensors, scale, metadata)

    monkeypatch.setattr(alignment, "export", noted)
    settings = Settings(
        vader.Config(sampling_steps=1, reward_frames="first"), lora=LoraConfig(rank=2), train=TrainOptions(steps=1),
        video=VideoConfig(17, 16, 16),
    )  # fmt: skip
    align(model, Brightness(), PromptSet(("a cat",), ()), settings, root=tmp_path / "runs")
    assert scales == [0.5]
