"""VideoCrafter2: parity with the original, every key of the published checkpoint, a whole tiny checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_videocrafter2 import FIXTURES, save_tiny, tiny_tensors, write_tokenizer
from torch import Tensor
from vader_nodes.tools.parity import videocrafter2 as parity
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.generate import SampleConfig, VideoConfig, generate
from vader_nodes.vader_backend.lora import LoraConfig, LoraWeights, applied, attached
from vader_nodes.vader_backend.memory.gradient_checkpointing import gradient_checkpointing
from vader_nodes.vader_backend.mini.files import weights
from vader_nodes.vader_backend.models import videocrafter2
from vader_nodes.vader_backend.models._ldm import build_autoencoder
from vader_nodes.vader_backend.models._videocrafter2_text import build_text_encoder, unused
from vader_nodes.vader_backend.models._videocrafter2_unet import build_unet
from vader_nodes.vader_backend.models.videocrafter2 import BUFFERS, Config, VideoCrafter2, lora_module, split
from vader_nodes.vader_backend.process import VariancePreserving
from vader_nodes.vader_backend.types import VideoSpec

SOURCE = Path("model.ckpt")
VIDEO = VideoSpec(frames=3, height=8, width=16, fps=24)
ATTENTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")


@pytest.mark.parametrize("item", ["unet_wide", "vae", "vae_attended", "text", "sampler", "sampler_plain"])
def test_equals_the_original(item: str) -> None:
    fixture = read(FIXTURES / f"videocrafter2_{item}.json")
    results = compare(fixture, parity.RUN[fixture.item])
    assert results
    assert not [result for result in results if not result[2]]


def test_attentions_may_be_deeper() -> None:
    """Before every block comes one that adds nothing, so that the network's outputs are those of the original."""
    fixture = read(FIXTURES / "videocrafter2_unet_wide.json")
    weights = dict(fixture.weights)
    for key, tensor in fixture.weights.items():
        if ".transformer_blocks.0." in key:
            adds = re.search(r"\.(to_out\.0|ff\.net\.2)\.", key)
            weights[key.replace("blocks.0.", "blocks.1.")] = tensor
            weights[key] = torch.zeros_like(tensor) if adds else tensor
    assert len(weights) > len(fixture.weights)
    results = compare(replace(fixture, weights=weights), parity.unet)
    assert not [result for result in results if not result[2]]


# --- the published checkpoint, on the meta device --------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    shapes = json.loads((FIXTURES / "videocrafter2_keys.json").read_text(encoding="utf-8"))
    assert len(shapes) == 2039
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_every_published_weight_has_its_place(published: dict[str, Tensor]) -> None:
    unet, vae, text = split(published, SOURCE)
    assert published.keys() > BUFFERS
    assert len(unet) + len(vae) + len(text) + len(BUFFERS) == 2039

    denoiser = build_unet(unet, torch.float32, SOURCE)
    assert sum(p.numel() for p in denoiser.parameters()) == 1_413_284_420
    assert len(denoiser.state_dict()) == len(unet)
    config = denoiser.config
    assert list(config.block_out_channels) == [320, 640, 1280, 1280]
    assert (config.layers_per_block, config.attention_head_dim, config.cross_attention_dim) == (2, 64, 1024)
    assert list(config.down_block_types) == ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"]

    autoencoder = build_autoencoder(vae, torch.float32, SOURCE)
    assert len(autoencoder.state_dict()) == len(vae)
    assert list(autoencoder.config.block_out_channels) == [128, 256, 512, 512]

    tower = build_text_encoder(text, torch.float32, SOURCE)
    assert (tower.config.num_hidden_layers, tower.config.num_attention_heads) == (23, 16)
    assert tower.config.eos_token_id == 49407
    assert len(unused(text)) == 12 + 2
    split_projections = 23 * 2 * 2  # a packed weight and a packed bias per layer become three each
    assert len(tower.state_dict()) == len(text) - len(unused(text)) + split_projections


def test_published_lora_modules_have_their_place(published: dict[str, Tensor]) -> None:
    unet = split(published, SOURCE)[0]
    denoiser = build_unet(unet, torch.float32, SOURCE)
    modules = dict(denoiser.named_modules())
    originals = [key.removesuffix(".weight") for key in unet if key.removesuffix(".weight").endswith(ATTENTIONS)]
    for name in originals:
        found = lora_module(f"base_model.model.model.diffusion_model.{name}")
        assert modules[found].weight.shape == unet[f"{name}.weight"].shape, name
        assert lora_module(name) == lora_module(found) == found
    assert len({lora_module(name) for name in originals}) == len(originals)
    assert sum(name.endswith(VideoCrafter2.lora_targets) for name in map(lora_module, originals)) == 198


def test_lora_modules_are_renamed_place_by_place() -> None:
    attention = "transformer_blocks.0.attn2.to_q"
    places = {
        "init_attn.0": "transformer_in",
        "input_blocks.1.1": "down_blocks.0.attentions.0",
        "input_blocks.8.2": "down_blocks.2.temp_attentions.1",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.temp_attentions.0",
        "output_blocks.3.1": "up_blocks.1.attentions.0",
        "output_blocks.11.2": "up_blocks.3.temp_attentions.2",
    }
    assert {place: lora_module(f"{place}.{attention}") for place in places} == {
        place: f"{ours}.{attention}" for place, ours in places.items()
    }


# --- a whole tiny checkpoint -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return tiny_tensors()


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("VideoCrafter2")
    save_tiny(path, tensors)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoCrafter2:
    return videocrafter2.build(Config(str(folder)))


def test_it_is_recognised_by_its_weights(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "converted.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, other / "model.safetensors")
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.zeros(4)}}, other / "model.ckpt")
    assert videocrafter2.matches(folder)
    assert videocrafter2.matches(folder / "model.ckpt")
    assert videocrafter2.matches(tmp_path / "converted.safetensors")
    for path in (other, other / "model.ckpt", weights("modelscope"), tmp_path / "absent", folder / "tokenizer"):
        assert not videocrafter2.matches(path)


def test_the_same_weights_load_from_either_format(
    model: VideoCrafter2, folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "videocrafter.safetensors")
    other = videocrafter2.build(Config(str(tmp_path / "videocrafter.safetensors"), tokenizer=str(folder / "tokenizer")))
    assert model.name == folder.name
    assert other.name == "videocrafter"
    for part, network in model.parts().items():
        theirs = other.parts()[part].state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in network.state_dict().items()), part


def test_keys_written_by_deepspeed_are_read(model: VideoCrafter2, folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / "deepspeed.ckpt"
    torch.save({"module": {f"_forward_module.{key}": tensor for key, tensor in tensors.items()}}, path)
    assert videocrafter2.build(Config(str(path))).fingerprint == model.fingerprint


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.diffusion_model.output_blocks.0.0.in_layers.0.weight"]


def drop_level(tensors: dict[str, Tensor]) -> None:
    del tensors["model.diffusion_model.init_attn.0.proj_in.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["first_stage_model.encoder.surplus.weight"] = torch.zeros(1)


def add_outside(tensors: dict[str, Tensor]) -> None:
    tensors["image_proj_model.weight"] = torch.zeros(1)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["cond_stage_model.model.ln_final.bias"] = torch.zeros(3)


@pytest.mark.parametrize("spoil", [drop, drop_level, add, add_outside, reshape])
def test_spoilt_checkpoints_are_refused(
    spoil: Callable[[dict[str, Tensor]], None], folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    spoilt = dict(tensors)
    spoil(spoilt)
    save_file(spoilt, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        videocrafter2.build(Config(str(tmp_path), tokenizer=str(folder / "tokenizer")))


def test_a_missing_tokenizer_is_told_with_the_names_of_its_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt"):
        videocrafter2.build(Config(str(tmp_path)))
    write_tokenizer(tmp_path / "tokenizer", 90)
    with pytest.raises(InputError, match="90 tokens"):
        videocrafter2.build(Config(str(tmp_path)))


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint of VideoCrafter2"):
        videocrafter2.build(Config(str(tmp_path)))


def test_published_settings(model: VideoCrafter2) -> None:
    published = videocrafter2.PUBLISHED
    schedule = model.process.schedule(published.steps, published.video)
    assert schedule.timesteps == tuple(float(t) for t in range(961, 0, -40))
    assert schedule.fresh_noise(24, 1.0) == pytest.approx(0.0206, abs=1e-4)
    assert (published.guidance, published.rank, published.learning_rate) == (12, 16, 2e-4)
    assert published.video == VideoSpec(12, 320, 512, 24)


def test_everything_is_frozen(model: VideoCrafter2) -> None:
    for name, network in model.parts().items():
        assert not network.training, name
        assert not any(p.requires_grad for p in network.parameters()), name


def test_short_prompts_are_padded_with_zero_and_long_ones_cut(model: VideoCrafter2) -> None:
    seen: list[Tensor] = []
    handle = model.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    model.encode(["cat", "z " * 40], VIDEO)
    handle.remove()
    start, end = model.text_encoder.config.vocab_size - 2, model.text_encoder.config.vocab_size - 1
    letters = [ord(letter) - ord("a") for letter in "ca"] + [26 + ord("t") - ord("a")]
    assert seen[0].tolist() == [
        [start, end, *[0] * 11],
        [start, *letters, end, *[0] * 8],
        [start, *[26 + 25] * 11, end],
    ]
    assert model.truncated("cat") == ""
    assert model.truncated("z " * 11 + "q").strip() == "q"


def test_conditioning_names_the_frames_per_second(model: VideoCrafter2) -> None:
    cond = model.encode(["a cat", "a dog"], VIDEO, negative="blur")
    assert cond.positive["text"].shape == cond.negative["text"].shape == (2, 13, 32)
    assert cond.positive["fps"].tolist() == cond.negative["fps"].tolist() == [24, 24]
    assert not torch.equal(cond.positive["text"][0], cond.negative["text"][0])
    with pytest.raises(InputError, match="not from Image Prompts"):
        model.encode(["a cat"], VIDEO, images=torch.zeros(1, 3, 8, 8))


@torch.no_grad()
def test_samples_do_not_mix_and_each_has_its_own_fps(model: VideoCrafter2) -> None:
    cond = model.encode(["a cat", "a dog"], VIDEO)
    z = torch.randn(model.latent_shape(VIDEO, 2), generator=torch.Generator().manual_seed(0))
    told = {**cond.positive, "fps": torch.tensor([24.0, 8.0])}
    both = model.predict(z, 300, told)
    same = model.predict(z, 300, dict(cond.positive))
    alone = model.predict(z[1:], 300, {name: tensor[1:] for name, tensor in told.items()})
    assert (both[1:] - alone).abs().max() < 1e-5
    assert (both[:1] - same[:1]).abs().max() < 1e-5
    assert (both[1:] - same[1:]).abs().max() > 1e-3


def test_decoding_is_by_frame_and_differentiable(model: VideoCrafter2) -> None:
    z = torch.randn(model.latent_shape(VIDEO, 2), generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = model.decode(z, range(VIDEO.frames))
    assert whole.shape == (2, 3, 3, 8, 16)
    assert 0 <= whole.min() <= whole.max() <= 1
    part = model.decode(z, [2])
    assert (whole[:, 2:] - part).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(part.mean(), z)
    assert gradient[:, :, 2].abs().sum() > 0
    assert gradient[:, :, :2].abs().sum() == 0
    assert model.encode_video(whole.detach()).shape == z.shape


def test_lora_gradients_are_the_same_with_checkpointing(model: VideoCrafter2) -> None:
    cond = model.encode(["a cat", "a dog"], VIDEO)
    z = torch.randn(model.latent_shape(VIDEO, 2), generator=torch.Generator().manual_seed(0))
    with attached(model, LoraConfig(rank=2), seed=0) as parameters:
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        plain = torch.autograd.grad(model.predict(z, 300, dict(cond.positive)).square().sum(), parameters.values())
        with gradient_checkpointing(model):
            spared = torch.autograd.grad(model.predict(z, 300, dict(cond.positive)).square().sum(), parameters.values())
    assert any("transformer_in" in name for name in parameters)
    assert all(gradient.any() for gradient in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, spared, strict=True))


@torch.no_grad()
def test_a_lora_under_the_original_names_is_applied(model: VideoCrafter2, tensors: dict[str, Tensor]) -> None:
    rng = torch.Generator().manual_seed(0)
    lora = {}
    for key, tensor in split(tensors, SOURCE)[0].items():
        name = f"base_model.model.model.diffusion_model.{key.removesuffix('.weight')}"
        if name.endswith(VideoCrafter2.lora_targets):
            lora[f"{name}.lora_A.weight"] = torch.randn(2, tensor.shape[1], generator=rng)
            lora[f"{name}.lora_B.weight"] = torch.randn(len(tensor), 2, generator=rng)
    z = torch.randn(model.latent_shape(VIDEO, 1), generator=rng)
    cond = dict(model.encode(["a cat"], VIDEO).positive)
    plain = model.predict(z, 300, cond)
    with attached(model, LoraConfig(rank=2), seed=0) as parameters:
        assert len(parameters) == len(lora)
    with applied(model, LoraWeights(lora)):
        assert (model.predict(z, 300, cond) - plain).abs().max() > 1e-2
    assert torch.equal(model.predict(z, 300, cond), plain)


def test_a_video_is_sampled(model: VideoCrafter2) -> None:
    config = SampleConfig(steps=3, guidance=12, eta=1)
    video = generate(model, ["a cat"], config, VideoConfig(frames=2, height=8, width=8))
    assert video.shape == (1, 2, 3, 8, 8)
    assert video.isfinite().all()


@pytest.mark.parametrize("size", [(3, 10, 8), (3, 8, 1), (0, 8, 8)])
def test_sizes_outside_the_model_are_refused(model: VideoCrafter2, size: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"multiple of|at least"):
        model.check(VideoSpec(*size))


def test_a_dynamic_scale_needs_noise_prediction() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        videocrafter2.make_process({**videocrafter2.SCHEDULER, "prediction_type": "v_prediction"})


@pytest.mark.parametrize("steps", [1, 6, 7, 25, 50, 999, 1000])
def test_exactly_the_steps_asked_for(steps: int) -> None:
    process: VariancePreserving = videocrafter2.make_process()
    schedule = process.schedule(steps)
    assert len(schedule) == steps
    assert len(schedule.alpha) == len(schedule.sigma) == steps + 1
