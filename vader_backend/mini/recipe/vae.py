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
    pool = FramePool("vae")

    def loss(step: int, rng: torch.Generator) -> Tensor:
        frames = pool.draw(step, _BATCH, rng)
        posterior = vae.encode(frames).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng)
        output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return drawing_loss(output, frames) + 2e-7 * posterior.kl().mean()

    fit("vae", vae, loss, steps=steps, learning_rate=2e-3, work=work, muon=False)
    _whiten(vae)
    return vae


class FramePool:
    """Frames of renders for one training, made anew every thousand steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.chapter = -1
        self.frames = torch.empty(0)

    def draw(self, step: int, batch: int, rng: torch.Generator) -> Tensor:
        """[batch, 3, 64, 64] in [-1, 1], channels last."""
        if self.chapter != step // _POOL_LIFE:
            self.chapter = step // _POOL_LIFE
            draw = generator(SEED, f"{self.name} pool", self.chapter)
            scenes = random_scenes(_POOL, draw, ALL_SCENES)
            self.frames = (render(scenes, random_look(_POOL, draw)) * 2 - 1).flatten(0, 1)
        rows = torch.randint(len(self.frames), (batch,), generator=rng)
        return self.frames[rows].contiguous(memory_format=torch.channels_last)


def drawing_loss(output: Tensor, frames: Tensor) -> Tensor:
    """How far drawn frames in [-1, 1] are from the true ones, the shape before all."""
    error = output - frames
    return (shape_weight(frames) * (error.abs() + 2 * error.square())).mean()


def shape_weight(frames: Tensor) -> Tensor:
    """More weight on the shape, which covers a few percent of a frame: without it colours are learned last."""
    backdrop = frames[:, :, :1, :1]
    return 1 + 6 * ((frames - backdrop).abs().amax(1, keepdim=True) > 0.05)


@torch.no_grad()
def _whiten(vae: AutoencoderKL) -> None:
    """The folder layout has one scaling factor for all channels; after this it is 1 for every one of them."""
    rng = generator(SEED, "vae statistics")
    frames = render(random_scenes(300, rng), random_look(300, rng)).flatten(0, 1) * 2 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in frames.split(100)])
    rescale(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))


@torch.no_grad()
def rescale(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make latents (z - mean) / std, per channel, by the 1x1 convolutions around them; reconstructions stay."""
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
