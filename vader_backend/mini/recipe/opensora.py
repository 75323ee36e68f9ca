"""The mini Open-Sora 1.2: STDiT3 and its T5, trained together as a rectified flow on latents of 17-frame renders.

Written in the layout of the published checkpoints (see `models.opensora`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from ...checkpoint import atomic_path, write_text
from ...loading import load_frozen
from ...models._opensora_vae import VideoAutoencoder
from ...models._stdit3 import Architecture, STDiT3
from ...models._t5 import T5Text, load_tokenizer
from ...models.opensora import MINI, Config, build, sampling_times, scored
from ...process import Flow
from ...rng import generator
from ..world import SEEN_SCENES, SIZE, UNSEEN_SCENES, large_look
from .fit import SEED, fit
from .opensora_autoencoder import CONFIG, judge_video_autoencoder, renders, train_video_autoencoder
from .opensora_text import WIDTH, new_t5, save_t5_tokenizer
from .text_to_video import judge_captions
from .tokenizer import MAX_TOKENS

STEPS = 2500
MOTION_STEPS = 2500
_BATCH = 16
_POOL = 3000
_DROP_TEXT = 0.1
_NAME = "opensora"
_ARCHITECTURE = Architecture(
    width=144,
    depth=5,
    heads=4,
    mlp_width=576,
    channels=4,
    out_channels=4,
    patch=(1, 2, 2),
    text_tokens=MAX_TOKENS,
    text_width=WIDTH,
    normalized=True,
)


def opensora(work: Path, weights: Path) -> dict[str, Any]:
    """Train both networks, write the checkpoint, and judge it as it was written."""
    images = load_frozen(AutoencoderKL, weights / "modelscope" / "vae", torch.float32, "mini autoencoder")
    folder = weights / "opensora"
    vae = train_video_autoencoder(images, work)
    quality: dict[str, Any] = {"autoencoder": judge_video_autoencoder(vae)}
    model = train_opensora(vae, work, folder / "tokenizer")
    save_opensora(model, vae, folder)
    return {**quality, **judge_opensora(folder)}


class TextToVideo(nn.Module):
    """Both trained parts as one module."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.denoiser = STDiT3(_ARCHITECTURE, SIZE)
        self.text_encoder = new_t5(vocabulary)
        # As published, a block starts without its text and the network with a prediction of zero.
        zeros = [block.get_submodule("cross_attn.proj") for block in self.denoiser.blocks]
        for layer in (*zeros, self.denoiser.final_layer.linear):
            nn.init.zeros_(layer.get_parameter("weight"))
            nn.init.zeros_(layer.get_parameter("bias"))


def train_opensora(
    vae: VideoAutoencoder, work: Path, tokenizer: Path, steps: int = STEPS, motion_steps: int = MOTION_STEPS
) -> TextToVideo:
    """Train on renders of seen scenes, encoded once; then mostly on the direction of motion.

    Args:
        tokenizer: the folder that the tokenizer is written to.
    """
    model = TextToVideo(save_t5_tokenizer(tokenizer))
    text = T5Text(model.text_encoder, load_tokenizer(tokenizer), MAX_TOKENS)
    process = Flow(sampling_times, towards_data=True)
    latents, prompts = _pool(vae)
    size = [torch.full((_BATCH,), float(value)) for value in (MINI.video.fps, MINI.video.height, MINI.video.width)]

    def loss(noisy: Tensor, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (_BATCH,), generator=rng)
        x0 = latents[rows].float()
        noise = torch.randn(x0.shape, generator=rng)
        t = _times(noisy, rng)
        blank = torch.rand(_BATCH, 1, 1, generator=rng) < _DROP_TEXT
        states, mask = text.encode([prompts[row] for row in rows.tolist()], hide_padding=True)
        states = torch.where(blank, model.denoiser.y_embedder.y_embedding, states)
        velocity = model.denoiser(process.add_noise(x0, noise, t), t, states, mask, *size)
        return (velocity.float() - (x0 - noise)).square().mean()

    rows = torch.arange(_BATCH)
    third, most = rows % 3 == 0, rows % 4 != 0
    fit(_NAME, model, lambda _, rng: loss(third, rng), steps=steps, learning_rate=2e-3, work=work)
    model.requires_grad_(True)
    fit("opensora_motion", model, lambda _, rng: loss(most, rng), steps=motion_steps, learning_rate=1e-3, work=work)
    return model


def _times(noisy: Tensor, rng: torch.Generator) -> Tensor:
    """Times of one batch in (0, 1000].

    Args:
        noisy: [B] bool, the rows whose times lie where the direction of motion is decided: the words
            for motion say something that the noise does not only at the noisiest times.
    """
    usual = torch.rand(_BATCH, generator=rng).sqrt()
    noisiest = 1 - 0.15 * torch.rand(_BATCH, generator=rng)
    return 1000 * torch.where(noisy, noisiest, usual)


@torch.no_grad()
def _pool(vae: VideoAutoencoder) -> tuple[Tensor, list[str]]:
    """Latents [B, 4, 5, 8, 8] in float16, and what the text encoder is told of each."""
    latents, prompts = [], []
    for scenes, video in renders(generator(SEED, _NAME, "pool"), _POOL, SEEN_SCENES, large_look):
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(video).half())
        prompts += [scored(scene.caption) for scene in scenes]
    return torch.cat(latents), prompts


def save_opensora(model: TextToVideo, vae: VideoAutoencoder, folder: Path) -> None:
    """Write all of the checkpoint but the tokenizer, weights in float16."""
    _save(folder / "transformer", model.denoiser, {"model_type": "STDiT3", "input_sq_size": model.denoiser.base_size})
    _save(folder / "vae", vae, CONFIG)
    model.text_encoder.half().save_pretrained(folder / "text_encoder")


def _save(folder: Path, network: nn.Module, config: dict[str, Any]) -> None:
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, temporary)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def judge_opensora(folder: Path, samples: int = 96) -> dict[str, dict[str, float]]:
    """What the oracle reads from samples of as many seen as unseen captions, with the mini's own settings."""
    model: Any = build(Config(folder=str(folder)))
    scenes = {}
    for name, pool in (("seen", SEEN_SCENES), ("unseen", UNSEEN_SCENES)):
        order = torch.randperm(len(pool), generator=generator(SEED, _NAME, "judge", name)).tolist()
        scenes[name] = [pool[order[i % len(pool)]] for i in range(samples)]
    return judge_captions(model, scenes)
