"""Wan 2.1 (1.3B and 14B, text- and image-to-video) and Wan 2.2 5B, from diffusers folders or ComfyUI's files.

Sources: Wan Team 2025; diffusers' WanPipeline and WanImageToVideoPipeline. The two-expert models of
14B parameters (Wan 2.2 A14B) are not offered.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..config import InputError, check, option
from ..loading import DTYPES, empty_from, load_frozen, names_pipeline, read_config, reading
from ..process import Flow
from ..types import Conditioning, VideoSpec
from ._clip_image import CLIPImage, read_image_encoder
from ._flow import static_spacing
from ._full_size import VISION_H14
from ._single_file import Part, shapes
from ._t5 import T5Text, empty_text, load_text, read_text
from ._wan_keys import VAE_2_1, VAE_2_2, comfy_module, is_wan, lacking_part, read_transformer, read_vae
from ._wan_vae import decode_frames, encode_frames, statistics
from .base import Defaults, LoraNames, Networks, refuse_images, settings_of

FULL_SIZE: Mapping[str, tuple[str, ...]] = {
    "Wan 2.1 T2V 1.3B": ("t2v-1.3b", "t2v_1.3b", "t2v-1_3b", "wan2.1", "wan2_1", "wan"),
    "Wan 2.1 T2V 14B": ("t2v-14b", "t2v_14b"),
    "Wan 2.1 I2V 14B": ("i2v-14b", "i2v_14b", "i2v_480p_14b", "i2v_720p_14b"),
    "Wan 2.2 TI2V 5B": ("ti2v-5b", "ti2v_5b", "wan2.2", "wan2_2"),
}
_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "Wan 2.1 T2V 1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan 2.1 T2V 14B": _14B,
    "Wan 2.1 I2V 14B": {**_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "Wan 2.2 TI2V 5B": {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48,
                        "out_channels": 48},
}  # fmt: skip
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
_TOKENS = 512
_CHANNELS_2_2 = 48
_MASKS = 4  # channels that say which frames of a latent are given
_WAN_2_1 = Defaults(VideoSpec(frames=81, height=480, width=832, fps=16.0), steps=50, guidance=5.0)
_WAN_2_2 = Defaults(VideoSpec(frames=121, height=704, width=1280, fps=24.0), steps=50, guidance=5.0)


@dataclass(frozen=True)
class Config:
    """folder: a diffusers folder, or a transformer file with its autoencoder and text encoder named beside it."""

    folder: str = option("", "Folder that holds model_index.json, or a single transformer file.")
    dtype: str = option(
        "float32",
        "Precision in which the frozen weights are held. LoRA weights are always float32.",
        choices=tuple(DTYPES),
    )
    vae: str = option("", "Wan and LTX-Video as a single file: the autoencoder, a file or a folder.")
    text_encoder: str = option("", "Wan and LTX-Video as a single file: the text encoder, a file or a folder.")
    tokenizer: str = option(
        "", "Folder of the tokenizer, where the checkpoint is a single file; empty takes the one that comes with it."
    )
    image_encoder: str = option(
        "", "Wan 2.1 image-to-video as a single file: the CLIP vision encoder, a file or a folder."
    )
    shift: float = option(
        0.0, "Wan: shift of the timesteps; 0 takes the checkpoint's own.", low=0.0, high=100.0, step=0.1
    )
    gradient_latents: int = option(
        2,
        "Wan: latents, counted back from a frame's own, that its gradient reaches in the decoder; 0 = all.",
        low=0,
        high=256,
    )


def matches(path: Path) -> bool:
    """Whether a folder's model_index.json names a Wan pipeline, or a file holds a Wan transformer."""
    if path.is_file():
        return is_wan(shapes(path))
    return names_pipeline(path, _PIPELINES)


def lacking(config: Config) -> Part | None:
    """The next part that a transformer file needs and that is not named; a folder needs none."""
    path = Path(config.folder)
    if path.is_dir():
        return None
    named = {name: getattr(config, name) for name in ("vae", "text_encoder", "tokenizer", "image_encoder")}
    return lacking_part(path, **named)


def build(config: Config) -> Wan:
    """Load the checkpoint onto the CPU.

    Raises:
        InputError: a part is missing, truncated or of another kind.
    """
    check(config)
    path = Path(config.folder)
    parts = _from_folder(path, config) if path.is_dir() else _from_files(path, config)
    model = Wan(name=path.name if path.is_dir() else path.stem, gradient_latents=config.gradient_latents, **parts)
    model.settings = settings_of(config)
    return model


def _from_folder(folder: Path, config: Config) -> dict[str, Any]:
    dtype = DTYPES[config.dtype]
    with reading("scheduler configuration", folder):
        index = read_config(folder / "model_index.json")
        scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0] is not None:
        raise InputError(
            f"{folder.name} has two transformers (Wan 2.2 A14B), which is not supported; use Wan 2.1 or 5B."
        )
    denoiser = load_frozen(WanTransformer3DModel, folder / "transformer", dtype, "denoiser")
    image = None
    if denoiser.config.image_dim is not None:
        image = CLIPImage(load_frozen(CLIPVisionModel, folder / "image_encoder", dtype, "image encoder"))
    return {
        "denoiser": denoiser,
        "vae": load_frozen(AutoencoderKLWan, folder / "vae", dtype, "autoencoder"),
        "text": load_text(folder, dtype, _TOKENS, umt5=True),
        "image": image,
        "process": Flow(static_spacing(scheduler, config.shift)),
        "first_frame": bool(index.get("expand_timesteps", False)),
    }


def _from_files(path: Path, config: Config) -> dict[str, Any]:
    for name, what in (("vae", "Wan's autoencoder"), ("text_encoder", "the text encoder UMT5-XXL")):
        if not getattr(config, name):
            raise InputError(f"{path.name} holds the transformer only; set {name} to the file or folder of {what}.")
    dtype, vae = DTYPES[config.dtype], Path(config.vae)
    denoiser = read_transformer(path, dtype)
    newer = denoiser.config.out_channels == _CHANNELS_2_2
    _refuse_variant(denoiser, path.name)
    return {
        "denoiser": denoiser,
        "vae": load_frozen(AutoencoderKLWan, vae, dtype, "autoencoder") if vae.is_dir() else read_vae(vae, dtype),
        "text": read_text(Path(config.text_encoder), config.tokenizer, dtype, _TOKENS, umt5=True),
        "image": read_image_encoder(config.image_encoder, dtype) if denoiser.config.image_dim is not None else None,
        "process": _process(newer, config),
        "first_frame": newer,
    }


def _refuse_variant(denoiser: WanTransformer3DModel, name: str) -> None:
    """Raises InputError where the input is not noise, or noise with a mask and the latents of a start image."""
    taken, made = denoiser.config.in_channels, denoiser.config.out_channels
    images, with_image = denoiser.config.image_dim is not None, 2 * made + _MASKS
    if taken == with_image and not images:
        raise InputError(f"{name} is half of a Wan 2.2 A14B model, which is not supported; use Wan 2.1 or 5B.")
    if taken != (with_image if images else made):
        raise InputError(
            f"{name} takes {taken} channels, as variants of Wan for control do, which are not supported; use a plain "
            "text- or image-to-video one."
        )


def full_size(name: str, config: Config) -> Wan:
    """The published networks without weights; `name` is a key of FULL_SIZE."""
    check(config)
    dtype, sizes = DTYPES[config.dtype], _TRANSFORMERS[name]
    newer, image = sizes.get("in_channels") == _CHANNELS_2_2, None
    if "image_dim" in sizes:
        image = CLIPImage(empty_from(CLIPVisionModel, CLIPVisionConfig(**VISION_H14), dtype))
    model = Wan(
        name=name,
        denoiser=empty_from(WanTransformer3DModel, sizes, dtype),
        vae=empty_from(AutoencoderKLWan, VAE_2_2 if newer else VAE_2_1, dtype),
        text=empty_text(dtype, _TOKENS, umt5=True),
        image=image,
        process=_process(newer, config),
        first_frame=newer,
        gradient_latents=config.gradient_latents,
    )
    model.settings = settings_of(config)
    return model


def _process(newer: bool, config: Config) -> Flow:
    """The published schedule, for where no scheduler_config.json tells it."""
    published = {"use_flow_sigmas": True, "flow_shift": 5.0 if newer else 3.0}
    return Flow(static_spacing(published, config.shift))


class Wan(Networks):
    """See `vader_backend.models.base.VideoModel`."""

    denoiser: WanTransformer3DModel
    vae: AutoencoderKLWan
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefix = "transformer."
    lora_names = LoraNames(comfy=comfy_module)

    def __init__(
        self,
        name: str,
        denoiser: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        text: T5Text,
        image: CLIPImage | None,
        process: Flow,
        first_frame: bool,
        gradient_latents: int,
    ) -> None:
        super().__init__(name, denoiser, vae, process, list(denoiser.blocks))
        self.text = text
        self.image = image
        self.first_frame = first_frame
        self.gradient_latents = gradient_latents
        self.defaults = _WAN_2_2 if vae.config.z_dim == _CHANNELS_2_2 else _WAN_2_1

    def parts(self) -> dict[str, nn.Module]:
        image = {} if self.image is None else {"image_encoder": self.image.encoder}
        return {"denoiser": self.denoiser, "vae": self.vae, "text_encoder": self.text.encoder, **image}

    def check(self, video: VideoSpec) -> None:
        _, rows, columns = self.denoiser.config.patch_size
        scale, per_latent = self.vae.config.scale_factor_spatial, self.vae.config.scale_factor_temporal
        for name, value, multiple in (("height", video.height, rows * scale), ("width", video.width, columns * scale)):
            if value < multiple or value % multiple:
                raise InputError(f"{name} is {value}; {self.name} needs a multiple of {multiple}.")
        if video.frames < 1 or video.frames % per_latent != 1:
            raise InputError(f"frames is {video.frames}; {self.name} needs a multiple of {per_latent}, plus 1.")

    def latent_shape(self, video: VideoSpec, batch: int) -> torch.Size:
        scale, per_latent = self.vae.config.scale_factor_spatial, self.vae.config.scale_factor_temporal
        frames = (video.frames - 1) // per_latent + 1
        return torch.Size((batch, self.vae.config.z_dim, frames, video.height // scale, video.width // scale))

    def truncated(self, prompt: str) -> str:
        return self.text.truncated(_cleaned(prompt))

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        video: VideoSpec,
        *,
        negative: str = "",
        images: Tensor | None = None,
        rng: torch.Generator | None = None,
    ) -> Conditioning:
        """Text states, zero where there is padding; for images, what the pipelines derive from the first frame.

        images: [B, 3, H, W] or [1, 3, H, W] in [0, 1], resized to the video.
        """
        states, mask_BL = self.text.encode([_cleaned(text) for text in (negative, *prompts)], hide_padding=True)
        states = states * mask_BL[..., None]
        shared = {} if images is None else self._condition(images, video, len(prompts))
        if images is None and self.image is not None:
            raise InputError(f"{self.name} is an image-to-video model; take its prompts from Image Prompts.")
        negative_states = states[:1].expand(len(prompts), -1, -1)
        return Conditioning({"text": states[1:], **shared}, {"text": negative_states, **shared})

    def _condition(self, images: Tensor, video: VideoSpec, batch: int) -> dict[str, Tensor]:
        if self.image is None and not self.first_frame:
            refuse_images(self.name, images)
        images = images.float().expand(batch, -1, -1, -1)
        size = (video.height, video.width)
        first = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)[:, :, None] * 2 - 1
        if self.image is None:
            return {"first_frame": encode_frames(self.vae, first)}
        blank = first.new_zeros(1, 1, video.frames - 1, 1, 1).expand(batch, 3, -1, *size)
        latents = encode_frames(self.vae, torch.cat([first, blank], dim=2))
        known = latents.new_zeros(batch, self.vae.config.scale_factor_temporal, *latents.shape[2:])
        known[:, :, 0] = 1
        return {"image": self.image.encode(images), "image_latents": torch.cat([known, latents], dim=1)}

    @torch.no_grad()
    def encode_video(self, video_BTCHW: Tensor) -> Tensor:
        return encode_frames(self.vae, video_BTCHW.transpose(1, 2) * 2 - 1)

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        """As the pipelines; a fixed first frame is put in its place, and its prediction is the one that leads there."""
        first = cond.get("first_frame")
        if first is None:
            time = torch.full((len(z),), float(t), device=z.device)
            return self._forward(torch.cat([z, cond["image_latents"]], 1) if "image_latents" in cond else z, time, cond)
        _, rows, columns = self.denoiser.config.patch_size
        tokens = z.shape[3] // rows * (z.shape[4] // columns)
        per_token = torch.full((len(z), z.shape[2] * tokens), float(t), device=z.device)
        per_token[:, :tokens] = 0
        prediction = self._forward(torch.cat([first, z[:, :, 1:]], dim=2), per_token, cond)
        return torch.cat([(z[:, :, :1] - first) / (t / 1000), prediction[:, :, 1:]], dim=2)

    def _forward(self, inputs: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        dtype = self.denoiser.dtype
        image = cond["image"].to(dtype) if "image" in cond else None
        return self.denoiser(inputs.to(dtype), time, cond["text"].to(dtype), image).sample.float()

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        """See `decode_frames` for what a frame's gradient reaches.

        The clamp to [0, 1] is straight-through: saturated pixels keep their gradient, which the
        autoencoder's own clamp would set to zero.
        """
        mean, std = statistics(self.vae, z)
        frames = decode_frames(self.vae, (z * std + mean).to(self.vae.dtype), indices, self.gradient_latents) / 2 + 0.5
        return frames + (frames.clamp(0, 1) - frames).detach()


def _cleaned(prompt: str) -> str:
    """Entities of HTML resolved, white space as single spaces: what Wan's text encoder was trained with."""
    return " ".join(html.unescape(html.unescape(prompt)).split())
