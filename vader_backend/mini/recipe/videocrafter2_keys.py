"""A VideoCrafter2 under the key layout of the published model.ckpt: what its loader reads, the other way round."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...models._svd_keys import vae_key
from ...models._videocrafter2_unet import ENDS, KINDS, RESNET
from ...models.videocrafter2 import PREFIXES, VideoCrafter2
from .vae import rescale

SCALING_FACTOR = 0.18215

_TEXT = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    ".self_attn.": ".attn.",
    ".layer_norm": ".ln_",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    "final_layer_norm.": "ln_final.",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")


def original_tensors(model: VideoCrafter2) -> dict[str, Tensor]:
    """Every weight under its key in model.ckpt, without the buffers of the schedule, which no one needs."""
    parts = (
        unet_tensors(model.denoiser.state_dict(), model.denoiser.config.layers_per_block),
        vae_tensors(model),
        text_tensors(model.text_encoder.state_dict()),
    )
    return {prefix + key: tensor for prefix, part in zip(PREFIXES, parts, strict=True) for key, tensor in part.items()}


def unet_tensors(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of UNet3DConditionModel under their original keys; `layers` are the residual layers per level."""
    attended = {int(found[1]) for name in tensors if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    named = {unet_key(name, layers, attended): tensor for name, tensor in tensors.items()}
    convolutions = ("init_attn.0.proj_in.weight", "init_attn.0.proj_out.weight")
    return {key: tensor[..., None] if key in convolutions else tensor for key, tensor in named.items()}


def unet_key(name: str, layers: int, attended: set[int]) -> str:
    """The original key of a denoiser's weight.

    Args:
        attended: the up blocks with attention, after which an upsampler stands further back.
    """
    for original, own in ENDS.items():
        if name.startswith(own + "."):
            return original + name.removeprefix(own)
    found = _BLOCK.fullmatch(name)
    if found is None:
        return name
    side, level, kind, layer, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    first = level * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{3 if level in attended else 1}.{rest}"
    part, rest = _in_block(kind, rest)
    if side == "mid":
        return f"middle_block.{3 * layer + part}.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{first + layer + (side == 'down')}.{part}.{rest}"


def _in_block(kind: str, rest: str) -> tuple[int, str]:
    """The place of a module within its original block, and the rest of its name there."""
    if kind == "temp_convs":
        return 0, f"temopral_conv.{rest}"
    if kind != "resnets":
        return KINDS.index(kind), rest
    own, _, tail = rest.partition(".")
    original = {value: key for key, value in RESNET.items()}[own]
    return 0, f"{original}.{tail}"


@torch.no_grad()
def vae_tensors(model: VideoCrafter2) -> dict[str, Tensor]:
    """The autoencoder's weights; those around its latents are such that the published factor scales them to one."""
    vae = copy.deepcopy(model.vae)
    factor = torch.full((vae.config.latent_channels,), SCALING_FACTOR / vae.config.scaling_factor)
    rescale(vae, torch.zeros_like(factor), factor)
    levels = len(vae.config.block_out_channels)
    named = {vae_key(name, levels): tensor for name, tensor in vae.state_dict().items()}
    return {
        key: tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor
        for key, tensor in named.items()
    }


def text_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's weights as open_clip's, with zeros for what VideoCrafter2 carries along unread."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = name
        for own, original in _TEXT.items():
            key = key.replace(own, original)
        if packed := re.fullmatch(r"(.+\.)([qkv])_proj\.(weight|bias)", key):
            if packed[2] == "q":
                others = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "kv"]
                named[f"{packed[1]}in_proj_{packed[3]}"] = torch.cat([tensor, *others])
        else:
            named[key] = tensor
    block = "transformer.resblocks.0."
    last = 1 + max(int(key.split(".")[2]) for key in named if key.startswith("transformer."))
    unread = {
        f"transformer.resblocks.{last}.{key.removeprefix(block)}": torch.zeros_like(tensor)
        for key, tensor in named.items()
        if key.startswith(block)
    }
    width = len(named["ln_final.weight"])
    return {**named, **unread, "text_projection": torch.zeros(width, width), "logit_scale": torch.zeros(())}
