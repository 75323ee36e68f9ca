"""Frames out of Wan's causal autoencoder, and pictures into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor


def decode_frames(vae: Any, z: Tensor, indices: Sequence[int], gradient_latents: int) -> Tensor:
    """Frames [B, len(indices), 3, H, W] about [-1, 1], not clamped, of latents in the autoencoder's own scale.

    Every frame depends on the latents before it: those up to the last wanted frame's are decoded one
    by one, with the cached features of earlier ones, as AutoencoderKLWan.decode does for a whole
    video. The values are those of the full decode.

    Args:
        gradient_latents: the gradient of a frame reaches the latent that holds it and the ones before it, so many
            in all; what lies further back is decoded without graph, as a constant. 0: all of them, which is exact.
    """
    per_latent = vae.config.scale_factor_temporal
    wanted = {-(-frame // per_latent) for frame in indices}
    reach = gradient_latents or z.shape[2]
    frames: dict[int, Tensor] = {}
    vae.clear_cache()
    try:
        for i in range(max(wanted) + 1):
            live = torch.is_grad_enabled() and any(i <= latent < i + reach for latent in wanted)
            with torch.set_grad_enabled(live):
                part = vae.post_quant_conv(z[:, :, i : i + 1])
                part = vae.decoder(part, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=i == 0)
            if i in wanted:
                part = unpatchify(part, patch_size=vae.config.patch_size or 1).float()
                first = (i - 1) * per_latent + 1 if i else 0
                frames |= {first + k: part[:, :, k] for k in range(part.shape[2])}
    finally:
        vae.clear_cache()
    return torch.stack([frames[index] for index in indices], dim=1)


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, [1, C, 1, 1, 1] each."""
    mean, std = (
        torch.tensor(values, device=like.device) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def encode_frames(vae: Any, video_BCTHW: Tensor) -> Tensor:
    """Latents [B, C, T, H, W] of unit scale, in float32, of a video in [-1, 1]."""
    latents = vae.encode(video_BCTHW.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = statistics(vae, latents)
    return (latents - mean) / std
