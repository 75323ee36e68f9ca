"""Prompts in, videos out: sampling without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .config import InputError, check, option
from .models.base import VideoModel
from .placement import encode
from .rng import generator
from .sampling import GradPlan, sample
from .types import VideoSpec


@dataclass(frozen=True)
class VideoConfig:
    """Size of the videos; 0 stands for the model's own."""

    frames: int = option(0, "Frames per video; 0 takes the model's own number.", low=0, high=1024)
    height: int = option(0, "Height in pixels; 0 takes the model's own.", low=0, high=4096, step=4)
    width: int = option(0, "Width in pixels; 0 takes the model's own.", low=0, high=4096, step=4)

    def resolve(self, model: VideoModel) -> VideoSpec:
        """The size to use with a model. Raises InputError where the model cannot make it."""
        own = model.defaults.video
        video = VideoSpec(self.frames or own.frames, self.height or own.height, self.width or own.width, own.fps)
        model.check(video)
        return video


@dataclass(frozen=True)
class SampleConfig:
    """How videos are sampled; 0, and an eta of -1, stand for the model's published value."""

    seed: int = option(0, "Seed of the noise; each prompt draws its own noise from it.", low=0, high=2**53)
    steps: int = option(0, "Denoising steps; 0 takes the model's published number.", low=0, high=1000)
    guidance: float = option(
        0.0, "Classifier-free guidance; 1 = none, 0 = the model's published value.", low=0.0, high=100.0, step=0.1
    )
    eta: float = option(
        -1.0, "Fresh noise per step: 0 = DDIM, 1 = as much as DDPM, -1 = the model's published value.",
        low=-1.0, high=1.0, step=0.05,
    )  # fmt: skip
    negative_prompt: str = option("", "What the videos should not show.", multiline=True)
    batch_size: int = option(8, "Videos denoised at a time; fewer need less memory.", low=1, high=256)


def initial_noise(model: VideoModel, video: VideoSpec, keys: Sequence[tuple[int | str, ...]]) -> Tensor:
    """Unit-variance noise, one sample per random key, on the model's device."""
    shape = model.latent_shape(video, 1)
    return torch.cat([torch.randn(shape, generator=generator(*key)) for key in keys]).to(model.device)


def guidance_scale(model: VideoModel, guidance: float, video: VideoSpec) -> float | Tensor:
    """The given scale, or the model's own for 0; where the model's rises over the frames, [1, 1, T, 1, 1]."""
    last, first = guidance or model.defaults.guidance, model.defaults.first_guidance
    if first is None:
        return last
    frames = model.latent_shape(video, 1)[2]
    return torch.linspace(min(first, last), last, frames, device=model.device).view(1, 1, -1, 1, 1)


def noise_share(model: VideoModel, eta: float) -> float:
    """The given eta, or the model's own for a negative one."""
    return model.defaults.eta if eta < 0 else eta


def start_images(images: Sequence[Tensor], video: VideoSpec) -> Tensor | None:
    """Images [3, H, W] as one batch of the video's size in [0, 1]: scaled to cover it, then cut around the middle."""
    if not images:
        return None
    size = (video.height, video.width)

    def scaled(image: Tensor) -> Tensor:
        return image.float() / 255 if image.dtype == torch.uint8 else image.float()

    def fitted(image: Tensor) -> Tensor:
        scale = max(wanted / given for wanted, given in zip(size, image.shape[1:], strict=True))
        inner = [round(length / scale) for length in size]
        top, left = ((given - kept) // 2 for given, kept in zip(image.shape[1:], inner, strict=True))
        part = scaled(image[:, top : top + inner[0], left : left + inner[1]])
        return functional.interpolate(part[None], size, mode="bicubic", antialias=True).clamp(0, 1)[0]

    return torch.stack([scaled(image) if image.shape[1:] == size else fitted(image) for image in images])


@torch.no_grad()
def generate(
    model: VideoModel,
    prompts: Sequence[str],
    config: SampleConfig,
    video: VideoConfig | None = None,
    *,
    images: Sequence[Tensor] = (),
    on_step: Callable[[int, int, Callable[[], Tensor]], None] | None = None,
) -> Tensor:
    """Sample one video per prompt.

    Equal seed, place in the list and settings give equal noise, whatever LoRA is applied and
    however the prompts are batched.

    Args:
        images: the start image [3, H, W] in [0, 1] of each prompt, for an image-to-video model; see `start_images`.
        on_step: called after each denoising step with (steps done, steps in all, preview); preview()
            decodes one frame [3, H, W] of the unfinished video. What it raises ends the sampling.

    Returns:
        [B, T, 3, H, W] float32 in [0, 1] on the CPU.

    Raises:
        InputError: no prompts, another number of images, or settings that the model cannot take.
    """
    check(config)
    if not prompts:
        raise InputError("There is no prompt to sample; add one to the Prompts node.")
    if images and len(images) != len(prompts):
        raise InputError(f"There are {len(images)} start images for {len(prompts)} prompts; give one per prompt.")
    spec = (video or VideoConfig()).resolve(model)
    every = encode(model, prompts, spec, negative=config.negative_prompt, images=start_images(images, spec))
    schedule = model.process.schedule(config.steps or model.defaults.steps, spec)
    total = len(schedule) * -(-len(prompts) // config.batch_size)
    done = 0
    videos = []
    for start in range(0, len(prompts), config.batch_size):
        rows = range(start, min(start + config.batch_size, len(prompts)))
        cond = every.select(rows).to(model.device)

        def noise(i: int, rows: range = rows) -> Tensor:
            return initial_noise(model, spec, [(config.seed, "sample", r, "step", i) for r in rows])

        def report(i: int, z: Tensor) -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, total, lambda: model.decode(z[:1], [spec.frames // 2])[0, 0].cpu())

        start_noise = initial_noise(model, spec, [(config.seed, "sample", r, "start") for r in rows])
        rollout = sample(
            model, start_noise, cond, schedule, GradPlan.none(len(schedule)),
            guidance=guidance_scale(model, config.guidance, spec), eta=noise_share(model, config.eta),
            noise=noise, on_step=report,
        )  # fmt: skip
        videos.append(model.decode(rollout.latents, range(spec.frames)).cpu())
    return torch.cat(videos)
