"""The mini image autoencoder of VideoCrafter2 and Stable Video Diffusion, whose layouts fix 32 groups in every norm.

The mini autoencoder of ModelScope teaches it its own latents, so that all of them share one latent
space, and a denoiser may start from the weights of another family's. Narrower levels than 64 would
leave one channel to a group: such a norm takes away the mean of every channel, and with it the
brightness of a plain picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...loading import load_frozen
from ...rng import generator
from ..world import ALL_SCENES, random_look, random_scenes, render
from .fit import SEED, fit
from .vae import FramePool, drawing_loss, judge_vae
from .widen import widen

STEPS = 600
_NAME = "image_autoencoder"
_BATCH = 8


def image_autoencoder(work: Path, weights: Path) -> dict[str, Any]:
    """Train it, judge it and leave it in the work folder, in float32 and with latents of unit variance."""
    teacher = load_frozen(AutoencoderKL, weights / "modelscope" / "vae", torch.float32, "mini autoencoder")
    vae = train_image_autoencoder(teacher, work)
    vae.save_pretrained(work / _NAME / "vae")
    return judge_image_autoencoder(vae, teacher)


def load_image_autoencoder(work: Path) -> AutoencoderKL:
    """The trained one, frozen. Raises InputError where it has not been trained yet."""
    return load_frozen(AutoencoderKL, work / _NAME / "vae", torch.float32, "mini image autoencoder")


def new_image_autoencoder() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_image_autoencoder(teacher: AutoencoderKL, work: Path, steps: int = STEPS) -> AutoencoderKL:
    """Its encoder learns the latents that the teacher gives, its decoder to draw the frames from them."""
    vae = new_image_autoencoder()
    widen(vae, teacher.state_dict())
    vae.to(memory_format=torch.channels_last)
    pool = FramePool(_NAME)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        frames = pool.draw(step, _BATCH, rng)
        with torch.no_grad():
            taught = teacher.encode(frames).latent_dist
        noise = torch.randn(taught.mean.shape, generator=rng)
        output = vae.decode(taught.mean + taught.std * noise).sample.float()
        learned = vae.encode(frames).latent_dist
        apart = (learned.mean - taught.mean).square().mean() + 0.01 * (learned.logvar - taught.logvar).square().mean()
        return drawing_loss(output, frames) + apart

    fit(_NAME, vae, loss, steps=steps, learning_rate=2e-3, work=work, muon=False)
    return vae


@torch.no_grad()
def judge_image_autoencoder(vae: AutoencoderKL, teacher: AutoencoderKL, videos: int = 200) -> dict[str, float]:
    """How well it rebuilds fresh renders, and the root mean square between its latents and the teacher's."""
    rng = generator(SEED, _NAME, "judge")
    frames = render(random_scenes(videos, rng, ALL_SCENES), random_look(videos, rng)).flatten(0, 1) * 2 - 1
    apart = [vae.encode(part).latent_dist.mean - teacher.encode(part).latent_dist.mean for part in frames.split(100)]
    return {**judge_vae(vae, videos), "latent_error": float(torch.cat(apart).square().mean().sqrt())}
