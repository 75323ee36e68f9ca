"""The mini image-to-video model: Stable Video Diffusion's networks, trained as that one is, in its original file.

The autoencoder's encoder is the one that other mini families share, the image encoder is the mini CLIP's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from ...generate import SampleConfig, generate
from ...loading import load_frozen
from ...models.svd import Config, StableVideoDiffusion, build, denoise
from ...rng import generator
from .. import oracle
from ..world import FRAMES, SEEN_SCENES, UNSEEN_SCENES, Look, large_look, random_scenes, render
from .fit import SEED, fit
from .image_autoencoder import load_image_autoencoder
from .svd_autoencoder import judge_temporal_autoencoder, train_temporal_autoencoder
from .svd_layout import save_svd

STEPS = 2400
MOTION_BUCKET = 42.0  # per pixel of speed, so that the published default of 127 stands for 3 pixels per frame
_BATCH = 16
_POOL = 2000
_DROP_IMAGE = 0.15
_NOISE_MEAN, _NOISE_DEVIATION = 1.0, 1.6  # of log sigma, as published
_NAME = "svd"


def svd(work: Path, weights: Path) -> dict[str, Any]:
    """Train the decoder, then the denoiser, write the checkpoint, and judge it as it was written.

    The denoiser is trained as the loader gives it from a first file, so that it sees the latents of the weights that
    are shipped.
    """
    clip = load_frozen(CLIPModel, weights / "clip", torch.float32, "mini CLIP")
    vae, image_encoder = train_temporal_autoencoder(load_image_autoencoder(work), work), vision_tower(clip)
    untrained, final = work / _NAME / "untrained.safetensors", weights / "svd" / "svd.safetensors"
    save_svd(new_unet(clip.config.projection_dim), vae, image_encoder, untrained)
    model = build(Config(folder=str(untrained)))
    train_svd(model, work)
    save_svd(model.denoiser, model.vae, model.image_encoder, final)
    model = build(Config(folder=str(final.parent)))
    return {"autoencoder": judge_temporal_autoencoder(model.vae), **judge_svd(model)}


def vision_tower(clip: CLIPModel) -> CLIPVisionModelWithProjection:
    """The vision half of a CLIPModel, sharing its weights."""
    config = {**clip.config.vision_config.to_dict(), "projection_dim": clip.config.projection_dim}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    tower.vision_model, tower.visual_projection = clip.vision_model, clip.visual_projection
    return tower


def new_unet(embedding: int) -> UNetSpatioTemporalConditionModel:
    """The untrained denoiser of 8 frames of 8x8 latents; `embedding` is the width of the image embedding.

    It is nowhere narrower than 64: see `image_autoencoder` on norms of 32 groups. Attention where latents are 4x4
    alone halves the time of a step.
    """
    torch.manual_seed(SEED)
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        num_frames=FRAMES,
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
        block_out_channels=(64, 64),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=embedding,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )


def train_svd(model: StableVideoDiffusion, work: Path, steps: int = STEPS, pool: int = _POOL) -> None:
    """Train the denoiser on renders of seen scenes, encoded once.

    Noise levels are SVD's, log-normal; EDM's weight makes the loss a plain squared error of the v-prediction
    (Karras et al. 2022; Blattmann et al. 2023).
    """
    latents, cond = _pool(model, pool)

    def loss(_: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (_BATCH,), generator=rng)
        x0 = latents[rows].float()
        noise = torch.randn(x0.shape, generator=rng)
        log_sigma = _NOISE_MEAN + _NOISE_DEVIATION * torch.randn(_BATCH, generator=rng)
        sigma = log_sigma.exp().view(-1, 1, 1, 1, 1)
        known = torch.rand(_BATCH, generator=rng) >= _DROP_IMAGE
        seen = {name: tensor[rows] for name, tensor in cond.items()}
        for name in ("image", "image_latents"):
            seen[name] = seen[name] * known.view(-1, *[1] * (seen[name].ndim - 1))
        scaled = (x0 + sigma * noise) / (sigma.square() + 1).sqrt()
        output = denoise(model.denoiser, scaled, log_sigma / 4, seen)
        return (output - v_target(x0, noise, sigma)).square().mean()

    model.denoiser.requires_grad_(True)
    fit(_NAME, model.denoiser, loss, steps=steps, learning_rate=2e-3, work=work)


def v_target(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What process.EDM takes for a perfect prediction at x0 + sigma noise."""
    return (noise - sigma * x0) / (sigma.square() + 1).sqrt()


@torch.no_grad()
def _pool(model: StableVideoDiffusion, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents [N, 4, T, 8, 8] of renders, float16, and what the denoiser is told of them: see `denoise`."""
    rng = generator(SEED, _NAME, "pool")
    latents, conds = [], []
    for part in torch.arange(count).split(100):
        look = moving_look(len(part), rng)
        video = render(random_scenes(len(part), rng, SEEN_SCENES), look)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(model.encode_video(video).half())
            known = model.encode([""] * len(part), model.defaults.video, images=video[:, 0], rng=rng).positive
        ids = known["time_ids"].clone()
        ids[:, 1] = MOTION_BUCKET * look.speed
        conds.append({**known, "time_ids": ids})
    return torch.cat(latents), {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def moving_look(batch: int, rng: torch.Generator) -> Look:
    """Looks whose speed differs enough for the motion bucket to matter: 1.6 to 4.4 pixels per frame."""
    look = large_look(batch, rng)
    return replace(look, speed=1.6 + 2.8 * torch.rand(batch, generator=rng))


def judge_svd(model: StableVideoDiffusion, samples: int = 96) -> dict[str, dict[str, float]]:
    """What the oracle reads from samples that start at fresh pictures of seen and of unseen scenes.

    The paths of the world are centred, so that a picture's place tells where its shape is heading: motion counts as
    right where it is the scene's. `moved` is the share in which any direction can be read, which takes 7 pixels.
    """
    result = {}
    for name, scenes_of in (("seen", SEEN_SCENES), ("unseen", UNSEEN_SCENES)):
        rng = generator(SEED, _NAME, "judge", name)
        scenes = random_scenes(samples, rng, scenes_of)
        images = render(scenes, large_look(samples, rng))[:, 0]
        config = SampleConfig(seed=1, batch_size=16)
        videos = generate(model, [scene.caption for scene in scenes], config, images=list(images))
        moved = sum(reading.motion is not None for reading in oracle.read(videos)) / samples
        result[name] = {**oracle.accuracy(videos, scenes), "moved": moved}
    return result
