"""LoRA files: written, read back, applied, refused; and read by peft and diffusers with equal output."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from diffusers import DDIMScheduler, TextToVideoSDPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import SCHEDULER, VIDEO, Brightness, tiny_model
from torch import Tensor
from vader_nodes.vader_backend.align import Settings, align
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.generate import SampleConfig, VideoConfig, generate, initial_noise
from vader_nodes.vader_backend.lora import LoraConfig, LoraWeights, applied, attached, export, load_lora, save_lora
from vader_nodes.vader_backend.models.modelscope import ModelScope
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.trainer import TrainOptions

SIZE = VideoConfig(3, 8, 8)
SAMPLE = SampleConfig(seed=5, steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelScope:
    return tiny_model(tmp_path_factory.mktemp("tiny"), torch.float32)


@pytest.fixture(scope="module")
def trained(model: ModelScope, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA file of a short training with alpha different from rank."""
    settings = Settings(
        vader.Config(sampling_steps=3, guidance=2.0),
        lora=LoraConfig(rank=2, alpha=6.0),
        train=TrainOptions(steps=3, learning_rate=0.05),
        video=SIZE,
    )
    folder = tmp_path_factory.mktemp("run")
    return align(model, Brightness(), PromptSet(("a", "b"), ()), settings, root=folder).folder / "lora.safetensors"


def videos(model: ModelScope, weights: LoraWeights | None, strength: float = 1.0) -> Tensor:
    with applied(model, weights, strength):
        return generate(model, ["a red circle", "a blue cross"], SAMPLE, SIZE)


def test_the_file_gives_what_was_trained_and_goes_away_again(model: ModelScope, trained: Path) -> None:
    base = videos(model, None)
    aligned = videos(model, load_lora(trained))
    assert (aligned - base).abs().max() > 1e-3
    assert torch.equal(base, videos(model, None))
    assert torch.equal(base, videos(model, load_lora(trained), strength=0.0))
    half = videos(model, load_lora(trained), strength=0.5)
    assert 0 < (half - base).abs().mean() < (aligned - base).abs().mean()


def test_the_exported_lora_acts_like_the_attached_one(model: ModelScope) -> None:
    z, cond = torch.randn(1, 4, 3, 4, 4), model.encode(["x"], VIDEO).positive
    with attached(model, LoraConfig(rank=2, alpha=6.0), seed=1) as parameters, torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.2)
        expected = model.predict(z, 500, dict(cond))
        weights = export(model, dict(parameters), 3.0, {})
    with applied(model, weights), torch.no_grad():
        found = model.predict(z, 500, dict(cond))
    assert (found - expected).abs().max() < 1e-5
    with torch.no_grad():
        assert (model.predict(z, 500, dict(cond)) - expected).abs().max() > 1e-3


def test_diffusers_with_peft_reads_the_file_with_equal_output(model: ModelScope, trained: Path, tmp_path: Path) -> None:
    expected = videos(model, load_lora(trained))
    other = tiny_model(tmp_path, torch.float32)
    state = {name.removeprefix("unet."): tensor for name, tensor in load_file(trained).items()}
    rank = next(len(tensor) for name, tensor in state.items() if name.endswith("lora_A.weight"))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(model.lora_targets))
    unet = peft.inject_adapter_in_model(config, other.denoiser)
    result = peft.set_peft_model_state_dict(unet, state)
    assert not result.unexpected_keys  # type: ignore[attr-defined]
    pipeline = TextToVideoSDPipeline(
        vae=other.vae, text_encoder=other.text_encoder, tokenizer=other.tokenizer, unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(model, VIDEO, [(5, "sample", row, "start") for row in (0, 1)])
    for row, prompt in enumerate(["a red circle", "a blue cross"]):
        frames = pipeline(
            prompt, height=8, width=8, num_frames=3, num_inference_steps=4, guidance_scale=2.0,
            latents=noise[row : row + 1], output_type="pt",
        ).frames  # fmt: skip
        assert (frames[0].clamp(0, 1) - expected[row]).abs().max() < 1e-4


def test_metadata_says_what_it_is(trained: Path) -> None:
    metadata = load_lora(trained).metadata
    assert metadata["base_model"] == "tiny"
    assert metadata["method"] == "vader"
    assert (metadata["steps"], metadata["k"], metadata["rank"]) == ("3", "1", "2")
    assert "brightness" in metadata["rewards"]
    assert trained.parent.name.endswith(metadata["configuration_hash"])


def test_training_goes_on_from_a_lora(model: ModelScope, trained: Path, tmp_path: Path) -> None:
    start = load_lora(trained)
    still = Settings(
        vader.Config(sampling_steps=3), train=TrainOptions(steps=1, learning_rate=1e-12, weight_decay=0.0), video=SIZE
    )
    found = align(model, Brightness(), PromptSet(("a",), ()), still, root=tmp_path, start=start).lora
    assert set(found) == set(start)
    assert all((found[name] - start[name]).abs().max() < 1e-6 for name in start)


def test_files_that_are_no_lora_are_refused(trained: Path, tmp_path: Path) -> None:
    for name, reason in (("lora.pt", "cannot be read"), ("lora.safetensors", "a pickle"), ("lora.txt", "ends in")):
        (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
        with pytest.raises(InputError, match=reason):
            load_lora(tmp_path / name)
    with pytest.raises(InputError, match="missing"):
        load_lora(tmp_path / "absent.safetensors")
    for cut in (0, 7, 100, trained.stat().st_size - 1):
        (tmp_path / "cut.safetensors").write_bytes(trained.read_bytes()[:cut])
        with pytest.raises(InputError, match="truncated or damaged"):
            load_lora(tmp_path / "cut.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="no LoRA"):
        load_lora(tmp_path / "foreign.safetensors")


def test_a_lora_of_another_base_names_it(model: ModelScope, trained: Path) -> None:
    known = load_lora(trained)
    wide = {name: t if "lora_A" in name else torch.zeros(len(t) + 1, t.shape[1]) for name, t in known.items()}
    renamed = {name.replace("down_blocks", "transformer_blocks"): t for name, t in known.items()}
    for tensors in (wide, renamed):
        weights = LoraWeights(tensors, {"base_model": "some other model"})
        with pytest.raises(InputError, match="some other model"), applied(model, weights):
            pass
    assert not any("lora" in name for name, _ in model.denoiser.named_modules())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_lora(trained)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vader_nodes.vader_backend.checkpoint.os.fsync", full)
    with pytest.raises(InputError, match="space"):
        save_lora(tmp_path / "out.safetensors", weights)
    assert not list(tmp_path.iterdir())


def test_going_on_from_a_lora_keeps_the_dropout(model: ModelScope, trained: Path) -> None:
    for start in (None, load_lora(trained)):
        with attached(model, LoraConfig(rank=4, dropout=0.3), seed=0, start=start):
            layers = [layer for layer in model.denoiser.modules() if isinstance(layer, LoraLayer)]
            assert layers
            assert {getattr(layer.lora_dropout["vader"], "p", 0.0) for layer in layers} == {0.3}
