"""V-JEPA's encoders and predictor, under the keys of the original checkpoints (facebookresearch/jepa).

Tokens stand frame by frame, in each frame row by row. Places are indices of tokens, [B, K].
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6


@dataclass(frozen=True)
class Grid:
    """How many tokens a video has in time, height and width."""

    time: int
    height: int
    width: int

    def __len__(self) -> int:
        return self.time * self.height * self.width


class Vjepa(nn.Module):
    """The three networks; the target encoder is the moving average of the encoder."""

    def __init__(self, encoder: Encoder, predictor: Predictor, target_encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder = target_encoder

    @property
    def cell(self) -> tuple[int, int]:
        """Frames and pixels of a side that a token stands for."""
        return self.encoder.cell[:2]

    @property
    def video(self) -> tuple[int, int]:
        """Frames and pixels of a side that it was trained on."""
        tubelet, patch = self.cell
        return self.encoder.grid.time * tubelet, self.encoder.grid.height * patch

    def targets(self, clips_BCTHW: Tensor) -> Tensor:
        """What is to be predicted: [B, N, D] of mean 0 and variance 1."""
        return normalised(self.target_encoder(clips_BCTHW))

    def predict(self, clips_BCTHW: Tensor, seen_BK: Tensor, hidden_BM: Tensor, kind: int) -> Tensor:
        """Features [B, M, D] of the hidden places from the seen ones; kind: number of the mask setting."""
        grid = self.encoder.grid_of(clips_BCTHW)
        return self.predictor(self.encoder(clips_BCTHW, seen_BK), seen_BK, hidden_BM, kind, grid)


class Encoder(nn.Module):
    """A vision transformer on pieces of a few frames, with a fixed table of positions."""

    def __init__(self, width: int, depth: int, heads: int, inner: int, grid: Grid, cell: tuple[int, int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.cell = cell
        self.pos_embed = nn.Parameter(torch.zeros(1, len(grid), width))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv3d(3, width, cell, stride=cell)))
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width, _EPS)

    def grid_of(self, clips_BCTHW: Tensor) -> Grid:
        return Grid(*(length // size for length, size in zip(clips_BCTHW.shape[2:], self.cell, strict=True)))

    def forward(self, clips_BCTHW: Tensor, seen_BK: Tensor | None = None) -> Tensor:
        """[B, K, D]; all N tokens without `seen_BK`."""
        positions = fitted(self.pos_embed, self.grid, self.grid_of(clips_BCTHW))
        tokens = self.patch_embed(clips_BCTHW).flatten(2).transpose(1, 2) + positions
        if seen_BK is not None:
            tokens = take(tokens, seen_BK)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Predictor(nn.Module):
    """A narrow transformer over the seen tokens and one mask token per hidden place."""

    def __init__(
        self, width: int, narrow: int, depth: int, heads: int, inner: int, grid: Grid, mask_tokens: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.predictor_embed = nn.Linear(width, narrow)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, narrow) for _ in range(mask_tokens))
        self.predictor_pos_embed = nn.Parameter(torch.zeros(1, len(grid), narrow))
        self.predictor_blocks = nn.ModuleList(Block(narrow, heads, inner) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(narrow, _EPS)
        self.predictor_proj = nn.Linear(narrow, width)

    def forward(self, context_BKD: Tensor, seen_BK: Tensor, hidden_BM: Tensor, kind: int, grid: Grid) -> Tensor:
        positions = fitted(self.predictor_pos_embed, self.grid, grid).expand(len(context_BKD), -1, -1)
        context = self.predictor_embed(context_BKD) + take(positions, seen_BK)
        asked = self.mask_tokens[kind % len(self.mask_tokens)] + take(positions, hidden_BM)
        tokens = torch.cat([context, asked], dim=1)
        for block in self.predictor_blocks:
            tokens = block(tokens)
        return self.predictor_proj(self.predictor_norm(tokens)[:, context.shape[1] :])


class Block(nn.Module):
    """Attention and a perceptron, each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, _EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, _EPS)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, inner), act=nn.GELU(), fc2=nn.Linear(inner, width)))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        tokens_BND = tokens_BND + self.attn(self.norm1(tokens_BND))
        return tokens_BND + self.mlp(self.norm2(tokens_BND))


class Attention(nn.Module):
    """Among all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} attention heads cannot share {width} features")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def take(tokens_BND: Tensor, places_BK: Tensor) -> Tensor:
    """[B, K, D]: the tokens at these places."""
    return tokens_BND.gather(1, places_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))


def normalised(features_BND: Tensor) -> Tensor:
    """Each token's features brought to mean 0 and variance 1."""
    return F.layer_norm(features_BND, features_BND.shape[-1:])


def fitted(table_1ND: Tensor, own: Grid, grid: Grid) -> Tensor:
    """A table of positions for another grid, as the original interpolates it."""
    if own == grid:
        return table_1ND
    volume = table_1ND.transpose(1, 2).unflatten(2, (own.time, own.height, own.width))
    return F.interpolate(volume, (grid.time, grid.height, grid.width), mode="trilinear").flatten(2).transpose(1, 2)
