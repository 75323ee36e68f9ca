"""LTX-Video (0.9, 2B and 13B), text- and image-to-video, from diffusers folders or ComfyUI's files.

Sources: HaCohen et al. 2024; diffusers' LTXPipeline and LTXImageToVideoPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import InputError, check, option
from ..loading import DTYPES, empty_from, load_frozen, names_pipeline, read_config, reading
from ..process import Flow
from ..types import Conditioning, VideoSpec
from ._flow import dynamic_spacing
from ._ltx_keys import VAE_0_9_0, VAE_0_9_5, comfy_module, is_ltx, lacking_part, read_transformer, read_vae
from ._single_file import Part, file_config, read_weights, shapes
from ._t5 import T5Text, empty_text, load_text, read_text
from .base import Defaults, LoraNames, Networks, settings_of

FULL_SIZE: Mapping[str, tuple[str, ...]] = {
    "LTX-Video 2B": ("ltx-video", "ltx_video", "ltxv", "ltx"),
    "LTX-Video 13B": ("ltxv-13b", "ltx-video-13b", "ltx-video-0.9.7", "ltx-video-0.9.8-13b"),
}
# Transformer, autoencoder, and whether the first latent stands for one frame.
_SIZES: Mapping[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "LTX-Video 2B": ({}, VAE_0_9_0, False),
    "LTX-Video 13B": ({"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}, VAE_0_9_5, True),
}
_PIPELINES = ("LTXPipeline", "LTXImageToVideoPipeline")
_TOKENS = 128
_CHUNK = 4
_PUBLISHED = Defaults(VideoSpec(frames=161, height=512, width=704, fps=25.0), steps=50, guidance=3.0)
_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


@dataclass(frozen=True)
class Config:
    """folder: a diffusers folder, or a transformer file with its text encoder (and autoencoder) named beside it."""

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
    decode_context: int = option(
        3,
        "LTX-Video: latents on either side that are decoded with a chunk of four; 0 = the whole video at once.",
        low=0,
        high=256,
    )


def matches(path: Path) -> bool:
    """Whether a folder's model_index.json names an LTX-Video pipeline, or a file holds its transformer."""
    if path.is_file():
        return is_ltx(shapes(path))
    return names_pipeline(path, _PIPELINES)


def lacking(config: Config) -> Part | None:
    """The next part that a file does not hold and that is not named; a folder needs none."""
    path = Path(config.folder)
    if path.is_dir():
        return None
    return lacking_part(path, vae=config.vae, text_encoder=config.text_encoder, tokenizer=config.tokenizer)


def build(config: Config) -> LTX:
    """Load the checkpoint onto the CPU.

    Raises:
        InputError: a part is missing, truncated or of another kind.
    """
    check(config)
    path = Path(config.folder)
    parts = _from_folder(path, config) if path.is_dir() else _from_files(path, config)
    model = LTX(name=path.name if path.is_dir() else path.stem, decode_context=config.decode_context, **parts)
    model.settings = settings_of(config)
    return model


def _from_folder(folder: Path, config: Config) -> dict[str, Any]:
    dtype = DTYPES[config.dtype]
    with reading("scheduler configuration", folder):
        scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    return {
        "denoiser": load_frozen(LTXVideoTransformer3DModel, folder / "transformer", dtype, "denoiser"),
        "vae": load_frozen(AutoencoderKLLTXVideo, folder / "vae", dtype, "autoencoder"),
        "text": load_text(folder, dtype, _TOKENS, umt5=False),
        "scheduler": scheduler,
    }


def _from_files(path: Path, config: Config) -> dict[str, Any]:
    if not config.text_encoder:
        raise InputError(f"{path.name} has no text encoder; set text_encoder to the file or folder of T5 v1.1 XXL.")
    dtype, vae = DTYPES[config.dtype], Path(config.vae)
    tensors = read_weights(path, dtype, "denoiser")
    if config.vae and vae.is_dir():
        autoencoder = load_frozen(AutoencoderKLLTXVideo, vae, dtype, "autoencoder")
    else:
        autoencoder = read_vae(vae, dtype) if config.vae else read_vae(path, dtype, tensors)
    return {
        "denoiser": read_transformer(path, dtype, tensors),
        "vae": autoencoder,
        "text": read_text(Path(config.text_encoder), config.tokenizer, dtype, _TOKENS, umt5=False),
        "scheduler": _SCHEDULER,
        "causal_time": bool(file_config(path, "transformer").get("causal_temporal_positioning", False)),
    }


def full_size(name: str, config: Config) -> LTX:
    """The published networks without weights; `name` is a key of FULL_SIZE."""
    check(config)
    dtype, (transformer, vae, causal_time) = DTYPES[config.dtype], _SIZES[name]
    model = LTX(
        name=name,
        denoiser=empty_from(LTXVideoTransformer3DModel, transformer, dtype),
        vae=empty_from(AutoencoderKLLTXVideo, vae, dtype),
        text=empty_text(dtype, _TOKENS, umt5=False),
        scheduler=_SCHEDULER,
        decode_context=config.decode_context,
        causal_time=causal_time,
    )
    model.settings = settings_of(config)
    return model


class LTX(Networks):
    """See `vader_backend.models.base.VideoModel`.

    causal_time: whether the first latent stands for one frame in the position embedding (0.9.5 and later), rather
        than for as many as the others.
    """

    denoiser: LTXVideoTransformer3DModel
    vae: AutoencoderKLLTXVideo
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefix = "transformer."
    lora_names = LoraNames(comfy=comfy_module)

    def __init__(
        self,
        name: str,
        denoiser: LTXVideoTransformer3DModel,
        vae: AutoencoderKLLTXVideo,
        text: T5Text,
        scheduler: Mapping[str, Any],
        decode_context: int,
        causal_time: bool = False,
    ) -> None:
        if denoiser.config.patch_size != 1 or denoiser.config.patch_size_t != 1:
            raise InputError(f"{name} groups latents into patches, which no LTX-Video does; choose another checkpoint.")
        spacing = dynamic_spacing(scheduler, lambda video: self.latent_shape(video, 1)[2:].numel())
        super().__init__(name, denoiser, vae, Flow(spacing), denoiser.transformer_blocks)
        self.text = text
        self.decode_context = decode_context
        self.causal_time = causal_time
        self.defaults = _PUBLISHED
        self.scale, self.per_latent = vae.spatial_compression_ratio, vae.temporal_compression_ratio

    def parts(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "vae": self.vae, "text_encoder": self.text.encoder}

    def check(self, video: VideoSpec) -> None:
        for name, value in (("height", video.height), ("width", video.width)):
            if value < self.scale or value % self.scale:
                raise InputError(f"{name} is {value}; {self.name} needs a multiple of {self.scale}.")
        if video.frames < 1 or video.frames % self.per_latent != 1:
            raise InputError(f"frames is {video.frames}; {self.name} needs a multiple of {self.per_latent}, plus 1.")

    def latent_shape(self, video: VideoSpec, batch: int) -> torch.Size:
        frames = (video.frames - 1) // self.per_latent + 1
        channels = self.denoiser.config.in_channels
        return torch.Size((batch, channels, frames, video.height // self.scale, video.width // self.scale))

    def truncated(self, prompt: str) -> str:
        return self.text.truncated(prompt)

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
        """Text states with their mask, frames per second, and the latent of a fixed first frame.

        images: [B, 3, H, W] or [1, 3, H, W] in [0, 1], resized to the video. The mean of the encoder's
        distribution is taken, where diffusers draws from it.
        """
        batch = len(prompts)
        states, mask_BL = self.text.encode([negative, *prompts], hide_padding=False)
        shared = {"fps": torch.full((batch,), float(video.fps))}
        if images is not None:
            size = (video.height, video.width)
            first = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
            shared["first_frame"] = self.encode_video(first[:, None]).expand(batch, -1, -1, -1, -1)
        negative_part = {"text": states[:1].expand(batch, -1, -1), "mask": mask_BL[:1].expand(batch, -1)}
        return Conditioning({"text": states[1:], "mask": mask_BL[1:], **shared}, {**negative_part, **shared})

    @torch.no_grad()
    def encode_video(self, video_BTCHW: Tensor) -> Tensor:
        frames = video_BTCHW.transpose(1, 2).to(self.vae.device, self.vae.dtype) * 2 - 1
        latents = self.vae.encode(frames).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (part.to(like).view(1, -1, 1, 1, 1) for part in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std / self.vae.config.scaling_factor

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        """As the pipelines; a fixed first frame is put in its place, and its prediction is the one that leads there."""
        first = cond.get("first_frame")
        if first is None:
            return self._forward(z, torch.full((len(z),), float(t), device=z.device), cond)
        per_token = torch.full((len(z), z.shape[2:].numel()), float(t), device=z.device)
        per_token[:, : z.shape[3:].numel()] = 0
        prediction = self._forward(torch.cat([first, z[:, :, 1:]], dim=2), per_token, cond)
        return torch.cat([(z[:, :, :1] - first) / (t / 1000), prediction[:, :, 1:]], dim=2)

    def _forward(self, inputs: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        dtype, size = self.denoiser.dtype, inputs.shape[2:]
        tokens = self.denoiser(
            inputs.flatten(2).transpose(1, 2).to(dtype), cond["text"].to(dtype), time, cond["mask"],
            video_coords=self._places(size, cond["fps"]),
        ).sample  # fmt: skip
        return tokens.transpose(1, 2).unflatten(2, size).float()

    def _places(self, size: torch.Size, fps: Tensor) -> Tensor:
        """Second, row and column [B, 3, tokens] in the video at which each latent begins."""
        axes = [torch.arange(length, device=fps.device, dtype=torch.float32) for length in size]
        axes = [axes[0] * self.per_latent, axes[1] * self.scale, axes[2] * self.scale]
        if self.causal_time:
            axes[0] = (axes[0] + 1 - self.per_latent).clamp(min=0)
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).expand(len(fps), -1, -1).clone()
        places[:, 0] /= fps[:, None]
        return places

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        """Chunks of four latents, each decoded together with `decode_context` more on either side.

        The decoder looks both ways over the whole video, so a frame differs a little from that of an
        unchunked decode; it is the same whichever frames are asked for. Decoders that are conditioned on
        a time get 0, and the noise that some of them inject is the same in every call.
        """
        mean, std = self._statistics(z)
        latents = (z * std + mean).to(self.vae.dtype)
        frames: dict[int, Tensor] = {}
        for chunk in sorted({self._chunk(index) for index in indices}):
            start, stop = self._window(chunk, z.shape[2])
            part = self._decode(latents[:, :, start:stop])
            own = [index for index in indices if self._chunk(index) == chunk]
            frames |= {index: part[:, :, index - start * self.per_latent] for index in own}
        return (torch.stack([frames[index] for index in indices], dim=1).float() / 2 + 0.5).clamp(0, 1)

    def _chunk(self, index: int) -> int:
        return -(-index // self.per_latent) // _CHUNK if self.decode_context else 0

    def _window(self, chunk: int, latents: int) -> tuple[int, int]:
        if not self.decode_context:
            return 0, latents
        return max(0, chunk * _CHUNK - self.decode_context), min(latents, (chunk + 1) * _CHUNK + self.decode_context)

    def _decode(self, latents: Tensor) -> Tensor:
        time = latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            torch.manual_seed(0)
            return self.vae.decode(latents, time).sample
