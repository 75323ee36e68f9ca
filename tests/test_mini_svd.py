"""The mini image-to-video model before training: its file, its decoder, what its denoiser is trained to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_svd import original_checkpoint, tiny_networks
from torch import nn
from transformers import CLIPModel
from vader_nodes.vader_backend.loading import load_frozen
from vader_nodes.vader_backend.mini.files import weights
from vader_nodes.vader_backend.mini.recipe.svd import new_unet, v_target, vision_tower
from vader_nodes.vader_backend.mini.recipe.svd_autoencoder import new_temporal_autoencoder
from vader_nodes.vader_backend.mini.recipe.svd_layout import save_svd
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, random_look, render
from vader_nodes.vader_backend.models import svd
from vader_nodes.vader_backend.models._single_file import shapes
from vader_nodes.vader_backend.models.svd import Config, build, denoise
from vader_nodes.vader_backend.process import EDM
from vader_nodes.vader_backend.rewards._clip import load_clip
from vader_nodes.vader_backend.types import VideoSpec


def image_autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return (
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 64), layers_per_block=1, scaling_factor=1.0,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


@torch.no_grad()
def blur(network: nn.Module) -> Any:
    """Move every weight, so that none stays zero or one."""
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network.eval().requires_grad_(False)


def test_the_file_opens_as_the_networks_that_were_written(tmp_path: Path) -> None:
    clip = load_frozen(CLIPModel, weights("clip"), torch.float32, "CLIP")
    torch.manual_seed(0)
    unet, vae = blur(new_unet(128)), blur(new_temporal_autoencoder(image_autoencoder()))
    save_svd(unet, vae, vision_tower(clip), tmp_path / "svd.safetensors")
    assert svd.matches(tmp_path)
    model = build(Config(folder=str(tmp_path)))
    assert (model.name, model.defaults.video) == ("svd", VideoSpec(8, 64, 64, 7.0))
    assert model.latent_shape(model.defaults.video, 1) == (1, 4, 8, 8, 8)

    scenes, rng = SEEN_SCENES[:2], torch.Generator().manual_seed(0)
    video = render(scenes, random_look(2, rng))
    cond = dict(model.encode(["", ""], model.defaults.video, images=video[:, 0]).positive)
    z = torch.randn(2, 4, 8, 8, 8, generator=rng)
    with torch.no_grad():
        expected = denoise(unet.half().float(), z, 0.3, cond)
        torch.testing.assert_close(model.predict(z, 0.3, cond), expected, rtol=1e-3, atol=1e-3)
        moments = vae.half().float().encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean * 0.18215
        torch.testing.assert_close(model.encode_video(video), moments.unflatten(0, (2, 8)).transpose(1, 2))
        frames = vae.decode(z[0].transpose(0, 1) / 0.18215, num_frames=8).sample / 2 + 0.5
        torch.testing.assert_close(model.decode(z[:1], range(8))[0], frames.clamp(0, 1))
        features = load_clip(weights("clip")).image_features(video[:, 0])
    embedded = nn.functional.normalize(cond["image"][:, 0], dim=-1)
    torch.testing.assert_close(embedded, features, rtol=1e-3, atol=1e-3)


def test_the_layout_is_the_one_that_other_checkpoints_are_written_in(tmp_path: Path) -> None:
    networks = tiny_networks()
    save_svd(**networks, path=tmp_path / "svd.safetensors")
    expected = {key: tuple(value.shape) for key, value in original_checkpoint(networks).items() if "token_" not in key}
    assert shapes(tmp_path / "svd.safetensors") == expected


@torch.no_grad()
def test_the_untrained_temporal_decoder_is_the_image_decoder() -> None:
    images = image_autoencoder()
    for module in (images.decoder.mid_block.resnets[1].conv2, images.decoder.mid_block.attentions[0].to_out[0]):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    nn.init.zeros_(images.post_quant_conv.bias)
    pictures, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(6, 4, 4, 4)
    latents, frames = images.encode(pictures).latent_dist.mean, images.decode(z).sample
    vae = new_temporal_autoencoder(images)
    factor = vae.config.scaling_factor
    assert factor == 0.18215
    torch.testing.assert_close(vae.encode(pictures).latent_dist.mean * factor, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z / factor, num_frames=3).sample, frames, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 300.0])
def test_the_target_is_what_the_process_takes_for_a_perfect_prediction(sigma: float) -> None:
    x0, noise = torch.randn(2, 2, 4, 3, 2, 2, dtype=torch.float64)
    z = x0 + sigma * noise
    found, direction = EDM(lambda steps: [1.0] * steps).split(
        z, v_target(x0, noise, torch.tensor(sigma, dtype=torch.float64)), 1.0, sigma
    )
    torch.testing.assert_close(found, x0)
    torch.testing.assert_close(direction, noise)
