"""The mini autoencoder: AutoencoderKL, 8x smaller latents of 4 channels, on single frames."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...rng import generator
from .. import oracle
from ..world import ALL_SCENES, random_look, random_scenes, render
from .fit import SEED, fit

STEPS = 4500
_BATCH = 16
_POOL = 2500
_POOL_LIFE = 1000


def new_vae() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_vae(work: Path, steps: int = STEPS) -> AutoencoderKL:
    """Train it; its latents then have zero mean and unit variance in every channel."""
    vae = new_vae().to(memory_format=torch.channels_last)
    pool: dict[int, Tensor] = {}

    def loss(step: int, rng: torch.Generator) -> Tensor:
        chapter = step // _POOL_LIFE
        if chapter not in pool:
            pool.clear()
            draw = generator(SEED, "vae pool", chapter)
            scenes = random_scenes(_POOL, draw, ALL_SCENES)
            pool[chapter] = (render(scenes, random_look(_POOL, draw)) * 2 - 1).flatten(0, 1)
        frames = pool[chapter][torch.randint(len(pool[chapter]), (_BATCH,), generator=rng)]
        posterior = vae.encode(frames.contiguous(memory_format=torch.channels_last)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng)
        output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = output - frames
        return (_weight(frames) * (error.abs() + 2 * error.square())).mean() + 2e-7 * posterior.kl().mean()

    fit("vae", vae, loss, steps=steps, learning_rate=2e-3, work=work, muon=False)
    _whiten(vae)
    return vae


def _weight(frames: Tensor) -> Tensor:
    """More weight on the shape, which covers a few percent of a frame: without it colours are learned last."""
    backdrop = frames[:, :, :1, :1]
    return 1 + 6 * ((frames - backdrop).abs().amax(1, keepdim=True) > 0.05)


@torch.no_grad()
def _whiten(vae: AutoencoderKL) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latents.

    The folder layout has one scaling factor for all channels; after this it is 1 and no reader
    needs to know of per-channel statistics.
    """
    rng = generator(SEED, "vae statistics")
    frames = render(random_scenes(300, rng), random_look(300, rng)).flatten(0, 1) * 2 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in frames.split(100)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[None, :, None, None]
    channels = len(mean)
    encode.weight[:channels] /= std[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def judge_vae(vae: AutoencoderKL, videos: int = 200) -> dict[str, float]:
    """What the oracle reads from reconstructions of fresh renders, and their mean absolute error."""
    rng = generator(SEED, "vae judge")
    scenes = random_scenes(videos, rng, ALL_SCENES)
    video = render(scenes, random_look(videos, rng))
    frames = video.flatten(0, 1) * 2 - 1
    output = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in frames.split(100)])
    output = (output / 2 + 0.5).clamp(0, 1).view_as(video)
    return {**oracle.accuracy(output, scenes), "mean_absolute_error": float((output - video).abs().mean())}


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Write it into a diffusers folder, weights in float16."""
    vae.half().save_pretrained(folder / "vae")
