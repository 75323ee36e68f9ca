"""Tiny checkpoints as single files, in a models folder as ComfyUI's users have it."""

from __future__ import annotations

from pathlib import Path

import tiny_ltx
import tiny_svd
import tiny_videocrafter2
import tiny_wan
import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import save_file
from tiny_flow import original_shapes, original_state, save_text_file, save_tokenizer, text_encoder
from torch import Tensor
from transformers import CLIPVisionModel
from vader_nodes.vader_backend.models import _wan_keys

PREFIX = "model.diffusion_model."


def wan_names(item: str, layers: int) -> dict[str, str]:
    """Original key -> diffusers' name, for a Wan transformer of fewer layers."""
    keys = [k for k in original_shapes(item) if not k.startswith("blocks.") or int(k.split(".")[1]) < layers]
    return {key: next(iter(convert_wan_transformer_to_diffusers({key: torch.empty(0)}))) for key in keys}


def wan_vae_names(item: str) -> dict[str, str]:
    """Original key -> diffusers' name, for a Wan autoencoder."""
    if item == "wan2.2 vae":
        return {key: _wan_keys.vae_key(key) for key in original_shapes(item)}
    return {key: next(iter(convert_wan_vae_to_diffusers({key: torch.empty(0)}))) for key in original_shapes(item)}


def save_wan(path: Path, *, images: bool = False) -> WanTransformer3DModel:
    """A Wan 2.1 transformer under ComfyUI's prefix; for images, one that looks at 160 channels of CLIP's."""
    more = {"in_channels": 36, "image_dim": 160, "added_kv_proj_dim": 128} if images else {}
    transformer = tiny_wan.tiny_transformer(head_dim=128, num_attention_heads=1, **more)
    names = wan_names("wan2.1 i2v 14B" if images else "wan2.1 t2v 1.3B", 2)
    save_file({PREFIX + key: tensor for key, tensor in original_state(transformer, names).items()}, path)
    return transformer


def save_image_encoder(path: Path) -> CLIPVisionModel:
    """A CLIP vision encoder of 160 channels with what whole CLIP files hold beside it."""
    encoder = tiny_wan.tiny_image_encoder(160)
    state = {f"vision_model.{k.removeprefix('vision_model.')}": t for k, t in encoder.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state | {"visual_projection.weight": torch.zeros(2, 160)}, path)
    return encoder


def save_ltx(path: Path) -> LTXVideoTransformer3DModel:
    """An LTX-Video transformer under ComfyUI's prefix."""
    transformer = tiny_ltx.tiny_transformer(num_attention_heads=32, attention_head_dim=2, cross_attention_dim=64)
    keys = [k for k in original_shapes("ltx 2B") if not k.startswith("transformer_blocks.") or int(k.split(".")[1]) < 2]
    names = {key: next(iter(convert_ltx_transformer_checkpoint_to_diffusers({key: torch.empty(0)}))) for key in keys}
    save_file({PREFIX + key: tensor for key, tensor in original_state(transformer, names).items()}, path)
    return transformer


def save_models(models: Path) -> None:
    """One file of each kind in its category; the T5 and UMT5 text encoders share a tokenizer of 17 words."""
    for category in ("checkpoints", "diffusion_models", "vae", "text_encoders", "clip_vision"):
        (models / category).mkdir(parents=True, exist_ok=True)
    save_file(tiny_svd.original_checkpoint(tiny_svd.tiny_networks()), models / "checkpoints" / "svd.safetensors")
    save_videocrafter2(models / "checkpoints" / "videocrafter2.ckpt")
    save_wan(models / "diffusion_models" / "wan.safetensors")
    save_wan(models / "diffusion_models" / "wan_i2v.safetensors", images=True)
    save_ltx(models / "diffusion_models" / "ltx.safetensors")
    save_file(original_state(tiny_wan.tiny_vae(), wan_vae_names("wan2.1 vae")), models / "vae" / "wan_vae.safetensors")
    tiny_ltx.tiny_vae().save_pretrained(models / "vae" / "ltx")
    save_text_file(models / "text_encoders" / "umt5.safetensors", text_encoder(umt5=True))
    save_text_file(models / "text_encoders" / "t5.safetensors", text_encoder(umt5=False))
    save_tokenizer(models / "text_encoders" / "words")
    save_image_encoder(models / "clip_vision" / "clip.safetensors")


def save_videocrafter2(path: Path) -> dict[str, Tensor]:
    """VideoCrafter2's one file, without a tokenizer; .ckpt or .safetensors, as the name says."""
    tensors = tiny_videocrafter2.tiny_tensors()
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    return tensors
