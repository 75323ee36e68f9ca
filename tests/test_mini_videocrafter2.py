"""The mini VideoCrafter2: what the recipe writes is what the loader reads; widening keeps what was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from vader_nodes.vader_backend.loading import load_frozen, read_tensors
from vader_nodes.vader_backend.mini.files import weights
from vader_nodes.vader_backend.mini.recipe import image_autoencoder, text_to_video, vae, videocrafter2
from vader_nodes.vader_backend.mini.recipe.tokenizer import MAX_TOKENS, save_tokenizer
from vader_nodes.vader_backend.mini.recipe.videocrafter2_keys import original_tensors, text_tensors, unet_tensors
from vader_nodes.vader_backend.models import modelscope
from vader_nodes.vader_backend.models._videocrafter2_text import clip_weights
from vader_nodes.vader_backend.models._videocrafter2_unet import build_unet, make_unet
from vader_nodes.vader_backend.models.videocrafter2 import Config, VideoCrafter2, build, make_process, split
from vader_nodes.vader_backend.rng import generator
from vader_nodes.vader_backend.types import VideoSpec

VIDEO = VideoSpec(frames=3, height=8, width=16)


def randomized(network: Any) -> Any:
    """No norm stays at one, no bias and no last layer at zero; every weight is one that float16 holds."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1).copy_(parameter.half())
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VideoCrafter2:
    torch.manual_seed(0)
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, hidden_act="gelu",
    )  # fmt: skip
    tower = CLIPTextModel(text)
    unet = make_unet(
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
        block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=128, attention_head_dim=16,
    )  # fmt: skip
    image = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64), layers_per_block=1, scaling_factor=1.0,
    )  # fmt: skip
    parts = [randomized(part) for part in (unet, image, getattr(tower, "text_model", tower))]
    return VideoCrafter2("tiny", *parts, tokenizer, make_process())


@torch.no_grad()
def test_the_written_checkpoint_is_the_model(model: VideoCrafter2, tmp_path: Path) -> None:
    videocrafter2.save_videocrafter2(model, tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    loaded = build(Config(str(tmp_path)))
    for name in ("denoiser", "text_encoder"):
        own, read = model.parts()[name].state_dict(), loaded.parts()[name].state_dict()
        assert own.keys() == read.keys()
        assert all(torch.equal(own[key], read[key]) for key in own)
    prompts = ["a red circle moving left on a black background", "a"]
    given, cond = model.encode(prompts, VIDEO), loaded.encode(prompts, VIDEO)
    z = torch.randn(model.latent_shape(VIDEO, 2), generator=generator(0))
    assert loaded.latent_shape(VIDEO, 2) == z.shape
    assert close(loaded.predict(z, 500, dict(cond.positive)), model.predict(z, 500, dict(given.positive)), 1e-5)
    assert close(loaded.decode(z, [0, 1]), model.decode(z, [0, 1]), 1e-3)
    frames = torch.rand(2, 3, 3, 8, 16, generator=generator(1))
    assert close(loaded.encode_video(frames), model.encode_video(frames), 1e-3)
    assert loaded.vae.config.scaling_factor == 0.18215


def test_every_original_key_is_read(model: VideoCrafter2, tmp_path: Path) -> None:
    videocrafter2.save_videocrafter2(model, tmp_path)
    source = tmp_path / "model.safetensors"
    unet, image, text = split(read_tensors(source, "checkpoint"), source)
    assert len(unet) == len(model.denoiser.state_dict())
    assert len(image) == len(model.vae.state_dict())
    assert clip_weights(text).keys() == model.text_encoder.state_dict().keys()
    assert unet["init_attn.0.proj_in.weight"].shape == (128, 32, 1)
    assert image["decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert {key for key in text if ".resblocks.2." in key} == {
        key.replace(".resblocks.0.", ".resblocks.2.") for key in text if ".resblocks.0." in key
    }
    assert all(tensor.dtype == torch.float16 for tensor in unet.values())
    assert original_tensors(model).keys() == read_tensors(source, "checkpoint").keys()


def test_published_keys_come_back() -> None:
    file = Path(__file__).parent / "fixtures" / "videocrafter2_keys.json"
    shapes = {key: tuple(shape) for key, shape in json.loads(file.read_text(encoding="utf-8")).items()}
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    unet, _, text = split(published, file)
    denoiser = build_unet(unet, torch.float32, file).state_dict()
    assert {key: tensor.shape for key, tensor in unet_tensors(denoiser, layers=2).items()} == {
        key: tensor.shape for key, tensor in unet.items()
    }
    assert {key: tensor.shape for key, tensor in text_tensors(clip_weights(text)).items()} == {
        key: tensor.shape for key, tensor in text.items()
    }


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@torch.no_grad()
def test_widened_layers_compute_what_they_did() -> None:
    source = modelscope.build(modelscope.Config(str(weights("modelscope")))).denoiser
    unet = videocrafter2.start_unet(source)
    t = torch.tensor([0, 7, 500, 999])
    told = unet.time_embedding(unet.time_proj(t), torch.tensor([8.0]).expand(4))
    assert torch.allclose(told[:, :128], source.time_embedding(source.time_proj(t)), atol=1e-4)
    own, skipped = torch.randn(2, 2, 64, 4, 4, generator=generator(0))
    wide = unet.up_blocks[2].resnets[1].conv1(torch.cat([own, skipped], dim=1))
    narrow = source.up_blocks[2].resnets[1].conv1(torch.cat([own[:, :32], skipped[:, :32]], dim=1))
    assert torch.allclose(wide[:, :32], narrow, atol=1e-4)
    assert wide[:, 32:].std() > 0.1


def test_offset_noise_varies_in_the_mean() -> None:
    noise = videocrafter2.offset_noise(torch.Size((500, 4, 8, 8, 8)), generator(0))
    assert abs(float(noise.mean((2, 3, 4)).var()) - (videocrafter2.OFFSET**2 + 1 / 512)) < 2e-3
    assert abs(float(noise.var()) - (1 + videocrafter2.OFFSET**2)) < 0.01


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "_POOL", 4)
    monkeypatch.setattr(text_to_video, "_POOL", 100)
    monkeypatch.setattr(text_to_video, "BATCH", 2)
    monkeypatch.setattr(videocrafter2, "BATCH", 2)
    monkeypatch.setattr(image_autoencoder, "_BATCH", 2)


@pytest.mark.usefixtures("few")
def test_the_recipe_runs_to_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each training, on the embedded ModelScope."""
    teacher = load_frozen(AutoencoderKL, weights("modelscope") / "vae", torch.float32, "autoencoder")
    image = image_autoencoder.train_image_autoencoder(teacher, tmp_path, steps=2)
    norms = [module for module in image.modules() if isinstance(module, nn.GroupNorm)]
    assert all(norm.num_groups == 32 and norm.num_channels > 32 for norm in norms)
    source = modelscope.build(modelscope.Config(str(weights("modelscope"))))
    made = videocrafter2.start(source, image, save_tokenizer(tmp_path / "tokenizer"))
    before = made.denoiser.conv_in.weight.clone()
    videocrafter2.train_videocrafter2(made, teacher, tmp_path, steps=2)
    assert not torch.equal(made.denoiser.conv_in.weight, before)
    videocrafter2.save_videocrafter2(made, tmp_path)
    loaded = build(Config(str(tmp_path)))
    assert loaded.defaults.video == VideoSpec(8, 64, 64)
    assert loaded.denoiser.config.norm_num_groups == 32
