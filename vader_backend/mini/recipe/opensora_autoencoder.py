"""The mini Open-Sora's video autoencoder: the mini image autoencoder per frame, and a small causal one along time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ...models._opensora_vae import IMAGE_SCALE, VideoAutoencoder
from ...rng import generator
from .. import oracle
from ..world import ALL_SCENES, Look, Scene, random_look, random_scenes, render
from .fit import SEED, fit
from .vae import rescale, shape_weight

FRAMES = 17
STEPS = 1800
_BATCH = 8
_SHOWN = 2  # videos of a batch whose frames are compared as pixels
_POOL = 2000
_CHUNK = 50
_NAME = "opensora_autoencoder"
CONFIG = {
    "model_type": "VideoAutoencoderPipeline",
    "micro_frame_size": FRAMES,
    "micro_batch_size": FRAMES,
    "vae_2d": {
        "type": "VideoAutoencoderKL",
        "block_out_channels": [16, 32, 64, 96],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "vae_temporal": {
        "type": "VAE_Temporal_SD",
        "filters": 32,
        "num_res_blocks": 1,
        "num_groups": 8,
        "channel_multipliers": [1, 1, 1, 2],
    },
}


def new_video_autoencoder(images: AutoencoderKL) -> VideoAutoencoder:
    """Untrained along time, around a trained image autoencoder that stays frozen.

    Args:
        images: one of `vae.new_vae`'s sizes whose latents have zero mean and unit variance.
    """
    torch.manual_seed(SEED)
    vae = VideoAutoencoder.from_config(CONFIG)
    inner: Any = vae.spatial_vae["module"]
    inner.load_state_dict(images.state_dict())
    channels = inner.config.latent_channels
    rescale(inner, torch.zeros(channels), torch.full((channels,), IMAGE_SCALE))  # unit variance behind the factor
    inner.to(memory_format=torch.channels_last).requires_grad_(False)
    return vae


def train_video_autoencoder(images: AutoencoderKL, work: Path, steps: int = STEPS) -> VideoAutoencoder:
    """Train it on image latents of renders; its latents then have zero mean and unit variance in every channel."""
    vae = new_video_autoencoder(images)
    latents, weights = _pool(vae)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (_BATCH,), generator=rng)
        target = latents[rows].float()
        posterior = DiagonalGaussianDistribution(vae.temporal_vae.encode(target).float())
        noise = torch.randn(posterior.mean.shape, generator=rng)
        output = vae.temporal_vae.decode(posterior.mean + posterior.std * noise, FRAMES).float()
        error = (weights[rows] * (output - target).square()).mean()
        frame = int(torch.randint(FRAMES, (1,), generator=rng))
        seen = _pixel_error(vae, output[:_SHOWN, :, frame : frame + 1], target[:_SHOWN, :, frame : frame + 1])
        return error + seen + 1e-6 * posterior.kl().mean()

    fit(_NAME, vae, loss, steps=steps, learning_rate=2e-3, work=work, muon=False)
    _whiten(vae, latents[:500])
    return vae


def _pixel_error(vae: VideoAutoencoder, output: Tensor, target: Tensor) -> Tensor:
    """How much frames differ once both are decoded, with more weight on the shape."""
    with torch.no_grad():
        wanted = vae.decode_images(target).float()[:, :, 0]
    shown = vae.decode_images(output).float()[:, :, 0]
    return (shape_weight(wanted) * (shown - wanted).abs()).mean()


def renders(
    rng: torch.Generator,
    count: int,
    pool: Sequence[Scene],
    look: Callable[[int, torch.Generator], Look] = random_look,
) -> Iterator[tuple[list[Scene], Tensor]]:
    """Scenes of a pool and their videos [B, 3, 17, 64, 64] in [-1, 1], in parts that fit into memory."""
    for start in range(0, count, _CHUNK):
        scenes = random_scenes(min(_CHUNK, count - start), rng, pool)
        yield scenes, render(scenes, look(len(scenes), rng), FRAMES).transpose(1, 2) * 2 - 1


@torch.no_grad()
def _pool(vae: VideoAutoencoder) -> tuple[Tensor, Tensor]:
    """Image latents [B, 4, 17, 8, 8] and the weights [B, 1, 17, 8, 8] of their places; float16."""
    latents, weights = [], []
    for _, video in renders(generator(SEED, _NAME, "pool"), _POOL, ALL_SCENES):
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode_images(video).half())
        frames = video.transpose(1, 2).flatten(0, 1)
        weight = F.max_pool2d(shape_weight(frames).float(), vae.spatial_factor)
        weights.append(weight.unflatten(0, (len(video), FRAMES)).transpose(1, 2).half())
    return torch.cat(latents), torch.cat(weights)


@torch.no_grad()
def _whiten(vae: VideoAutoencoder, image_latents: Tensor) -> None:
    """Set the buffers of the layout that hold each latent channel's deviation and mean."""
    moments = torch.cat([vae.temporal_vae.encode(part) for part in image_latents.float().split(_CHUNK)])
    latents = moments.chunk(2, dim=1)[0]
    vae.shift.copy_(latents.mean((0, 2, 3, 4)).view_as(vae.shift))
    vae.scale.copy_(latents.std((0, 2, 3, 4)).view_as(vae.scale))


@torch.no_grad()
def judge_video_autoencoder(vae: VideoAutoencoder, videos: int = 200) -> dict[str, float]:
    """What the oracle reads from reconstructions of fresh renders, and their mean absolute error."""
    scenes: list[Scene] = []
    outputs, errors = [], []
    for part, video in renders(generator(SEED, _NAME, "judge"), videos, ALL_SCENES):
        output = vae.decode(vae.encode(video), range(FRAMES)).clamp(-1, 1)
        scenes += part
        outputs.append((output / 2 + 0.5).transpose(1, 2))
        errors.append((output - video).abs().mean((1, 2, 3, 4)) / 2)
    return {
        **oracle.accuracy(torch.cat(outputs), scenes),
        "mean_absolute_error": float(torch.cat(errors).mean()),
    }
