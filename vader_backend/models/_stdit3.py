"""STDiT3, the transformer of Open-Sora 1.2, under the parameter names of the published checkpoint.

Blocks of attention within each frame alternate with blocks of attention along time; both also attend to the text.
Source: Zheng et al. 2024, «Open-Sora: Democratizing Efficient Video Production for All»; hpcaitech/Open-Sora v1.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from einops import rearrange
from torch import Tensor, nn

_SINUSOIDS = 256
_EPS = 1e-6
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Architecture:
    """Everything that the shapes of the weights say.

    patch: frames, rows and columns of latents per token. normalized: whether queries and keys are RMS-normalized.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    channels: int
    out_channels: int
    patch: tuple[int, int, int]
    text_tokens: int
    text_width: int
    normalized: bool

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> Architecture:
        """Read from the shapes of a checkpoint's tensors. Raises KeyError or ValueError where it is another network."""
        width, channels, *patch = shapes["x_embedder.proj.weight"]
        text_tokens, text_width = shapes["y_embedder.y_embedding"]
        return cls(
            width=width,
            depth=sum(name.startswith("spatial_blocks.") and name.endswith(".attn.proj.bias") for name in shapes),
            heads=width // (2 * shapes["rope.freqs"][0]),
            mlp_width=shapes["spatial_blocks.0.mlp.fc1.weight"][0],
            channels=channels,
            out_channels=shapes["final_layer.linear.weight"][0] // math.prod(patch),
            patch=(patch[0], patch[1], patch[2]),
            text_tokens=text_tokens,
            text_width=text_width,
            normalized="spatial_blocks.0.attn.q_norm.weight" in shapes,
        )


XL_2 = Architecture(
    width=1152,
    depth=28,
    heads=16,
    mlp_width=4608,
    channels=4,
    out_channels=8,
    patch=(1, 2, 2),
    text_tokens=300,
    text_width=4096,
    normalized=True,
)  # the published one


class STDiT3(nn.Module):
    """See `forward`. blocks: the transformer's blocks in the order in which they run."""

    def __init__(self, arch: Architecture, base_size: int = 512) -> None:
        super().__init__()
        self.arch, self.base_size, width = arch, base_size, arch.width
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(arch.channels, width, arch.patch, stride=arch.patch)})
        self.t_embedder = ScalarEmbedder(width)
        self.fps_embedder = ScalarEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = TextEmbedder(arch)
        self.rope = RotaryEmbedding(width // arch.heads)
        self.spatial_blocks = nn.ModuleList(Block(arch, temporal=False) for _ in range(arch.depth))
        self.temporal_blocks = nn.ModuleList(Block(arch, temporal=True) for _ in range(arch.depth))
        self.final_layer = FinalLayer(arch)

    @property
    def blocks(self) -> list[nn.Module]:
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def forward(
        self,
        x_BCTHW: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        x_mask: Tensor | None = None,
    ) -> Tensor:
        """The network's output, [B, out_channels, T, H, W]; for Open-Sora velocity first, then an unused variance.

        Args:
            timestep: [B] in (0, 1000].
            text: [B, L, text_width]; mask: [B, L], 1 where a token is text and 0 where it is padding; None: all text.
            fps, height, width: [B]; the video's size in pixels, which all samples of a batch share.
            x_mask: [B, T] bool; frames where it is False count as free of noise.
        """
        size = x_BCTHW.shape[2:]
        x = self._embed(x_BCTHW, (height[0].float() * width[0].float()).sqrt() / self.base_size)
        time = self._embed_time(timestep, fps)
        clean = self._embed_time(torch.zeros_like(timestep), fps)
        per_frame = time if x_mask is None else torch.where(x_mask[..., None], time, clean)
        modulation = self.t_block(per_frame).unflatten(-1, (6, -1))
        text = self.y_embedder.y_proj(text)
        allowed = None if mask is None else mask.bool()[:, None, None]
        rotation = self.rope(x.shape[1])
        for block in self.blocks:
            x = block(x, modulation, text, allowed, rotation)
        x = self.final_layer.modulate(x, time)
        if x_mask is not None:  # the published network modulates frames without noise twice here
            x = torch.where(x_mask[..., None, None], x, self.final_layer.modulate(x, clean))
        return self._to_video(self.final_layer.linear(x), size)

    def _embed(self, x_BCTHW: Tensor, scale: Tensor) -> Tensor:
        """Tokens [B, T, S, C] with their place in the frame, which is told relative to the base size."""
        padding = [end for n, p in zip(x_BCTHW.shape[:1:-1], self.arch.patch[::-1], strict=True) for end in (0, -n % p)]
        x = self.x_embedder["proj"](F.pad(x_BCTHW, padding))
        rows, columns = x.shape[3:]
        place = get_2d_sincos_pos_embed(
            self.arch.width, (rows, columns), interpolation_scale=scale, base_size=round(math.sqrt(rows * columns)),
            device=x.device, output_type="pt",
        )  # fmt: skip
        return x.flatten(3).permute(0, 2, 3, 1) + place.to(x)

    def _embed_time(self, timestep: Tensor, fps: Tensor) -> Tensor:
        """[B, 1, C]."""
        return (self.t_embedder(timestep) + self.fps_embedder(fps))[:, None]

    def _to_video(self, x_BTSC: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens put side by side, cut to the given frames, rows and columns."""
        frames, rows, columns = self.arch.patch
        x = rearrange(
            x_BTSC, "b t (h w) (i j k c) -> b c (t i) (h j) (w k)",
            i=frames, j=rows, k=columns, h=-(-size[1] // rows),
        )  # fmt: skip
        return x[:, :, : size[0], : size[1], : size[2]]


class Block(nn.Module):
    """Self-attention within frames or along time, attention to the text, and an MLP."""

    def __init__(self, arch: Architecture, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, arch.width) / math.sqrt(arch.width))
        self.attn = SelfAttention(arch)
        self.cross_attn = CrossAttention(arch)
        self.mlp = Mlp(arch.width, arch.mlp_width, arch.width)

    def forward(
        self, x_BTSC: Tensor, modulation: Tensor, text: Tensor, allowed: Tensor | None, rotation: Rotation
    ) -> Tensor:
        """modulation: [B, T or 1, 6, C]; allowed: [B, 1, 1, L] bool; rotation: see `RotaryEmbedding`."""
        table = (self.scale_shift_table + modulation)[:, :, :, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(2)
        x = x_BTSC + gate * self._attend(_modulated(x_BTSC, shift, scale), rotation)
        x = x + self.cross_attn(x.flatten(1, 2), text, allowed).view_as(x)
        return x + mlp_gate * self.mlp(_modulated(x, mlp_shift, mlp_scale))

    def _attend(self, x_BTSC: Tensor, rotation: Rotation) -> Tensor:
        if not self.temporal:
            return self.attn(x_BTSC.flatten(0, 1)).view_as(x_BTSC)
        x_BSTC = x_BTSC.transpose(1, 2)
        return self.attn(x_BSTC.flatten(0, 1), rotation).view(x_BSTC.shape).transpose(1, 2)


class SelfAttention(nn.Module):
    """Every token of a row attends to every other one."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.heads = arch.heads
        self.qkv = nn.Linear(arch.width, 3 * arch.width)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(arch.width // arch.heads, eps=_EPS) if arch.normalized else nn.Identity() for _ in range(2)
        )
        self.proj = nn.Linear(arch.width, arch.width)

    def forward(self, x_NLC: Tensor, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.qkv(x_NLC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Every token of the video attends to the allowed tokens of its text."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.heads = arch.heads
        self.q_linear = nn.Linear(arch.width, arch.width)
        self.kv_linear = nn.Linear(arch.width, 2 * arch.width)
        self.proj = nn.Linear(arch.width, arch.width)

    def forward(self, x_BNC: Tensor, text_BLC: Tensor, allowed: Tensor | None) -> Tensor:
        q = self.q_linear(x_BNC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text_BLC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))


class RotaryEmbedding(nn.Module):
    """Angles of positions in time (Su et al. 2021), for neighbouring pairs of channels."""

    freqs: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** -(torch.arange(0, head_width, 2) / head_width))

    def forward(self, length: int) -> Rotation:
        """Cosines and sines, each [length, head_width / 2]."""
        angles = torch.arange(length, device=self.freqs.device)[:, None] * self.freqs.float()
        return angles.cos(), angles.sin()


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Pairs of channels of [..., L, D] turned by the angles of their positions."""
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


class ScalarEmbedder(nn.Module):
    """[B] numbers to [B, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Tensor) -> Tensor:
        waves = get_timestep_embedding(value, _SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class TextEmbedder(nn.Module):
    """y_embedding: [L, text_width], the text encoder's output that stands for no prompt."""

    y_embedding: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(arch.text_tokens, arch.text_width))
        self.y_proj = Mlp(arch.text_width, arch.width, arch.width)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Tokens to the latents of their patches: modulated, then through `linear`."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, arch.width) / math.sqrt(arch.width))
        self.linear = nn.Linear(arch.width, math.prod(arch.patch) * arch.out_channels)

    def modulate(self, x_BTSC: Tensor, time_B1C: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time_B1C).unbind(1)
        return _modulated(x_BTSC, shift[:, None, None], scale[:, None, None])


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer-normalized, then scaled and shifted by what the time says."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift
