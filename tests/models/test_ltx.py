"""LTX-Video: equal to diffusers' pipelines on random checkpoints, chunked decoding, original files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_ltx_vae_checkpoint_to_diffusers,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_files import save_ltx
from tiny_flow import original_shapes, save_folder, save_text_file, text_encoder
from tiny_ltx import SCHEDULER, save_tiny, tiny_transformer, tiny_vae
from torch import Tensor
from transformers import AutoTokenizer
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.models import _ltx_keys, ltx
from vader_nodes.vader_backend.models._flow import dynamic_spacing
from vader_nodes.vader_backend.models.ltx import LTX, Config
from vader_nodes.vader_backend.sampling import GradPlan, sample
from vader_nodes.vader_backend.types import VideoSpec

VIDEO = VideoSpec(frames=9, height=64, width=96, fps=12.0)
PROMPTS = ["a red circle moves left", "the blue square"]
STEPS, GUIDANCE = 4, 3.0
TOLERANCE = 1e-4  # of latents about 1, both sides in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ltx")
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LTX:
    return ltx.build(Config(folder=str(folder)))


def noise_for(model: LTX, video: VideoSpec, batch: int) -> Tensor:
    return torch.randn(model.latent_shape(video, batch), generator=torch.Generator().manual_seed(3))


def ours(model: LTX, noise: Tensor, images: Tensor | None = None) -> Tensor:
    cond = model.encode(PROMPTS[: len(noise)], VIDEO, negative="green", images=images)
    schedule = model.process.schedule(STEPS, VIDEO)
    return sample(model, noise, cond, schedule, GradPlan.none(STEPS), guidance=GUIDANCE).latents


def theirs(cls: Any, folder: Path, model: LTX, noise: Tensor, **more: Any) -> Tensor:
    pipeline = cls(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), text_encoder=model.text.encoder, vae=model.vae,
        transformer=model.denoiser, scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    tokens = pipeline(
        prompt=PROMPTS[: len(noise)], negative_prompt=["green"] * len(noise), height=VIDEO.height, width=VIDEO.width,
        num_frames=VIDEO.frames, frame_rate=VIDEO.fps, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=noise.flatten(2).transpose(1, 2), output_type="latent", **more,
    ).frames  # fmt: skip
    return tokens.transpose(1, 2).unflatten(2, noise.shape[2:])


def picture() -> tuple[Image.Image, Tensor]:
    values = np.random.default_rng(0).integers(0, 256, (VIDEO.height, VIDEO.width, 3), dtype=np.uint8)
    return Image.fromarray(values), torch.from_numpy(values).permute(2, 0, 1)[None] / 255


def test_text_to_video_equals_the_pipeline(folder: Path, model: LTX) -> None:
    assert ltx.matches(folder)
    noise = noise_for(model, VIDEO, 2)
    expected = theirs(LTXPipeline, folder, model, noise)
    assert (expected - noise).abs().max() > 0.1
    assert (ours(model, noise) - expected).abs().max() < TOLERANCE


def test_image_to_video_equals_the_pipeline(folder: Path, model: LTX) -> None:
    """The pipeline is given its latents: noise behind the first frame, which it would have drawn from its encoder."""
    noise = noise_for(model, VIDEO, 1)
    image, pixels = picture()
    first = model.encode_video(pixels[:, None])
    start = torch.cat([first, noise[:, :, 1:]], dim=2)
    expected = theirs(LTXImageToVideoPipeline, folder, model, start, image=image)
    found = ours(model, noise, pixels)
    assert (found - expected).abs().max() < TOLERANCE
    assert (found[:, :, :1] - first).abs().max() < TOLERANCE


def test_frames_per_second_matter(model: LTX) -> None:
    noise, cond = noise_for(model, VIDEO, 1), model.encode(["a red circle"], VIDEO).positive
    slow = {**cond, "fps": cond["fps"] / 2}
    with torch.no_grad():
        assert (model.predict(noise, 500, dict(cond)) - model.predict(noise, 500, slow)).abs().max() > 1e-4


def test_later_versions_count_time_from_the_first_frame(model: LTX) -> None:
    later = LTX("later", model.denoiser, model.vae, model.text, SCHEDULER, 3, causal_time=True)
    noise, cond = noise_for(model, VIDEO, 1), dict(model.encode(["a red circle"], VIDEO).positive)
    places = LTXConditionPipeline._scale_video_ids(LTXConditionPipeline._prepare_video_ids(1, *noise.shape[2:])).float()
    places[:, 0] /= VIDEO.fps
    with torch.no_grad():
        expected = model.denoiser(
            noise.flatten(2).transpose(1, 2), cond["text"], torch.tensor([500.0]), cond["mask"], video_coords=places
        ).sample.transpose(1, 2)
        assert (later.predict(noise, 500, cond).flatten(2) - expected).abs().max() < 1e-5
        assert (later.predict(noise, 500, cond) - model.predict(noise, 500, cond)).abs().max() > 1e-4


@pytest.mark.parametrize(
    "change",
    [{}, {"shift_terminal": None}, {"time_shift_type": "linear"}, {"use_dynamic_shifting": False, "shift": 3.0}],
)
@pytest.mark.parametrize("tokens", [12, 2000])
def test_spacing_equals_the_scheduler(change: dict[str, Any], tokens: int) -> None:
    config = SCHEDULER | change
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = 0.95 + (2.05 - 0.95) * (tokens - 1024) / (4096 - 1024)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7).tolist(), mu=mu)
    assert np.allclose(dynamic_spacing(config, lambda video: tokens)(7, VIDEO), scheduler.sigmas[:-1], atol=1e-6)


def test_one_step_cannot_end_at_the_terminal_time() -> None:
    with pytest.raises(InputError, match="at least 2"):
        dynamic_spacing(SCHEDULER, lambda video: 12)(1, VIDEO)


LONG = VideoSpec(frames=97, height=32, width=32)


@pytest.mark.parametrize("context", [0, 1, 3])
def test_frames_equal_those_of_the_whole_under_the_same_chunks(folder: Path, context: int) -> None:
    model = ltx.build(Config(folder=str(folder), decode_context=context))
    z = noise_for(model, LONG, 2)
    mean, std = model.vae.latents_mean.view(1, -1, 1, 1, 1), model.vae.latents_std.view(1, -1, 1, 1, 1)
    with torch.no_grad():
        reference = (model.vae.decode(z * std + mean).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
        whole = model.decode(z, range(97))
        part = model.decode(z, [64, 0, 8, 25, 96])
    assert whole.shape == (2, 97, 3, 32, 32)
    assert (part - whole[:, [64, 0, 8, 25, 96]]).abs().max() < 1e-5
    if context == 0:
        assert (whole - reference).abs().max() < 1e-5


def test_more_context_comes_closer_to_the_whole(folder: Path) -> None:
    errors = []
    for context in (0, 1, 4):
        model = ltx.build(Config(folder=str(folder), decode_context=context))
        with torch.no_grad():
            errors.append(model.decode(noise_for(model, LONG, 1), range(97)))
    assert (errors[2] - errors[0]).abs().mean() < (errors[1] - errors[0]).abs().mean()


def test_a_time_conditioned_decoder_gives_equal_frames_in_every_call() -> None:
    vae = tiny_vae(
        timestep_conditioning=True, decoder_inject_noise=(True,) * 5, upsample_residual=(True,) * 4,
        upsample_factor=(1, 1, 1, 1),
    )  # fmt: skip
    text: Any = None
    model = LTX("timed", tiny_transformer(), vae, text, SCHEDULER, 1)
    z, state = noise_for(model, VIDEO, 1), torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model.decode(z, [5]), model.decode(z, [5]))
    assert torch.equal(state, torch.get_rng_state())


def test_gradient_reaches_latents_through_the_network_and_the_decoder(model: LTX) -> None:
    z = noise_for(model, VIDEO, 1).requires_grad_()
    cond = model.encode(["a red circle"], VIDEO).positive
    (gradient,) = torch.autograd.grad(model.decode(model.predict(z, 500, dict(cond)), [3]).mean(), z)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("size", [(8, 64, 64), (9, 40, 64), (9, 64, 1), (0, 64, 64)])
def test_sizes_outside_the_model_are_refused(model: LTX, size: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="multiple of"):
        model.check(VideoSpec(*size))


def test_the_end_of_a_long_prompt_is_told(model: LTX) -> None:
    assert model.truncated("a red circle") == ""
    assert model.truncated("a red " * 80 + "sea").endswith("sea")


# --- original files --------------------------------------------------------------------------

TRANSFORMERS = {
    "ltx 2B": {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28},
    "ltx 13B": {"num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
}


def on_meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("item", TRANSFORMERS)
def test_every_key_of_a_published_transformer_finds_its_place(item: str) -> None:
    shapes = original_shapes(item)
    config = _ltx_keys.transformer_config({key: tuple(shape) for key, shape in shapes.items()}, 32)
    assert {k: config[k] for k in TRANSFORMERS[item]} == TRANSFORMERS[item]
    with torch.device("meta"):
        network = LTXVideoTransformer3DModel(**config)
    found = {key: t.shape for key, t in convert_ltx_transformer_checkpoint_to_diffusers(on_meta(shapes)).items()}
    assert found == {key: t.shape for key, t in network.state_dict().items()}


@pytest.mark.parametrize("item", ["ltx vae 0.9.0", "ltx vae 0.9.1", "ltx vae 0.9.5"])
def test_every_key_of_a_published_autoencoder_finds_its_place(item: str) -> None:
    shapes = original_shapes(item)
    config = _ltx_keys.vae_config({key: tuple(shape) for key, shape in shapes.items()})
    with torch.device("meta"):
        network = AutoencoderKLLTXVideo(**config)
    renamed = convert_ltx_vae_checkpoint_to_diffusers({f"vae.{k}": t for k, t in on_meta(shapes).items()})
    assert {k: t.shape for k, t in renamed.items()} == {k: t.shape for k, t in network.state_dict().items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A transformer with ComfyUI's prefix and a text encoder in files, the autoencoder in a folder."""
    folder = tmp_path_factory.mktemp("files")
    transformer = save_ltx(folder / "ltx.safetensors")
    save_text_file(folder / "text.safetensors", text_encoder(umt5=False))
    whole = save_folder(folder / "whole", {"_class_name": "LTXPipeline"}, SCHEDULER, transformer=transformer,
                        vae=tiny_vae(), text_encoder=text_encoder(umt5=False))  # fmt: skip
    return {
        "folder": str(folder / "ltx.safetensors"), "vae": str(whole / "vae"),
        "text_encoder": str(folder / "text.safetensors"), "tokenizer": str(whole / "tokenizer"),
    }  # fmt: skip


def test_files_give_the_same_model_as_a_folder(files: dict[str, str]) -> None:
    whole, found = ltx.build(Config(folder=str(Path(files["vae"]).parent))), ltx.build(Config(**files))
    assert ltx.matches(Path(files["folder"]))
    assert not ltx.matches(Path(files["text_encoder"]))
    z, cond = noise_for(whole, VIDEO, 1), whole.encode(["a red circle"], VIDEO).positive
    for name, tensor in found.encode(["a red circle"], VIDEO).positive.items():
        assert (tensor - cond[name]).abs().max() < 1e-5
    with torch.no_grad():
        assert (found.predict(z, 700, dict(cond)) - whole.predict(z, 700, dict(cond))).abs().max() < 1e-5
    assert found.process.schedule(5, VIDEO) == whole.process.schedule(5, VIDEO)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae": ""}, "set vae"),
        ({"text_encoder": ""}, "set text_encoder"),
        ({"text_encoder": "absent.safetensors"}, "text encoder is missing"),
    ],
)
def test_what_is_missing_is_one_sentence(files: dict[str, str], change: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        ltx.build(Config(**files | change))
    assert "\n" not in str(caught.value)


def test_a_transformer_with_strange_weights_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    state = load_file(files["folder"])
    save_file({**state, "model.diffusion_model.strange.weight": torch.zeros(1)}, tmp_path / "ltx.safetensors")
    with pytest.raises(InputError, match="unknown"):
        ltx.build(Config(**files | {"folder": str(tmp_path / "ltx.safetensors")}))
