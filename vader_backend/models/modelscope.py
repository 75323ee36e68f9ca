"""ModelScope text-to-video (damo-vilab/text-to-video-ms-1.7b) in its diffusers folder layout.

Source: Wang et al. 2023; diffusers' TextToVideoSDPipeline. The mini text-to-video model has the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..config import check, option
from ..loading import DTYPES, empty_from, load_frozen, names_pipeline, read_config, reading
from ..process import Solver, VariancePreserving
from ..stand_in import tokenizer as stand_in_tokenizer
from ..types import Conditioning, VideoSpec
from ._blocks import unet_blocks
from ._full_size import clip_text, image_autoencoder
from ._ldm import SCHEDULER
from .base import Defaults, LoraNames, Networks, check_size, refuse_images, settings_of

PUBLISHED = Defaults(VideoSpec(frames=16, height=384, width=384), steps=25, guidance=9.0, dropout=0.1)
FULL_SIZE: Mapping[str, tuple[str, ...]] = {"ModelScope 1.7B": ("text-to-video-ms-1.7b", "modelscope")}
_MINI = Defaults(VideoSpec(frames=8, height=64, width=64), steps=20, guidance=2.5, rank=8, learning_rate=1e-3)


@dataclass(frozen=True)
class Config:
    """folder: the checkpoint's folder, the one that holds model_index.json.

    sampler: "ddim", or "dpm++2m", with which the VADER paper's code trained and sampled this model.
    """

    folder: str = option("", "Folder of the checkpoint, the one that holds model_index.json.")
    dtype: str = option(
        "float32",
        "Precision in which the frozen weights are held. LoRA weights are always float32.",
        choices=tuple(DTYPES),
    )
    sampler: str = option(
        "ddim",
        "How ModelScope denoises: DDIM, or DPM-Solver++ of second order, as in the published VADER code.",
        choices=get_args(Solver),
    )


def matches(folder: Path) -> bool:
    """Whether a folder's model_index.json names this family's pipeline."""
    return names_pipeline(folder, ("TextToVideoSDPipeline", "VideoToVideoSDPipeline"))


def build(config: Config) -> ModelScope:
    """Load the checkpoint onto the CPU.

    Raises:
        InputError: a part is missing, truncated or of another kind.
    """
    check(config)
    folder, dtype = Path(config.folder), DTYPES[config.dtype]
    with reading("scheduler configuration", folder):
        scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    with reading("tokenizer", folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    model = ModelScope(
        name=folder.name,
        denoiser=load_frozen(UNet3DConditionModel, folder / "unet", dtype, "denoiser"),
        vae=load_frozen(AutoencoderKL, folder / "vae", dtype, "autoencoder"),
        text_encoder=load_frozen(CLIPTextModel, folder / "text_encoder", dtype, "text encoder"),
        tokenizer=tokenizer,
        process=VariancePreserving.from_config(scheduler, cast(Solver, config.sampler)),
    )
    model.settings = settings_of(config)
    return model


def full_size(name: str, config: Config) -> ModelScope:
    """The published networks without weights; `name` is a key of FULL_SIZE."""
    check(config)
    dtype = DTYPES[config.dtype]
    text_encoder = clip_text(dtype)
    model = ModelScope(
        name=name,
        denoiser=empty_from(UNet3DConditionModel, {"sample_size": 32}, dtype),
        vae=image_autoencoder(dtype),
        text_encoder=text_encoder,
        tokenizer=stand_in_tokenizer(text_encoder.config.max_position_embeddings),
        process=VariancePreserving.from_config(SCHEDULER, cast(Solver, config.sampler)),
    )
    model.settings = settings_of(config)
    return model


class ModelScope(Networks):
    """See `vader_backend.models.base.VideoModel`."""

    denoiser: UNet3DConditionModel
    vae: AutoencoderKL
    lora_prefix = "unet."
    lora_names = LoraNames()

    def __init__(
        self,
        name: str,
        denoiser: UNet3DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        process: VariancePreserving,
    ) -> None:
        super().__init__(name, denoiser, vae, process, unet_blocks(denoiser))
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)
        published = denoiser.config.sample_size >= 32
        self.defaults = PUBLISHED if published else _MINI
        self.lora_targets: Sequence[str] = _layers(denoiser) if published else ("to_q", "to_k", "to_v", "to_out.0")

    def parts(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder}

    def check(self, video: VideoSpec) -> None:
        multiple = self.scale * 2 ** (len(self.denoiser.config.block_out_channels) - 1)
        check_size(self.name, video, multiple)

    def latent_shape(self, video: VideoSpec, batch: int) -> torch.Size:
        channels = self.denoiser.config.in_channels
        return torch.Size((batch, channels, video.frames, video.height // self.scale, video.width // self.scale))

    def truncated(self, prompt: str) -> str:
        limit = self.tokenizer.model_max_length - 2
        tokens = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(tokens[limit:]).strip()

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
        refuse_images(self.name, images)
        text = self._encode_text([negative, *prompts])
        return Conditioning({"text": text[1:]}, {"text": text[:1].expand(len(prompts), -1, -1)})

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(tokens.input_ids.to(device)).last_hidden_state.float()

    @torch.no_grad()
    def encode_video(self, video_BTCHW: Tensor) -> Tensor:
        batch = len(video_BTCHW)
        frames = video_BTCHW.flatten(0, 1).to(self.vae.device, self.vae.dtype) * 2 - 1
        latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in frames.split(16)])
        return latents.unflatten(0, (batch, -1)).transpose(1, 2).float() * self.vae.config.scaling_factor

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        dtype = self.denoiser.dtype
        return self.denoiser(z.to(dtype), t, cond["text"].to(dtype)).sample.float()

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        batch = len(z)
        latents = z[:, :, list(indices)].transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        frames = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        return (frames / 2 + 0.5).clamp(0, 1).unflatten(0, (batch, -1))


def _layers(denoiser: nn.Module) -> list[str]:
    """Every linear layer and convolution, on which the VADER paper's code puts ModelScope's LoRA."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]
