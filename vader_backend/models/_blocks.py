"""The layers that memory tricks treat one by one: large enough to be worth it, small enough to be recomputed alone."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d, LTXVideoUpsampler3d
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalConvLayer, TemporalResnetBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

_UNET = (
    ResnetBlock2D, TemporalConvLayer, SpatioTemporalResBlock, Transformer2DModel, TransformerTemporalModel,
    TransformerSpatioTemporalModel, Downsample2D, Upsample2D,
)  # fmt: skip
_AUTOENCODER = (
    ResnetBlock2D, TemporalResnetBlock, Attention, Upsample2D, LTXVideoResnetBlock3d, LTXVideoUpsampler3d,
)  # fmt: skip


def unet_blocks(unet: nn.Module) -> list[nn.Module]:
    """Residual blocks, transformers and resamplers of a diffusers UNet."""
    return list(_outermost(unet, _UNET))


def autoencoder_blocks(vae: nn.Module, *own: type[nn.Module]) -> list[nn.Module]:
    """The same of an autoencoder, with `own` kinds beside diffusers'.

    None of Wan's: its layers pass features on from latent to latent, so that they cannot be recomputed alone.
    """
    return list(_outermost(vae, (*_AUTOENCODER, *own)))


def _outermost(root: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    for child in root.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _outermost(child, kinds)
