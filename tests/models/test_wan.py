"""Wan: equal to diffusers' pipelines on random checkpoints, whole and partial decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from tiny_wan import EULER, VIDEO, noise_for, picture, save_tiny, save_tiny_2_2, save_tiny_image_to_video
from torch import Tensor
from transformers import AutoTokenizer
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.models import wan
from vader_nodes.vader_backend.models._flow import static_spacing
from vader_nodes.vader_backend.models.wan import Config, Wan
from vader_nodes.vader_backend.sampling import GradPlan, sample
from vader_nodes.vader_backend.types import VideoSpec

PROMPTS = ["a red circle moves left", "the blue square"]
STEPS, GUIDANCE = 4, 4.0
TOLERANCE = 1e-4  # of latents about 1; both sides are float32, but ours batches the guidance branches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Wan:
    return wan.build(Config(folder=str(folder)))


@pytest.fixture(scope="module")
def model_2_2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Wan]:
    """Wan 2.2 5B in small: one transformer for text and for images, times per token."""
    folder = tmp_path_factory.mktemp("wan22")
    save_tiny_2_2(folder)
    return folder, wan.build(Config(folder=str(folder)))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Wan]:
    folder = tmp_path_factory.mktemp("wani2v")
    save_tiny_image_to_video(folder)
    return folder, wan.build(Config(folder=str(folder)))


def ours(model: Wan, video: VideoSpec, noise: Tensor, images: Tensor | None = None) -> Tensor:
    cond = model.encode(PROMPTS[: len(noise)], video, negative="green", images=images)
    schedule = model.process.schedule(STEPS, video)
    return sample(model, noise, cond, schedule, GradPlan.none(STEPS), guidance=GUIDANCE).latents


def theirs(cls: Any, folder: Path, model: Wan, video: VideoSpec, noise: Tensor, **more: Any) -> Tensor:
    parts, settings = more.pop("parts", {}), more.pop("settings", {})
    pipeline = cls(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), text_encoder=model.text.encoder, vae=model.vae,
        transformer=model.denoiser, scheduler=FlowMatchEulerDiscreteScheduler.from_config(EULER), **parts, **settings,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPTS[: len(noise)], negative_prompt=["green"] * len(noise), height=video.height, width=video.width,
        num_frames=video.frames, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise,
        output_type="latent", **more,
    ).frames  # fmt: skip


def test_text_to_video_equals_the_pipeline(folder: Path, model: Wan) -> None:
    assert wan.matches(folder)
    noise = noise_for(model, VIDEO, 2)
    expected = theirs(WanPipeline, folder, model, VIDEO, noise)
    assert (expected - noise).abs().max() > 0.1
    assert (ours(model, VIDEO, noise) - expected).abs().max() < TOLERANCE


def test_times_per_token_make_no_difference_without_an_image(model_2_2: tuple[Path, Wan]) -> None:
    folder, model = model_2_2
    video = VideoSpec(9, 64, 96)
    noise = noise_for(model, video, 1)
    expected = theirs(WanPipeline, folder, model, video, noise, settings={"expand_timesteps": True})
    assert (ours(model, video, noise) - expected).abs().max() < TOLERANCE


def test_a_fixed_first_frame_equals_the_pipeline(model_2_2: tuple[Path, Wan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", str)  # as it is, it needs ftfy
    folder, model = model_2_2
    video = VideoSpec(9, 64, 96)
    noise = noise_for(model, video, 1)
    image, pixels = picture(video)
    expected = theirs(
        WanImageToVideoPipeline, folder, model, video, noise, settings={"expand_timesteps": True}, image=image
    )
    found = ours(model, video, noise, pixels)
    assert (found - expected).abs().max() < TOLERANCE
    assert (found[:, :, :1] - model.encode_video(pixels[:, None])).abs().max() < TOLERANCE


def test_image_to_video_equals_the_pipeline(image_model: tuple[Path, Wan], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = image_model
    video = VideoSpec(9, 32, 32)
    noise = noise_for(model, video, 1)
    image, pixels = picture(video)
    assert model.image is not None
    features = model.image.encode(pixels)
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", str)  # as it is, it needs ftfy
    monkeypatch.setattr(WanImageToVideoPipeline, "encode_image", lambda self, image, device: features)
    expected = theirs(WanImageToVideoPipeline, folder, model, video, noise, image=image)
    assert (ours(model, video, noise, pixels) - expected).abs().max() < TOLERANCE


def test_pictures_reach_clip_as_its_own_processor_sends_them(image_model: tuple[Path, Wan]) -> None:
    """Pillow's bicubic rounds to 8 bits between its two passes, torch's does not: hence 2 of 255."""
    rows, columns = np.mgrid[0:48, 0:80]
    values = np.stack([rows * 5, columns * 3, 255 - rows - columns], axis=-1).astype(np.uint8)
    image, pixels = Image.fromarray(values), torch.from_numpy(values).permute(2, 0, 1)[None] / 255
    seen: list[Tensor] = []
    encoder = image_model[1].parts()["image_encoder"]
    hook = encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    assert image_model[1].image is not None
    image_model[1].image.encode(pixels)
    hook.remove()
    resized = np.asarray(image.resize((53, 32), Image.Resampling.BICUBIC))[:, 10:42]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = torch.from_numpy((resized / 255 - mean) / std).permute(2, 0, 1)
    assert (seen[0][0] - expected).abs().max() < 2 / 255 / 0.26


def test_images_are_asked_for_or_refused(model: Wan, image_model: tuple[Path, Wan]) -> None:
    with pytest.raises(InputError, match="not from Image Prompts"):
        model.encode(["a"], VIDEO, images=torch.zeros(1, 3, 32, 48))
    with pytest.raises(InputError, match="from Image Prompts"):
        image_model[1].encode(["a"], VIDEO)


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_spacing_equals_the_schedulers(shift: float) -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=shift or 3.0)
    euler.set_timesteps(7)
    assert np.allclose(static_spacing(EULER, shift)(7, VIDEO), euler.sigmas[:-1], atol=1e-6)
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0,
              "prediction_type": "flow_prediction"}  # fmt: skip
    unipc = UniPCMultistepScheduler.from_config(config | ({"flow_shift": shift} if shift else {}))
    unipc.set_timesteps(7)
    assert np.allclose(static_spacing(config, shift)(7, VIDEO), unipc.sigmas[:-1], atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [{"use_karras_sigmas": True}, {"use_dynamic_shifting": True}, {"_class_name": "UniPCMultistepScheduler"}],
)
def test_other_schedules_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="scheduler"):
        static_spacing(config)


@pytest.mark.parametrize("newer", [False, True])
def test_frames_equal_those_of_the_whole(model: Wan, model_2_2: tuple[Path, Wan], newer: bool) -> None:
    chosen = model_2_2[1] if newer else model
    z = noise_for(chosen, VideoSpec(13, 64, 64), 2)
    mean = torch.tensor(chosen.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(chosen.vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        reference = (chosen.vae.decode(z * std + mean).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
        whole = chosen.decode(z, range(13))
        part = chosen.decode(z, [6, 0, 3])
    assert whole.shape == (2, 13, 3, 64, 64)
    assert reference.std() > 0.01
    assert (whole - reference).abs().max() < 1e-5
    assert (part - whole[:, [6, 0, 3]]).abs().max() < 1e-5


def frame_gradient(model: Wan, z: Tensor, frame: int) -> Tensor:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.decode(z, [frame]).square().sum(), z)
    return gradient.abs().amax((0, 1, 3, 4))


def test_a_frames_gradient_reaches_the_chosen_latents(model: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    z = noise_for(model, VideoSpec(13, 16, 16), 1)
    for reach, live in ((1, [2]), (2, [1, 2]), (0, [0, 1, 2])):
        monkeypatch.setattr(model, "gradient_latents", reach)
        gradient = frame_gradient(model, z, 7)
        assert [i for i in range(4) if gradient[i] > 0] == live
    leaf = z.clone().requires_grad_()
    mean = torch.tensor(model.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(model.vae.config.latents_std).view(1, -1, 1, 1, 1)
    frame = model.vae.decode(leaf * std + mean).sample[:, :, 7]
    assert frame.abs().max() < 1
    (exact,) = torch.autograd.grad((frame / 2 + 0.5).square().sum(), leaf)
    assert torch.allclose(gradient, exact.abs().amax((0, 1, 3, 4)), rtol=1e-3)


def test_saturated_pixels_keep_their_gradient(folder: Path) -> None:
    model = wan.build(Config(folder=str(folder)))
    model.vae.decoder.conv_out.bias += 5
    z = noise_for(model, VideoSpec(5, 16, 16), 1)
    assert model.decode(z, [3]).min() == 1
    assert frame_gradient(model, z, 3)[1] > 0


def test_encoding_gives_latents_of_the_stated_shape(model: Wan, model_2_2: tuple[Path, Wan]) -> None:
    for chosen in (model, model_2_2[1]):
        video = VideoSpec(9, 32, 64)
        assert chosen.encode_video(torch.rand(2, 9, 3, 32, 64)).shape == chosen.latent_shape(video, 2)


@pytest.mark.parametrize("size", [(8, 32, 32), (9, 40, 32), (9, 32, 1), (0, 32, 32)])
def test_sizes_outside_the_model_are_refused(model: Wan, size: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="multiple of"):
        model.check(VideoSpec(*size))


def test_text_is_padded_with_zeros_and_the_end_of_a_long_prompt_is_told(model: Wan) -> None:
    text = model.encode(["a  red\ncircle"], VIDEO).positive["text"]
    assert text.shape == (1, 512, 16)
    assert text[0, :4].all()
    assert not text[0, 4:].any()
    assert torch.equal(text, model.encode(["a red circle"], VIDEO).positive["text"])
    assert model.truncated("a red circle") == ""
    assert model.truncated("a red " * 300 + "sea").endswith("sea")


def test_two_experts_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]})
    )
    with pytest.raises(InputError, match="two transformers"):
        wan.build(Config(folder=str(tmp_path / "copy")))


def test_gradient_reaches_the_lora_targets(model: Wan) -> None:
    z = noise_for(model, VIDEO, 1).requires_grad_()
    cond = model.encode(["a red circle"], VIDEO).positive
    (gradient,) = torch.autograd.grad(model.decode(model.predict(z, 500, dict(cond)), [0]).mean(), z)
    assert gradient.isfinite().all()
    assert gradient.any()
