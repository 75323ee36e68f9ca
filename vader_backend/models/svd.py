"""Stable Video Diffusion, image to video (Blattmann et al. 2023): 14 or 25 frames.

Opens stabilityai/stable-video-diffusion-img2vid and -xt as a diffusers folder, or the original svd.safetensors and
svd_xt.safetensors. Source of the conditioning: diffusers' StableVideoDiffusionPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from ..config import InputError, check, option
from ..loading import DTYPES, load_frozen, names_pipeline, read_config, reading
from ..process import EDM
from ..types import Conditioning, VideoSpec
from . import _svd_keys as keys
from ._blocks import unet_blocks
from ._single_file import shapes
from ._svd_original import empty_networks, networks
from .base import Defaults, LoraNames, Networks, check_size, settings_of

FULL_SIZE: Mapping[str, tuple[str, ...]] = {
    "Stable Video Diffusion, 14 frames": ("stable-video-diffusion-img2vid", "stable-video-diffusion", "svd"),
    "Stable Video Diffusion XT, 25 frames": ("stable-video-diffusion-img2vid-xt", "svd_xt", "svd-xt"),
}
_FRAMES = dict(zip(FULL_SIZE, (14, 25), strict=True))
_SCHEDULER = {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Config:
    """folder: the checkpoint's folder, the one that holds model_index.json, or its original .safetensors file."""

    folder: str = option("", "Folder that holds model_index.json, or the original .safetensors file.")
    dtype: str = option(
        "float32",
        "Precision in which the frozen weights are held. LoRA weights are always float32.",
        choices=tuple(DTYPES),
    )
    motion_bucket: int = option(127, "Stable Video Diffusion: more motion with a higher number.", low=0, high=1023)
    noise_augmentation: float = option(
        0.02, "Stable Video Diffusion: noise on the start image; more lets the video leave it.", low=0.0, high=1.0
    )
    decode_chunk: int = option(
        0,
        "Stable Video Diffusion: frames decoded together; fewer need less memory and flicker at the seams. 0 = all.",
        low=0,
        high=1024,
    )


def matches(path: Path) -> bool:
    """Whether a folder's model_index.json names this family's pipeline, or a file has the original layout."""
    path = _checkpoint(path)
    if path.is_file():
        return _is_original(path)
    return names_pipeline(path, ("StableVideoDiffusionPipeline",))


def _checkpoint(path: Path) -> Path:
    """The original file of a folder that is no diffusers folder, such as the embedded one; any other path as it is."""
    file = path / "svd.safetensors"
    return file if file.is_file() and not (path / "model_index.json").is_file() else path


def _is_original(path: Path) -> bool:
    """Reads the header only; SV3D and SV4D, whose added conditioning is another, do not match."""
    found = shapes(path)
    added = found.get(keys.UNET + "label_emb.0.0.weight", (0, 1))[1]
    return keys.UNET + "middle_block.0.time_mixer.mix_factor" in found and added % 3 == 0


def build(config: Config) -> StableVideoDiffusion:
    """Load the checkpoint onto the CPU.

    Raises:
        InputError: a part is missing, truncated or of another kind.
    """
    check(config)
    path, dtype = _checkpoint(Path(config.folder)), DTYPES[config.dtype]
    parts = _from_file(path, dtype) if path.is_file() else _from_folder(path, dtype)
    return _assembled(path.stem if path.is_file() else path.name, parts, config)


def full_size(name: str, config: Config) -> StableVideoDiffusion:
    """The published networks without weights; `name` is a key of FULL_SIZE."""
    check(config)
    parts = {**empty_networks(_FRAMES[name], DTYPES[config.dtype]), "process": EDM(sigma_spacing(_SCHEDULER))}
    return _assembled(name, parts, config)


def _assembled(name: str, parts: Mapping[str, Any], config: Config) -> StableVideoDiffusion:
    model = StableVideoDiffusion(
        name,
        **parts,
        motion_bucket=config.motion_bucket,
        noise_augmentation=config.noise_augmentation,
        decode_chunk=config.decode_chunk,
    )
    model.settings = settings_of(config)
    return model


def _from_file(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    return {**networks(path, dtype), "process": EDM(sigma_spacing(_SCHEDULER))}


def _from_folder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    with reading("scheduler and image configuration", folder):
        scheduler, image = (
            read_config(folder / name)
            for name in ("scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json")
        )
    return {
        "denoiser": load_frozen(UNetSpatioTemporalConditionModel, folder / "unet", dtype, "denoiser"),
        "vae": load_frozen(AutoencoderKLTemporalDecoder, folder / "vae", dtype, "autoencoder"),
        "image_encoder": load_frozen(CLIPVisionModelWithProjection, folder / "image_encoder", dtype, "image encoder"),
        "process": EDM(sigma_spacing(scheduler)),
        "mean": image.get("image_mean", _CLIP_MEAN),
        "std": image.get("image_std", _CLIP_STD),
    }


def sigma_spacing(config: Mapping[str, Any]) -> Callable[[int], list[float]]:
    """Noise levels of a scheduler_config.json: Karras et al. 2022, equation 5, with rho = 7.

    Source: diffusers' EulerDiscreteScheduler with the settings that Stable Video Diffusion was published with.

    Raises:
        InputError: the configuration asks for another process or another spacing.
    """
    for name in ("prediction_type", "timestep_type", "timestep_spacing", "use_karras_sigmas"):
        if config.get(name) != _SCHEDULER[name]:
            raise InputError(f"The scheduler's {name} is {config.get(name)!r}; only {_SCHEDULER[name]!r} is supported.")
    if config.get("final_sigmas_type", "zero") != "zero":
        raise InputError(f"The scheduler's final_sigmas_type {config['final_sigmas_type']!r} is not supported.")
    if not config.get("sigma_min") or not config.get("sigma_max"):
        raise InputError("The scheduler states no sigma_min and sigma_max; take the published scheduler_config.json.")
    low, high = config["sigma_min"] ** (1 / 7), config["sigma_max"] ** (1 / 7)
    return lambda steps: [(high + i / max(steps - 1, 1) * (low - high)) ** 7 for i in range(steps)]


def denoise(unet: UNetSpatioTemporalConditionModel, z: Tensor, t: float | Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """The network's own prediction [B, 4, T, h, w], float32.

    Args:
        z: [B, 4, T, h, w], scaled for the network. t: one native time for all samples, or one each.
        cond: image [B, tokens, C]; image_latents [B, 4, 1, h, w] unscaled, seen by every frame; time_ids [B, 3].
    """
    still = cond["image_latents"].expand(-1, -1, z.shape[2], -1, -1)
    seen = torch.cat([z, still], dim=1).transpose(1, 2).to(unet.dtype)
    return unet(seen, t, cond["image"].to(unet.dtype), cond["time_ids"]).sample.transpose(1, 2).float()


class StableVideoDiffusion(Networks):
    """See `vader_backend.models.base.VideoModel`. It reads no text: prompts matter to rewards only."""

    denoiser: UNetSpatioTemporalConditionModel
    vae: AutoencoderKLTemporalDecoder
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefix = "unet."

    def __init__(
        self,
        name: str,
        denoiser: UNetSpatioTemporalConditionModel,
        vae: AutoencoderKLTemporalDecoder,
        image_encoder: CLIPVisionModelWithProjection,
        process: EDM,
        *,
        mean: Sequence[float] = _CLIP_MEAN,
        std: Sequence[float] = _CLIP_STD,
        motion_bucket: int = 127,
        noise_augmentation: float = 0.02,
        decode_chunk: int = 0,
    ) -> None:
        super().__init__(name, denoiser, vae, process, unet_blocks(denoiser))
        self.image_encoder = image_encoder
        self.mean, self.std = mean, std
        self.motion_bucket = motion_bucket
        self.noise_augmentation = noise_augmentation
        self.decode_chunk = decode_chunk
        kinds = denoiser.config.up_block_types
        plain = frozenset(i for i, kind in enumerate(kinds) if not kind.startswith("CrossAttn"))
        comfy = partial(keys.unet_key, layers=denoiser.config.layers_per_block, plain=plain)
        self.lora_names = LoraNames(comfy=comfy)
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.defaults = _defaults(denoiser, self.scale)

    def parts(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "vae": self.vae, "image_encoder": self.image_encoder}

    def check(self, video: VideoSpec) -> None:
        multiple = self.scale * 2 ** (len(self.denoiser.config.block_out_channels) - 1)
        check_size(self.name, video, multiple)

    def latent_shape(self, video: VideoSpec, batch: int) -> torch.Size:
        channels = self.denoiser.config.out_channels
        return torch.Size((batch, channels, video.frames, video.height // self.scale, video.width // self.scale))

    def truncated(self, prompt: str) -> str:
        return ""

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
        """Conditioning on one start image per prompt; the negative branch sees zeros in its place.

        Args:
            images: [B, 3, H, W] in [0, 1]; stretched to the video's size where they have another.
            rng: noise of the augmentation, drawn for the whole batch; without it every image gets the same noise.

        Raises:
            InputError: images are missing or of another number, or there is a negative prompt.
        """
        if images is None:
            raise InputError(f"{self.name} makes videos from images; take its prompts from Image Prompts.")
        if len(images) != len(prompts):
            raise InputError(f"There are {len(images)} start images for {len(prompts)} prompts; give one per prompt.")
        if negative:
            raise InputError(f"{self.name} reads no text; clear the negative prompt.")
        ids = torch.tensor([video.fps - 1, self.motion_bucket, self.noise_augmentation], device=self.device)
        positive = {
            "image": self._embed(images).unsqueeze(1).to(self.device),
            "image_latents": self._still(images, video, rng).to(self.device),
        }
        nothing = {name: torch.zeros_like(tensor) for name, tensor in positive.items()}
        shared = {"time_ids": ids.expand(len(images), -1)}
        return Conditioning(positive | shared, nothing | shared)

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        """CLIP embedding [B, C], float32."""
        weight = self.image_encoder.visual_projection.weight
        small = shrink(images_BCHW.to(weight.device).float(), self.image_encoder.config.image_size)
        mean, std = (small.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pooled = self.image_encoder.vision_model(((small - mean) / std).to(weight.dtype)).pooler_output
        return self.image_encoder.visual_projection(pooled).float()

    def _still(self, images_BCHW: Tensor, video: VideoSpec, rng: torch.Generator | None) -> Tensor:
        """Latents [B, 4, 1, h, w] of the noised images, without the scaling factor."""
        frames, size = images_BCHW.float(), (video.height, video.width)
        if frames.shape[2:] != size:
            frames = functional.interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
        shape = frames.shape if rng else (1, *frames.shape[1:])
        noise = torch.randn(shape, generator=rng or torch.Generator().manual_seed(0)).to(frames.device)
        return self._encode_frames(frames * 2 - 1 + self.noise_augmentation * noise).unsqueeze(2)

    def _encode_frames(self, frames_NCHW: Tensor) -> Tensor:
        with _exact(self.vae):
            parts = [self.vae.encode(x.to(self.vae.device, self.vae.dtype)) for x in frames_NCHW.split(4)]
            return torch.cat([part.latent_dist.mean for part in parts]).float()

    @torch.no_grad()
    def encode_video(self, video_BTCHW: Tensor) -> Tensor:
        latents = self._encode_frames(video_BTCHW.flatten(0, 1) * 2 - 1) * self.vae.config.scaling_factor
        return latents.unflatten(0, (len(video_BTCHW), -1)).transpose(1, 2)

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        return denoise(self.denoiser, z, t, cond)

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        """These frames, from the whole decode chunks that hold them: the decoder mixes the frames of a chunk.

        As in diffusers' pipeline, the whole video is one chunk unless `decode_chunk` is set. Chunks never join two
        videos. With random weights, 8 frames in chunks of 4, 2 and 1 differ from the unchunked decode by .04, .10 and
        .18 on average, and by up to .65, .77 and .88.
        """
        size = self.decode_chunk or z.shape[2]
        chunks = {start: self._decode_chunk(z[:, :, start : start + size]) for start in {i - i % size for i in indices}}
        return torch.stack([chunks[i - i % size][:, i % size] for i in indices], dim=1)

    def _decode_chunk(self, z: Tensor) -> Tensor:
        latents = (z / self.vae.config.scaling_factor).to(self.vae.dtype).transpose(1, 2)
        frames = torch.stack([self.vae.decode(video, num_frames=len(video)).sample for video in latents])
        return (frames.float() / 2 + 0.5).clamp(0, 1)


def shrink(images_BCHW: Tensor, size: int) -> Tensor:
    """Images as squares: blurred where that makes them smaller, then bicubic with aligned corners.

    Source: kornia's antialiased resize, which the checkpoint's conditioning was trained with.
    """
    for dim in (2, 3):
        sigma = max((images_BCHW.shape[dim] / size - 1) / 2, 0.001)
        radius = max(int(4 * sigma), 3) // 2
        offsets = torch.arange(-radius, radius + 1, dtype=images_BCHW.dtype, device=images_BCHW.device)
        kernel = functional.softmax(-offsets.square() / (2 * sigma**2), dim=0)
        shape, padding = ((-1, 1), (0, 0, radius, radius)) if dim == 2 else ((1, -1), (radius, radius, 0, 0))
        weight = kernel.view(1, 1, *shape).expand(images_BCHW.shape[1], -1, -1, -1)
        images_BCHW = functional.conv2d(
            functional.pad(images_BCHW, padding, mode="reflect"), weight, groups=images_BCHW.shape[1]
        )
    return functional.interpolate(images_BCHW, (size, size), mode="bicubic", align_corners=True)


@contextmanager
def _exact(vae: AutoencoderKLTemporalDecoder) -> Iterator[None]:
    """The encoder in float32 where it overflows in float16, as its configuration says."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        _cast(vae, torch.float32)
    try:
        yield
    finally:
        if upcast:
            _cast(vae, torch.float16)


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """As `network.to(dtype)`, which fails for fake tensors."""
    for tensor in network.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.to(dtype)


def _defaults(unet: UNetSpatioTemporalConditionModel, scale: int) -> Defaults:
    frames, size = unet.config.num_frames, unet.config.sample_size
    if size is None or size >= 32:
        return Defaults(VideoSpec(frames, 576, 1024, fps=7.0), steps=25, guidance=3.0, first_guidance=1.0)
    video = VideoSpec(frames, size * scale, size * scale, fps=7.0)
    return Defaults(video, steps=25, guidance=3.0, first_guidance=1.0, rank=8, learning_rate=1e-3)
