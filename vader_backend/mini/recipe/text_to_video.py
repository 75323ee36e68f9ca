"""The mini text-to-video model: UNet3DConditionModel and its text encoder, trained together on latents.

Written as a diffusers folder in the layout of damo-vilab/text-to-video-ms-1.7b, but with zero
terminal SNR, v-prediction and trailing spacing (Lin et al. 2023): with the usual schedule the mean
brightness of a plain background leaks through the last noise level and sampling falls back to grey.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...generate import SampleConfig, generate
from ...models.base import VideoModel
from ...models.modelscope import ModelScope
from ...process import VariancePreserving
from ...rng import generator
from .. import oracle
from ..world import FRAMES, SEEN_SCENES, UNSEEN_SCENES, Scene, large_look, random_scenes, render
from .fit import SEED, fit
from .tokenizer import MAX_TOKENS, save_tokenizer

STEPS = 6000
MOTION_STEPS = 4000
BATCH = 16
_POOL = 6000
DROP_TEXT = 0.1
_WIDTH = 128
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": True,
    "clip_sample": False,
}


class TextToVideo(nn.Module):
    """Both trained parts as one module."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.unet = UNet3DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            cross_attention_dim=_WIDTH,
            attention_head_dim=16,
            norm_num_groups=16,
        )
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=_WIDTH,
                **special,
            )
        )


def train_text_to_video(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, steps: int = STEPS, motion_steps: int = MOTION_STEPS
) -> TextToVideo:
    """Train on renders of seen scenes, encoded once: first all that a picture shows, then the direction of motion.

    The words for motion say something that the noise does not only at the noisiest times, and too
    little of the loss to be noticed beside the rest: without the second training they are ignored.
    """
    model = TextToVideo(tokenizer)
    process = VariancePreserving.from_config(SCHEDULER)
    latents, scenes, _ = encoded_renders(vae, generator(SEED, "text_to_video pool"))
    tokens = tokenizer([*(scene.caption for scene in scenes), ""], padding="max_length", return_tensors="pt").input_ids

    def loss(times: Callable[[torch.Generator], Tensor], rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=rng)
        x0 = latents[rows].float()
        noise = torch.randn(x0.shape, generator=rng)
        t = times(rng)
        blank = torch.rand(BATCH, generator=rng) < DROP_TEXT
        text = model.text_encoder(torch.where(blank[:, None], tokens[-1], tokens[rows])).last_hidden_state
        output = model.unet(process.add_noise(x0, noise, t), t, text).sample.float()
        return (output - process.target(x0, noise, t)).square().mean()

    fit("text_to_video", model, lambda _, rng: loss(_times, rng), steps=steps, learning_rate=2e-3, work=work)
    model.requires_grad_(True)
    fit("motion", model, lambda _, rng: loss(noisy_times, rng), steps=motion_steps, learning_rate=1e-3, work=work)
    return model


def _times(rng: torch.Generator) -> Tensor:
    """Times of one batch: the noisier ones decide background, colour and place, and get more than their share."""
    return (999 * torch.rand(BATCH, generator=rng).pow(0.4)).round().long()


def noisy_times(rng: torch.Generator) -> Tensor:
    """Half of them where direction is decided."""
    usual = _times(rng)
    noisy = torch.randint(870, 1000, (BATCH,), generator=rng)
    return torch.where(torch.arange(BATCH) % 2 == 0, usual, noisy)


@torch.no_grad()
def encoded_renders(vae: AutoencoderKL, rng: torch.Generator) -> tuple[Tensor, list[Scene], Tensor]:
    """Videos of seen scenes: latents [B, C, T, h, w] in float16, the scenes, and their speeds [B] in pixels a frame."""
    scenes = random_scenes(_POOL, rng, SEEN_SCENES)
    parts, speeds = [], []
    for i in range(0, _POOL, 100):
        look = large_look(100, rng)
        video = render(scenes[i : i + 100], look, FRAMES)
        speeds.append(look.speed)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean
        parts.append(latents.float().unflatten(0, (-1, FRAMES)).transpose(1, 2).half())
    return torch.cat(parts), scenes, torch.cat(speeds)


def assemble(model: TextToVideo, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> ModelScope:
    """The trained parts as the model that the loader would give."""
    return ModelScope("mini", model.unet, vae, model.text_encoder, tokenizer, VariancePreserving.from_config(SCHEDULER))


def save_text_to_video(model: TextToVideo, folder: Path) -> None:
    """Write all of the diffusers folder but the autoencoder, weights in float16."""
    tokenizer = save_tokenizer(folder / "tokenizer")
    model.unet.half().save_pretrained(folder / "unet")
    model.text_encoder.half().save_pretrained(folder / "text_encoder")
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    index: dict[str, Any] = {
        "_class_name": "TextToVideoSDPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "unet": ["diffusers", "UNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def judge_text_to_video(
    model: TextToVideo, vae: AutoencoderKL, tokenizer: CLIPTokenizer, samples: int = 240
) -> dict[str, dict[str, float]]:
    """What the oracle reads from samples of every seen and as many of the unseen captions, with guidance."""
    pools = {"seen": SEEN_SCENES, "unseen": UNSEEN_SCENES}
    scenes = {name: [pool[i % len(pool)] for i in range(samples)] for name, pool in pools.items()}
    return judge_captions(assemble(model, vae, tokenizer), scenes)


def judge_captions(model: VideoModel, scenes: Mapping[str, Sequence[Scene]]) -> dict[str, dict[str, float]]:
    """What the oracle reads from samples of each group of scenes, with the model's own settings."""
    config = SampleConfig(seed=1, batch_size=16)
    return {
        name: oracle.accuracy(generate(model, [scene.caption for scene in group], config), group)
        for name, group in scenes.items()
    }
