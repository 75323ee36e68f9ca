"""The smallest Stable Video Diffusion; its autoencoder and image encoder a second time, on original keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from vader_nodes.vader_backend.models import _svd_keys as keys

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as ImageProcessor

SCHEDULER = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "interpolation_type": "linear",
             "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sigma_max": 700.0, "sigma_min": 0.002,
             "steps_offset": 1, "timestep_spacing": "leading", "timestep_type": "continuous",
             "use_karras_sigmas": True}  # fmt: skip


def tiny_networks() -> dict[str, Any]:
    """unet, vae and image_encoder with random weights; the autoencoder halves height and width once."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(64, 128), layers_per_block=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=(1, 2), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=5,
    )  # fmt: skip
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 64), layers_per_block=2
    )
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, projection_dim=16, num_hidden_layers=2, num_attention_heads=16,
            image_size=224, patch_size=56, hidden_act="gelu",
        )
    )  # fmt: skip
    networks = {"unet": unet, "vae": vae, "image_encoder": image_encoder}
    for network in networks.values():
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # no norm stays at one, no bias at zero
    return networks


def tiny_pipeline(networks: Mapping[str, Any]) -> StableVideoDiffusionPipeline:
    pipeline = StableVideoDiffusionPipeline(
        **networks, scheduler=EulerDiscreteScheduler(**SCHEDULER), feature_extractor=ImageProcessor()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def original_checkpoint(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """The networks as svd.safetensors lays them out, the encoder with its quant_conv among the conditioners."""
    plain = frozenset({0})
    unet = networks["unet"].state_dict() if "unet" in networks else {}
    tensors = {keys.UNET + keys.unet_key(name, 2, plain): value for name, value in unet.items()}
    levels = len(networks["vae"].encoder.down_blocks)
    for name, value in networks["vae"].state_dict().items():
        original = keys.vae_key(name, levels)
        prefix = keys.VAE if name.startswith("decoder.") else keys.CONDITIONING_VAE
        convolution = ".attn_1." in original and original.endswith("weight") and value.ndim == 2
        tensors[prefix + original] = value[:, :, None, None] if convolution else value
    image = {keys.image_key(name): value for name, value in networks["image_encoder"].state_dict().items()}
    for name in [name for name in image if "attn.q_proj." in name]:
        parts = [image.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        image[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    image["proj"] = image["proj"].T
    tensors |= {keys.IMAGE_ENCODER + name: value for name, value in image.items()}
    text = "conditioner.embedders.0.open_clip.model.token_embedding.weight"
    return {name: value.contiguous().clone() for name, value in {**tensors, text: torch.zeros(4, 8)}.items()}


class Original:
    """Forward passes on original keys, written from the published description of the layers."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.w = keys.section(tensors, prefix)

    def encode(self, x: Tensor) -> Tensor:
        """Mean of the latents of images [N, 3, H, W] in [-1, 1]."""
        x = self._conv("encoder.conv_in", x)
        for level in range(2):
            for block in range(2):
                x = self._resnet(f"encoder.down.{level}.block.{block}", x, 1)
            if level == 0:
                name = "encoder.down.0.downsample.conv"
                x = functional.conv2d(functional.pad(x, (0, 1, 0, 1)), *self._pair(name), stride=2)
        x = self._head("encoder", self._middle("encoder", x, 1))
        return self._conv("quant_conv", x).chunk(2, dim=1)[0]

    def decode(self, z_NCHW: Tensor) -> Tensor:
        """Frames of one video in [-1, 1]."""
        frames = len(z_NCHW)
        x = self._middle("decoder", self._conv("decoder.conv_in", z_NCHW), frames)
        for level in (1, 0):
            for block in range(3):
                x = self._resnet(f"decoder.up.{level}.block.{block}", x, frames)
            if level:
                x = self._conv(f"decoder.up.{level}.upsample.conv", functional.interpolate(x, scale_factor=2.0))
        x = self._head("decoder", x).transpose(0, 1)[None]
        return self._conv("decoder.conv_out.time_mix_conv", x)[0].transpose(0, 1)

    def embed(self, x: Tensor) -> Tensor:
        """open_clip's image embedding of normalised images."""
        width, patch = self.w["conv1.weight"].shape[0], self.w["conv1.weight"].shape[-1]
        x = functional.conv2d(x, self.w["conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
        x = torch.cat([self.w["class_embedding"].expand(len(x), 1, -1), x], dim=1) + self.w["positional_embedding"]
        x = functional.layer_norm(x, (width,), *self._pair("ln_pre"))
        for block in range(2):
            name = f"transformer.resblocks.{block}"
            y = functional.layer_norm(x, (width,), *self._pair(f"{name}.ln_1"))
            y = functional.linear(y, self.w[f"{name}.attn.in_proj_weight"], self.w[f"{name}.attn.in_proj_bias"])
            q, k, v = (part.unflatten(-1, (16, -1)).transpose(1, 2) for part in y.chunk(3, dim=-1))
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + functional.linear(y, *self._pair(f"{name}.attn.out_proj"))
            y = functional.layer_norm(x, (width,), *self._pair(f"{name}.ln_2"))
            y = functional.gelu(functional.linear(y, *self._pair(f"{name}.mlp.c_fc")))
            x = x + functional.linear(y, *self._pair(f"{name}.mlp.c_proj"))
        return functional.layer_norm(x[:, 0], (width,), *self._pair("ln_post")) @ self.w["proj"]

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.w[f"{name}.weight"], self.w[f"{name}.bias"]

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._pair(name)
        padding = [size // 2 for size in weight.shape[2:]]
        return (functional.conv3d if weight.ndim == 5 else functional.conv2d)(x, weight, bias, padding=padding)

    def _norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return functional.silu(functional.group_norm(x, 32, *self._pair(name), eps=eps))

    def _resnet(self, name: str, x: Tensor, frames: int) -> Tensor:
        y = self._conv(f"{name}.conv1", self._norm(f"{name}.norm1", x, 1e-6))
        y = self._conv(f"{name}.conv2", self._norm(f"{name}.norm2", y, 1e-6))
        x = y + (self._conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)
        if f"{name}.mix_factor" not in self.w:
            return x
        still = x.unflatten(0, (-1, frames)).transpose(1, 2)
        y = self._conv(f"{name}.time_stack.in_layers.2", self._norm(f"{name}.time_stack.in_layers.0", still, 1e-5))
        y = self._conv(f"{name}.time_stack.out_layers.3", self._norm(f"{name}.time_stack.out_layers.0", y, 1e-5))
        moving = self.w[f"{name}.mix_factor"].sigmoid() * y
        return (still + moving).transpose(1, 2).flatten(0, 1)

    def _middle(self, part: str, x: Tensor, frames: int) -> Tensor:
        x = self._resnet(f"{part}.mid.block_1", x, frames)
        name = f"{part}.mid.attn_1"
        y = functional.group_norm(x, 32, *self._pair(f"{name}.norm"), eps=1e-6)
        q, k, v = (self._conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        weight = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
        y = (v @ weight.transpose(1, 2)).view_as(x)
        return self._resnet(f"{part}.mid.block_2", x + self._conv(f"{name}.proj_out", y), frames)

    def _head(self, part: str, x: Tensor) -> Tensor:
        return self._conv(f"{part}.conv_out", self._norm(f"{part}.norm_out", x, 1e-6))
