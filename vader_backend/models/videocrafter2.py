"""VideoCrafter2 (VideoCrafter/VideoCrafter2, model.ckpt) under its original keys.

Sources: Chen et al. 2024; the published checkpoint and its configuration inference_t2v_512_v2.0.yaml.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..config import InputError, check, option
from ..loading import DTYPES, SUFFIXES, build_empty, checkpoint_error, read_tensors
from ..process import VariancePreserving
from ..stand_in import tokenizer as stand_in_tokenizer
from ..types import Conditioning, VideoSpec
from ._blocks import unet_blocks
from ._full_size import clip_text, image_autoencoder
from ._ldm import SCHEDULER, build_autoencoder, decode_frames, encode_frames
from ._single_file import Part, shapes
from ._videocrafter2_text import build_text_encoder, is_tokenizer, read_tokenizer, tokenize, tokenizer_beside
from ._videocrafter2_unet import build_unet, lora_module, make_unet
from .base import Defaults, LoraNames, Networks, check_size, refuse_images, settings_of

PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.model.")
BUFFERS = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "scale_arr",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
}  # fmt: skip
SCALE_END, SCALE_RAMP = 0.7, 400

_MARK = "model.diffusion_model.fps_embedding.0.weight"
_WRAPPER = "_forward_module."  # before each key of a checkpoint written by DeepSpeed
PUBLISHED = Defaults(
    VideoSpec(frames=12, height=320, width=512, fps=24.0), steps=25, guidance=12.0, eta=1.0, lora_scale=0.5,
    dropout=0.01,
)  # fmt: skip
FULL_SIZE: Mapping[str, tuple[str, ...]] = {"VideoCrafter2": ("videocrafter2", "videocrafter")}
_MINI = Defaults(VideoSpec(frames=8, height=64, width=64), steps=20, guidance=2.0, rank=8, learning_rate=1e-3)
_PUBLISHED_WIDTH = 320


@dataclass(frozen=True)
class Config:
    """folder: model.ckpt, the same as .safetensors, or the folder that holds one of them.

    tokenizer: a folder with CLIP's vocab.json and merges.txt.
    """

    folder: str = option("", "The checkpoint file, or the folder that holds it.")
    dtype: str = option(
        "float32",
        "Precision in which the frozen weights are held. LoRA weights are always float32.",
        choices=tuple(DTYPES),
    )
    tokenizer: str = option(
        "", "VideoCrafter2: folder with CLIP's vocab.json and merges.txt; empty looks beside the checkpoint."
    )


def matches(path: Path) -> bool:
    """Whether a file holds VideoCrafter2's weights, or a folder such a file; only names of weights are read."""
    return _checkpoint(path) is not None


def lacking(config: Config) -> Part | None:
    """The tokenizer, where none is named and none lies beside the checkpoint."""
    source = _checkpoint(Path(config.folder))
    if config.tokenizer or source is None or tokenizer_beside(source) is not None:
        return None
    return Part("tokenizer", "CLIP's tokenizer (vocab.json and merges.txt)", is_tokenizer)


def build(config: Config) -> VideoCrafter2:
    """Load the checkpoint onto the CPU.

    Raises:
        InputError: it is missing, truncated or of another kind, or there is no tokenizer.
    """
    check(config)
    source, dtype = _checkpoint(Path(config.folder)), DTYPES[config.dtype]
    if source is None:
        raise InputError(f"There is no checkpoint of VideoCrafter2 in {config.folder}; download its model.ckpt.")
    unet, vae, text = split(read_tensors(source, "VideoCrafter2 checkpoint"), source)
    text_encoder = build_text_encoder(text, dtype, source)
    tokenizer = read_tokenizer(source, config.tokenizer, text_encoder.config.vocab_size)
    model = VideoCrafter2(
        name=source.parent.name if Path(config.folder).is_dir() else source.stem,
        denoiser=build_unet(unet, dtype, source),
        vae=build_autoencoder(vae, dtype, source),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        process=make_process(),
    )
    model.settings = settings_of(config)
    return model


def full_size(name: str, config: Config) -> VideoCrafter2:
    """The published networks without weights; `name` is a key of FULL_SIZE."""
    check(config)
    dtype = DTYPES[config.dtype]
    text_encoder = clip_text(dtype)
    model = VideoCrafter2(
        name=name,
        denoiser=build_empty(make_unet, dtype),
        vae=image_autoencoder(dtype),
        text_encoder=text_encoder,
        tokenizer=stand_in_tokenizer(text_encoder.config.max_position_embeddings),
        process=make_process(),
    )
    model.settings = settings_of(config)
    return model


def split(tensors: Mapping[str, Tensor], source: Path) -> list[dict[str, Tensor]]:
    """The weights of denoiser, autoencoder and text encoder, without their prefixes.

    The buffers of the schedule are left out, since they follow from the configuration.

    Raises:
        InputError: there are tensors of another model among them.
    """
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    for key, tensor in tensors.items():
        name = key.removeprefix(_WRAPPER)
        for prefix, part in zip(PREFIXES, parts, strict=True):
            if name.startswith(prefix):
                part[name.removeprefix(prefix)] = tensor
                break
        else:
            if name not in BUFFERS:
                raise checkpoint_error("VideoCrafter2 checkpoint", source, f"it has an unknown weight {key}")
    return parts


def make_process(scheduler: Mapping[str, Any] = SCHEDULER, scale_end: float = SCALE_END) -> VariancePreserving:
    """The noise schedule, whose clean latents fade from 1 to `scale_end` over the first 400 training times.

    The scale has 400 entries more than there are training times, as in the published checkpoint.
    """
    plain = VariancePreserving.from_config(scheduler)
    ramp = torch.linspace(1, scale_end, SCALE_RAMP, dtype=torch.float64)
    return replace(plain, scale=torch.cat([ramp, ramp[-1:].expand(plain.train_steps)]))


class VideoCrafter2(Networks):
    """See `vader_backend.models.base.VideoModel`."""

    denoiser: UNet3DConditionModel
    vae: AutoencoderKL
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v")
    lora_prefix = "unet."

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
        self.lora_names = LoraNames(original=partial(lora_module, layers=denoiser.config.layers_per_block))
        self.context = text_encoder.config.max_position_embeddings
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.defaults = PUBLISHED if denoiser.config.block_out_channels[0] >= _PUBLISHED_WIDTH else _MINI

    def parts(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder}

    def check(self, video: VideoSpec) -> None:
        multiple = self.scale * 2 ** (len(self.denoiser.config.block_out_channels) - 1)
        check_size(self.name, video, multiple)

    def latent_shape(self, video: VideoSpec, batch: int) -> torch.Size:
        channels = self.denoiser.config.in_channels
        return torch.Size((batch, channels, video.frames, video.height // self.scale, video.width // self.scale))

    def truncated(self, prompt: str) -> str:
        tokens = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(tokens[self.context - 2 :]).strip()

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
        device = next(self.text_encoder.parameters()).device
        tokens = tokenize(self.tokenizer, [negative, *prompts], self.context).to(device)
        text = self.text_encoder(input_ids=tokens).last_hidden_state.float()
        fps = torch.full((len(prompts),), float(video.fps), device=device)
        return Conditioning({"text": text[1:], "fps": fps}, {"text": text[:1].expand(len(prompts), -1, -1), "fps": fps})

    @torch.no_grad()
    def encode_video(self, video_BTCHW: Tensor) -> Tensor:
        return encode_frames(self.vae, video_BTCHW)

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        dtype = self.denoiser.dtype
        return self.denoiser(z.to(dtype), t, cond["text"].to(dtype), timestep_cond=cond["fps"]).sample.float()

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        return (decode_frames(self.vae, z[:, :, list(indices)]) / 2 + 0.5).clamp(0, 1)


def _checkpoint(path: Path) -> Path | None:
    """The file with VideoCrafter2's weights: the path itself, or the first such file in that folder."""
    if path.is_dir():
        files = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
    else:
        files = [path] if path.suffix in SUFFIXES else []
    return next((file for file in files if _holds_weights(file)), None)


def _holds_weights(file: Path) -> bool:
    try:
        if file.suffix == ".safetensors":
            return _MARK in shapes(file)
        with zipfile.ZipFile(file) as archive:
            records = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(_MARK.encode() in archive.read(name) for name in records)
    except (OSError, zipfile.BadZipFile):
        return False
