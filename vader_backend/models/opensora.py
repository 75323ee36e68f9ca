"""Open-Sora 1.2: STDiT3, its video autoencoder and T5, trained as a rectified flow (Zheng et al. 2024).

A folder holds the published checkpoints side by side, each as it was published:

    transformer/   hpcai-tech/OpenSora-STDiT-v3     config.json, model.safetensors
    vae/           hpcai-tech/OpenSora-VAE-v1.2     config.json, model.safetensors
    text_encoder/  DeepFloyd/t5-v1_1-xxl            .safetensors or pytorch_model*.bin, in one file or in shards
    tokenizer/     the tokenizer's files of the same; they may lie in text_encoder as well
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError, check, option
from ..loading import DTYPES, build_empty, build_frozen, read_config, read_tensors, reading
from ..process import Flow
from ..types import Conditioning, VideoSpec
from ._blocks import autoencoder_blocks
from ._flow import shifted
from ._opensora_vae import ResBlock, VideoAutoencoder, per_channel
from ._single_file import read_weights
from ._stdit3 import XL_2, Architecture, STDiT3
from ._t5 import T5Text, Tokenizer, empty_text, load_tokenizer, sentencepiece_tokenizer, t5_network
from .base import Defaults, LoraNames, Networks, refuse_images, settings_of

PUBLISHED = Defaults(
    VideoSpec(frames=51, height=276, width=368, fps=24.0), steps=30, guidance=7.0, lora_scale=0.5, dropout=0.01
)
FULL_SIZE: Mapping[str, tuple[str, ...]] = {
    "Open-Sora 1.2": ("opensora-v1.2", "opensora-stdit-v3", "opensora", "open-sora", "open_sora")
}
MINI = Defaults(VideoSpec(frames=17, height=64, width=64, fps=16.0), steps=25, guidance=2.5, rank=8, learning_rate=1e-3)
_SOURCES = {
    "transformer": "hpcai-tech/OpenSora-STDiT-v3",
    "vae": "hpcai-tech/OpenSora-VAE-v1.2",
    "text_encoder": "DeepFloyd/t5-v1_1-xxl",
}
_CLIP, _CLIP_LATENTS = 17, 5
_SCORE = "aesthetic score:"
_ADDRESS = re.compile(r"\b(https?://|www\.)\S+", re.IGNORECASE)


@dataclass(frozen=True)
class Config:
    """folder: the one that holds transformer, vae, text_encoder and tokenizer."""

    folder: str = option("", "Folder that holds transformer, vae, text_encoder and tokenizer.")
    dtype: str = option(
        "float32",
        "Precision in which the frozen weights are held. LoRA weights are always float32.",
        choices=tuple(DTYPES),
    )
    bf16_times: bool = option(
        False, "Round as Open-Sora's own script does when it places the sampling times; they move by up to 0.2%."
    )


def matches(folder: Path) -> bool:
    """Whether transformer/config.json of a folder names STDiT3."""
    try:
        config = read_config(folder / "transformer" / "config.json")
    except (OSError, ValueError):
        return False
    return config.get("model_type") == "STDiT3" or "STDiT3" in (config.get("architectures") or ())


def build(config: Config) -> OpenSora:
    """Load the checkpoints onto the CPU.

    Raises:
        InputError: a part is missing, truncated or of another kind.
    """
    check(config)
    folder, dtype = Path(config.folder), DTYPES[config.dtype]
    for part, source in _SOURCES.items():
        if not (folder / part).is_dir():
            raise InputError(f"{folder} has no folder {part}; put the files of {source} into {folder / part}.")
    denoiser = _load_denoiser(folder / "transformer", dtype)
    text = _load_text(folder, dtype, denoiser.arch.text_tokens)
    return _assembled(folder.name, denoiser, _load_vae(folder / "vae", dtype), text, config)


def full_size(name: str, config: Config) -> OpenSora:
    """The published networks without weights; `name` is a key of FULL_SIZE."""
    check(config)
    dtype = DTYPES[config.dtype]
    denoiser = build_empty(lambda: STDiT3(XL_2), dtype)
    vae = build_empty(lambda: VideoAutoencoder.from_config({}), dtype)
    return _assembled(name, denoiser, vae, empty_text(dtype, XL_2.text_tokens, umt5=False), config)


def _assembled(name: str, denoiser: STDiT3, vae: VideoAutoencoder, text: T5Text, config: Config) -> OpenSora:
    rounding = torch.bfloat16 if config.bf16_times else torch.float32
    process = Flow(partial(sampling_times, rounding=rounding), towards_data=True)
    model = OpenSora(name, denoiser, vae, text, process)
    model.settings = settings_of(config)
    return model


def _load_denoiser(folder: Path, dtype: torch.dtype) -> STDiT3:
    tensors, config = _read(folder, "denoiser")
    with reading("denoiser", folder):
        arch = Architecture.of({key: tensor.shape for key, tensor in tensors.items()})
        base_size = int(config.get("input_sq_size", 512))
    return build_frozen(lambda: STDiT3(arch, base_size), tensors, dtype, "denoiser", folder)


def _load_vae(folder: Path, dtype: torch.dtype) -> VideoAutoencoder:
    tensors, config = _read(folder, "autoencoder")
    with reading("autoencoder", folder):
        weights = per_channel(tensors)
    return build_frozen(lambda: VideoAutoencoder.from_config(config), weights, dtype, "autoencoder", folder)


def _read(folder: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with reading(f"{what}'s configuration", folder):
        config = read_config(folder / "config.json")
    return read_tensors(folder / "model.safetensors", what), config


def _load_text(folder: Path, dtype: torch.dtype, length: int) -> T5Text:
    place, what = folder / "text_encoder", "text encoder"
    files = sorted(place.glob("*.safetensors")) or sorted(place.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{place} holds no weights; put the files of {_SOURCES['text_encoder']} there.")
    tensors = {key: value for file in files for key, value in read_weights(file, dtype, what).items()}
    encoder = {key: value for key, value in tensors.items() if not key.startswith(("decoder.", "lm_head."))}
    return T5Text(t5_network(encoder, dtype, place, umt5=False), _load_tokenizer(folder), length)


def _load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json or, as published, spiece.model; without either transformers would make up an empty one."""
    for place in (folder / "tokenizer", folder / "text_encoder"):
        if (place / "tokenizer.json").is_file():
            return load_tokenizer(place)
        if (place / "spiece.model").is_file():
            model = bytearray((place / "spiece.model").read_bytes())
            return sentencepiece_tokenizer(torch.frombuffer(model, dtype=torch.uint8))
    raise InputError(
        f"The tokenizer is missing: put spiece.model of {_SOURCES['text_encoder']} into {folder / 'tokenizer'}."
    )


def sampling_times(steps: int, video: VideoSpec, rounding: torch.dtype = torch.float32) -> list[float]:
    """Even times in [1 / steps, 1], moved towards noise for videos that are large and long."""
    return shifted([1 - i / steps for i in range(steps)], time_shift(video, rounding))


def time_shift(video: VideoSpec, rounding: torch.dtype = torch.float32) -> float:
    """sqrt(pixels per frame / 512^2) * sqrt(latent frames); an image counts as one latent frame.

    Raises:
        InputError: the video is shorter than a clip, which would leave no time to move.
    """
    height, width, frames = torch.tensor([video.height, video.width, video.frames], dtype=rounding)
    latents = frames // _CLIP * _CLIP_LATENTS if video.frames > 1 else frames
    shift = float((height * width / 512**2).sqrt() * latents.sqrt())
    if not shift > 0:
        raise _wrong_length(video.frames)
    return shift


def _wrong_length(frames: int) -> InputError:
    return InputError(
        f"frames is {frames}; Open-Sora makes images (1) and clips of a multiple of {_CLIP} frames, such as 51 "
        "(2 seconds), 102, 204 or 408."
    )


def clean(prompt: str) -> str:
    """Lower case, without addresses of the web, HTML's ways to write letters, or spare spaces.

    The published cleaning, which runs twice, also rewrites rare quotes, dashes, file names and the like.
    """
    text = html.unescape(html.unescape(prompt)).lower()
    return " ".join(_ADDRESS.sub(" ", text).split())


def scored(prompt: str) -> str:
    """The prompt as the network knows prompts of good videos, unless it says a score itself."""
    text = clean(prompt)
    return text if _SCORE in text else f"{text} {_SCORE} 6.5."


class OpenSora(Networks):
    """See `vader_backend.models.base.VideoModel`.

    Decoded sizes are multiples of 8: of a published size such as 276x368 there remain 272x368 pixels.
    """

    denoiser: STDiT3
    vae: VideoAutoencoder
    lora_targets: Sequence[str] = ("qkv", "q_linear", "kv_linear")
    lora_prefix = "transformer."
    lora_names = LoraNames()

    def __init__(self, name: str, denoiser: STDiT3, vae: VideoAutoencoder, text: T5Text, process: Flow) -> None:
        super().__init__(name, denoiser, vae, process, denoiser.blocks)
        self.decoder_blocks = autoencoder_blocks(vae, ResBlock)
        self.text = text
        self.defaults = PUBLISHED if denoiser.base_size >= 256 else MINI

    def parts(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "vae": self.vae, "text_encoder": self.text.encoder}

    def check(self, video: VideoSpec) -> None:
        least = self.vae.spatial_factor * max(self.denoiser.arch.patch)
        for name, value in (("height", video.height), ("width", video.width)):
            if value < least or value % 2:
                raise InputError(f"{name} is {value}; {self.name} needs a multiple of 2, at least {least}.")
        if video.frames < 1 or (video.frames > 1 and video.frames % _CLIP):
            raise _wrong_length(video.frames)

    def latent_shape(self, video: VideoSpec, batch: int) -> torch.Size:
        height, width = (n // self.vae.spatial_factor for n in (video.height, video.width))
        return torch.Size((batch, self.denoiser.arch.channels, self.vae.latent_frames(video.frames), height, width))

    def truncated(self, prompt: str) -> str:
        return self.text.truncated(clean(prompt))

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
        """Without a negative prompt, the negative text is the trained null text under the prompt's mask."""
        refuse_images(self.name, images)
        text, mask = self.text.encode([scored(prompt) for prompt in prompts], hide_padding=True)
        null, null_mask = self.denoiser.y_embedder.y_embedding.to(text)[None], mask
        if negative.strip():
            null, null_mask = self.text.encode([clean(negative)], hide_padding=True)
        size = {
            name: torch.full((len(prompts),), float(value), device=text.device)
            for name, value in (("fps", video.fps), ("height", video.height), ("width", video.width))
        }
        without = {"text": null.expand_as(text), "mask": null_mask.expand_as(mask), **size}
        return Conditioning({"text": text, "mask": mask, **size}, without)

    @torch.no_grad()
    def encode_video(self, video_BTCHW: Tensor) -> Tensor:
        video = video_BTCHW.transpose(1, 2).to(self.vae.scale) * 2 - 1
        return self.vae.encode(video).float()

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        dtype = next(self.denoiser.parameters()).dtype
        time = torch.full((len(z),), float(t), device=z.device)
        output = self.denoiser(
            z.to(dtype), time, cond["text"].to(dtype), cond["mask"], cond["fps"], cond["height"], cond["width"]
        )
        return output[:, : z.shape[1]].float()

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        frames = self.vae.decode(z.to(self.vae.scale.dtype), indices).transpose(1, 2).float()
        return (frames / 2 + 0.5).clamp(0, 1)
