"""The mini Stable Video Diffusion's autoencoder: the shared image autoencoder with a decoder that sees all frames."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from ...rng import generator
from .. import oracle
from ..world import ALL_SCENES, FRAMES, random_look, random_scenes, render
from .fit import SEED, fit
from .vae import drawing_loss, rescale

STEPS = 300
_BATCH = 2
_NAME = "svd_autoencoder"


@torch.no_grad()
def new_temporal_autoencoder(images: AutoencoderKL) -> AutoencoderKLTemporalDecoder:
    """An image autoencoder in the class of Stable Video Diffusion; along time it does nothing before it is trained.

    Latents leave it divided by the layout's scaling factor. Two things of the image decoder have no place here and
    are left to training: the attention and the second block of its middle, and the bias of its first 1x1 convolution
    beyond the picture's edge.

    Args:
        images: its latents have zero mean and unit variance in every channel; it is rescaled in place.
    """
    torch.manual_seed(SEED)
    config = images.config
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=config.down_block_types,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
    )
    channels = config.latent_channels
    rescale(images, torch.zeros(channels), torch.full((channels,), vae.config.scaling_factor))
    known = vae.state_dict().keys()
    weights = {_temporal_name(name): value for name, value in images.state_dict().items()}
    vae.load_state_dict({name: value for name, value in weights.items() if name in known}, strict=False)
    first, inner = images.post_quant_conv, vae.decoder.conv_in
    inner.bias += inner.weight.sum((2, 3)) @ first.bias
    inner.weight.copy_(torch.einsum("omhw,mi->oihw", inner.weight, first.weight[:, :, 0, 0]))
    _still(vae)
    return vae


def _temporal_name(name: str) -> str:
    """The image decoder's residual blocks are the spatial halves of the temporal decoder's."""
    return re.sub(r"^(decoder\..*resnets\.\d+)\.", r"\1.spatial_res_block.", name)


def _still(vae: AutoencoderKLTemporalDecoder) -> None:
    """Make every temporal layer the identity."""
    for name, module in vae.decoder.named_modules():
        if name.endswith("temporal_res_block"):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    nn.init.zeros_(vae.decoder.time_conv_out.bias)


def train_temporal_autoencoder(images: AutoencoderKL, work: Path, steps: int = STEPS) -> AutoencoderKLTemporalDecoder:
    """Train the decoder on fresh renders, a few whole videos at a time; the encoder stays as it is."""
    vae = new_temporal_autoencoder(images).requires_grad_(False)
    vae.decoder.requires_grad_(True)

    def loss(_: int, rng: torch.Generator) -> Tensor:
        video = render(random_scenes(_BATCH, rng, ALL_SCENES), random_look(_BATCH, rng))
        frames = video.flatten(0, 1) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(frames).latent_dist.sample(rng)
        return drawing_loss(vae.decode(latents, num_frames=FRAMES).sample.float(), frames)

    fit(_NAME, vae.decoder, loss, steps=steps, learning_rate=1e-3, work=work, muon=False)
    return vae


@torch.no_grad()
def judge_temporal_autoencoder(vae: AutoencoderKLTemporalDecoder, videos: int = 200) -> dict[str, float]:
    """What the oracle reads from reconstructions of fresh renders, and their mean absolute error."""
    rng = generator(SEED, _NAME, "judge")
    scenes = random_scenes(videos, rng, ALL_SCENES)
    video = render(scenes, random_look(videos, rng))
    output = torch.cat([_reconstruction(vae, part) for part in video.split(10)])
    return {**oracle.accuracy(output, scenes), "mean_absolute_error": float((output - video).abs().mean())}


def _reconstruction(vae: AutoencoderKLTemporalDecoder, video_BTCHW: Tensor) -> Tensor:
    latents = vae.encode(video_BTCHW.flatten(0, 1) * 2 - 1).latent_dist.mean
    frames = vae.decode(latents, num_frames=video_BTCHW.shape[1]).sample
    return (frames / 2 + 0.5).clamp(0, 1).view_as(video_BTCHW)
