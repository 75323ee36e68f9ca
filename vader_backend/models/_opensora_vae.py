"""Open-Sora 1.2's video autoencoder: an image autoencoder per frame, and a causal one along time around its latents.

Parameter names are the published checkpoint's own. A video is cut into windows of 17 frames, 5 latents each, that
know nothing of each other. Source: Zheng et al. 2024; hpcaitech/Open-Sora v1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from torch import Tensor, nn

IMAGE_SCALE = 0.18215  # the published code's own, whatever the image autoencoder's configuration says
_SPATIAL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_ACTIVATIONS = {"swish": F.silu, "relu": F.relu}


@dataclass(frozen=True)
class TemporalConfig:
    """The part along time, under the names of a config.json; the published one unless it says otherwise."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: Sequence[int] = (1, 2, 2, 4)
    temporal_downsample: Sequence[bool] = (False, True, True)
    num_groups: int = 32
    activation_fn: str = "swish"

    @property
    def activate(self) -> Callable[[Tensor], Tensor]:
        """Raises ValueError where it is of an unknown kind."""
        if self.activation_fn not in _ACTIVATIONS:
            raise ValueError(f"its activation {self.activation_fn} is none of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[self.activation_fn]

    @property
    def widths(self) -> list[int]:
        """Channels per level, from the frames' own rate down to the latents'."""
        return [self.filters * m for m in self.channel_multipliers]

    @property
    def factor(self) -> int:
        """Frames per latent."""
        return 2 ** sum(self.temporal_downsample)


class VideoAutoencoder(nn.Module):
    """window: frames that are coded together. batch: frames that go through the image autoencoder at a time."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spatial: Mapping[str, Any], temporal: TemporalConfig, window: int = 17, batch: int = 4) -> None:
        super().__init__()
        self.window, self.batch = window, batch
        self.factor = temporal.factor
        self.spatial_factor = 2 ** (len(spatial["block_out_channels"]) - 1)
        self.spatial_vae = nn.ModuleDict({"module": AutoencoderKL(**spatial)})
        self.temporal_vae = TemporalAutoencoder(temporal)
        self.register_buffer("scale", torch.ones(1, temporal.embed_dim, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, temporal.embed_dim, 1, 1, 1))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VideoAutoencoder:
        """Build from a config.json; what it leaves out is as published."""
        spatial, temporal = config.get("vae_2d") or {}, config.get("vae_temporal") or {}
        names = {field.name for field in fields(TemporalConfig)}
        return cls(
            {**_SPATIAL, **{name: value for name, value in spatial.items() if name in _SPATIAL}},
            TemporalConfig(**{name: value for name, value in temporal.items() if name in names}),
            config.get("micro_frame_size") or 17,
            config.get("micro_batch_size") or spatial.get("micro_batch_size") or 4,
        )

    def latent_frames(self, frames: int) -> int:
        """Latents in time of so many frames."""
        whole, rest = divmod(frames, self.window)
        return whole * self._latents(self.window) + self._latents(rest)

    def frames(self, latent_frames: int) -> int:
        """The fewest frames that take so many latents."""
        whole, rest = divmod(latent_frames, self._latents(self.window))
        return whole * self.window + max(0, (rest - 1) * self.factor + 1)

    def _latents(self, frames: int) -> int:
        return -(-frames // self.factor)

    def encode(self, video_BCTHW: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Latents [B, C, t, h, w] of a video in [-1, 1].

        Args:
            noise: draws from both posteriors: [B T, C, h, w] for the images, [B, C, t, h, w] along time. None: means.
        """
        image_noise, time_noise = noise or (None, None)
        images = self.encode_images(video_BCTHW, image_noise)
        moments = [self.temporal_vae.encode(part) for part in images.split(self.window, dim=2)]
        return (_draw(torch.cat(moments, dim=2), time_noise) - self.shift) / self.scale

    def encode_images(self, video_BCTHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled image latents [B, C, T, h, w] of every frame."""
        network: Any = self.spatial_vae["module"]
        frames = video_BCTHW.transpose(1, 2).flatten(0, 1)
        moments = [network.encode(part).latent_dist.parameters for part in frames.split(self.batch)]
        latents = _draw(torch.cat(moments), noise) * IMAGE_SCALE
        return latents.unflatten(0, (len(video_BCTHW), -1)).transpose(1, 2)

    def decode(self, z_BCTHW: Tensor, indices: Sequence[int], frames: int | None = None) -> Tensor:
        """Some frames of the video in about [-1, 1], [B, C, len(indices), H, W].

        Along time only the windows are decoded that hold these frames; as images only the frames themselves.

        Args:
            frames: length of the whole video; None: the shortest that has so many latents.
        """
        total = self.frames(z_BCTHW.shape[2]) if frames is None else frames
        parts = (z_BCTHW * self.scale + self.shift).split(self._latents(self.window), dim=2)
        wanted = sorted(set(indices))
        images = []
        for part, first in zip(parts, range(0, total, self.window), strict=True):
            inside = [i - first for i in wanted if 0 <= i - first < self.window]
            if inside:
                images.append(self.temporal_vae.decode(part, min(self.window, total - first))[:, :, inside])
        decoded = self.decode_images(torch.cat(images, dim=2))
        return decoded[:, :, [wanted.index(i) for i in indices]]

    def decode_images(self, latents_BCTHW: Tensor) -> Tensor:
        network: Any = self.spatial_vae["module"]
        latents = latents_BCTHW.transpose(1, 2).flatten(0, 1) / IMAGE_SCALE
        frames = torch.cat([network.decode(part).sample for part in latents.split(self.batch)])
        return frames.unflatten(0, (len(latents_BCTHW), -1)).transpose(1, 2)


def per_channel(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint with scale and shift for every channel, also where it has one number for all of them.

    Raises:
        KeyError: a weight is missing.
    """
    width = tensors["temporal_vae.post_quant_conv.conv.weight"].shape[1]
    return {k: v.expand(1, width, 1, 1, 1) if k in ("scale", "shift") and not v.ndim else v for k, v in tensors.items()}


class TemporalAutoencoder(nn.Module):
    """Image latents of one window to latents that are fewer in time, and back."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.factor = config.factor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Means, then logarithms of variances, [B, 2C, t, H, W]; zeros stand before a length that is no multiple."""
        lead = -x_BCTHW.shape[2] % self.factor
        return self.quant_conv(self.encoder(F.pad(x_BCTHW, (0, 0, 0, 0, lead, 0))))

    def decode(self, z_BCTHW: Tensor, frames: int) -> Tensor:
        """[B, C, frames, H, W]; what belongs to the zeros before them is dropped."""
        return self.decoder(self.post_quant_conv(z_BCTHW))[:, :, -frames % self.factor :]


class CausalConv3d(nn.Module):
    """A convolution that sees, of time, the present and the past only."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.past = kernel - time_stride
        around = (0, kernel // 2, kernel // 2)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(time_stride, 1, 1), padding=around, bias=bias)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCTHW, (0, 0, 0, 0, self.past, 0)))


class Upsample(CausalConv3d):
    """Twice as many frames."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return rearrange(super().forward(x_BCTHW), "b (c s) t h w -> b c (t s) h w", s=2)


class ResBlock(nn.Module):
    """Two normalized causal convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: TemporalConfig) -> None:
        super().__init__()
        self.activate = config.activate
        self.norm1 = nn.GroupNorm(config.num_groups, inputs)
        self.conv1 = CausalConv3d(inputs, outputs, bias=False)
        self.norm2 = nn.GroupNorm(config.num_groups, outputs)
        self.conv2 = CausalConv3d(outputs, outputs, bias=False)
        self.conv3 = nn.Identity() if inputs == outputs else CausalConv3d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.activate(self.norm1(x)))
        return self.conv3(x) + self.conv2(self.activate(self.norm2(h)))


class Encoder(nn.Module):
    """[B, C, T, H, W] to moments [B, 2C, T / factor, H, W]."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.activate, widths = config.activate, config.widths
        before = [config.filters, *widths[:-1]]
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, bias=False)
        self.block_res_blocks = nn.ModuleList(_stack(*sizes, config) for sizes in zip(before, widths, strict=True))
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, time_stride=2) if halve else nn.Identity()
            for width, halve in zip(widths[:-1], config.temporal_downsample, strict=True)
        )
        self.res_blocks = _stack(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_res_blocks[0](self.conv_in(x))
        for shrink, level in zip(self.conv_blocks, self.block_res_blocks[1:], strict=True):
            x = level(shrink(x))
        return self.conv2(self.activate(self.norm1(self.res_blocks(x))))


class Decoder(nn.Module):
    """[B, C, t, H, W] to [B, C, t * factor, H, W]; levels are numbered as the encoder's, and run from the last one."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.activate, widths = config.activate, config.widths
        before = [*widths[1:], widths[-1]]
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1])
        self.res_blocks = _stack(widths[-1], widths[-1], config)
        self.block_res_blocks = nn.ModuleList(_stack(*sizes, config) for sizes in zip(before, widths, strict=True))
        self.conv_blocks = nn.ModuleList(
            Upsample(width) if double else nn.Identity()
            for width, double in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        for level, grow in zip(self.block_res_blocks[:0:-1], self.conv_blocks[::-1], strict=True):
            x = grow(level(x))
        return self.conv_out(self.activate(self.norm1(self.block_res_blocks[0](x))))


def _stack(inputs: int, outputs: int, config: TemporalConfig) -> nn.Sequential:
    sizes = [inputs] + [outputs] * config.num_res_blocks
    return nn.Sequential(*(ResBlock(a, b, config) for a, b in pairwise(sizes)))


def _draw(moments: Tensor, noise: Tensor | None) -> Tensor:
    posterior = DiagonalGaussianDistribution(moments)
    return posterior.mean if noise is None else posterior.mean + posterior.std * noise
