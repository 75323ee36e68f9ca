"""What every family of video models offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import InputError
from ..loading import fingerprint
from ..process import Process
from ..types import Conditioning, VideoSpec
from ._blocks import autoencoder_blocks

PATHS = ("folder", "vae", "text_encoder", "image_encoder", "tokenizer")  # fields of a Config that name files


@dataclass(frozen=True)
class Defaults:
    """The published settings of a family, offered wherever a setting is left at 0 or "auto".

    first_guidance: the guidance of the first frame where it rises linearly to `guidance` at the last one.
    eta: fresh noise per sampling step. lora_scale: a LoRA's alpha / rank. dropout: on a LoRA's input.
    """

    video: VideoSpec
    steps: int
    guidance: float
    first_guidance: float | None = None
    eta: float = 0.0
    rank: int = 16
    lora_scale: float = 1.0
    dropout: float = 0.0
    learning_rate: float = 2e-4


@dataclass(frozen=True)
class LoraNames:
    """How other programs name the denoiser's modules in LoRA files.

    comfy: a module's name -> its name in ComfyUI's network; None where core ComfyUI has no such family.
    original: a name in the first implementation, without prefix -> the module's name; any other stays as it is.
    """

    comfy: Callable[[str], str] | None = None
    original: Callable[[str], str] | None = None


class VideoModel(Protocol):
    """A text- or image-to-video diffusion model.

    name: how users know it. fingerprint: hash of the denoiser's weights (see `loading.fingerprint`).
    blocks, decoder_blocks: layers of the denoiser and of the autoencoder that memory tricks treat one by one.
    settings: what was chosen at loading and changes the videos (see `settings_of`).
    lora_prefix: what stands before a module name in diffusers' LoRA files of this family.
    """

    name: str
    fingerprint: str
    settings: Mapping[str, Any]
    denoiser: nn.Module
    process: Process
    blocks: Sequence[nn.Module]
    decoder_blocks: Sequence[nn.Module]
    lora_targets: Sequence[str]
    lora_prefix: str
    lora_names: LoraNames
    defaults: Defaults

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        ...

    def parts(self) -> dict[str, nn.Module]:
        """Every network of the model by name, for whoever places them on devices."""
        ...

    def check(self, video: VideoSpec) -> None:
        """Raises InputError where the model cannot make such a video."""
        ...

    def latent_shape(self, video: VideoSpec, batch: int) -> torch.Size:
        """[B, C, T, H, W] of the latents."""
        ...

    def truncated(self, prompt: str) -> str:
        """The end of a prompt that the text encoder cannot take; empty where all of it fits."""
        ...

    def encode(
        self,
        prompts: Sequence[str],
        video: VideoSpec,
        *,
        negative: str = "",
        images: Tensor | None = None,
        rng: torch.Generator | None = None,
    ) -> Conditioning:
        """Conditioning of both guidance branches, without gradient."""
        ...

    def encode_video(self, video_BTCHW: Tensor) -> Tensor:
        """Latents [B, C, T, H, W] of a video in [0, 1]."""
        ...

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        """The native prediction at native time t, float32, differentiable."""
        ...

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        """Only these frames, [B, len(indices), 3, H, W] float32 in [0, 1], differentiable."""
        ...


class Networks:
    """What every family keeps and says of its networks; with the rest it is a `VideoModel`."""

    denoiser: Any  # each family names the class of its own
    vae: Any

    def __init__(
        self, name: str, denoiser: nn.Module, vae: nn.Module, process: Process, blocks: Sequence[nn.Module]
    ) -> None:
        """Args:
        blocks: of the denoiser, those that gradient checkpointing recomputes one by one.
        """
        self.decoder_blocks: Sequence[nn.Module] = autoencoder_blocks(vae)
        self.name = name
        self.denoiser = denoiser
        self.vae = vae
        self.process = process
        self.blocks = blocks
        self.fingerprint = fingerprint(denoiser)
        self.settings: Mapping[str, Any] = {}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def settings_of(config: Any) -> dict[str, Any]:
    """A family's Config without the places of files, whose contents tell more."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in PATHS}


def check_size(model: str, video: VideoSpec, multiple: int) -> None:
    """Raises InputError where height or width is no multiple of `multiple` pixels, or there is no frame."""
    for name, value in (("height", video.height), ("width", video.width)):
        if value < multiple or value % multiple:
            raise InputError(f"{name} is {value}; {model} needs a multiple of {multiple}.")
    if video.frames < 1:
        raise InputError(f"frames is {video.frames}; it must be at least 1.")


def refuse_images(model: str, images: Tensor | None) -> None:
    """Raises InputError where there are start images."""
    if images is not None:
        raise InputError(f"{model} makes videos from text here; take its prompts from Prompts, not from Image Prompts.")
