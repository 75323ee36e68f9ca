"""Stable Video Diffusion: parity with the original and with diffusers' pipeline, from either layout."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_svd import SCHEDULER, Original, original_checkpoint, tiny_networks, tiny_pipeline
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from vader_nodes.tools.parity import svd as parity
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.generate import guidance_scale
from vader_nodes.vader_backend.models import _svd_keys as keys
from vader_nodes.vader_backend.models import svd
from vader_nodes.vader_backend.models._svd_original import build_image_encoder, build_unet, build_vae
from vader_nodes.vader_backend.models.svd import Config, StableVideoDiffusion, build
from vader_nodes.vader_backend.process import EDM
from vader_nodes.vader_backend.sampling import GradPlan, sample
from vader_nodes.vader_backend.types import Conditioning, VideoSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
VIDEO = VideoSpec(frames=5, height=16, width=24, fps=7)
NETWORKS = {"unet": "denoiser", "vae": "vae", "image_encoder": "image_encoder"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return tiny_networks()


@pytest.fixture(scope="module")
def folder(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("svd")
    tiny_pipeline(networks).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> StableVideoDiffusion:
    assert svd.matches(folder)
    return build(Config(folder=str(folder)))


@pytest.fixture(scope="module")
def checkpoint(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "svd_xt.safetensors"
    save_file(original_checkpoint(networks), path)
    return path


def pictures(count: int, height: int = 16, width: int = 24) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(count)]


def pixels(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def published() -> dict[str, Any]:
    """Names of the weights of svd.safetensors by part; those of the UNet with their shapes."""
    return dict(json.loads(gzip.decompress((FIXTURES / "svd_keys.json.gz").read_bytes())))


# --- the original layout ---------------------------------------------------------------------


def test_unet_equals_the_original_implementation() -> None:
    results = compare(read(FIXTURES / "svd_unet.safetensors"), parity.unet)
    assert {name for name, _, _ in results} == {"out", "out_mixed", "out_ctx3"}
    assert all(ok for _, _, ok in results), results


def test_every_weight_of_the_published_unet_is_used() -> None:
    listed = published()
    tensors = {key: torch.empty(shape, device="meta") for key, shape in listed["unet"].items()}
    unet = build_unet(keys.section(tensors, keys.UNET), torch.float32, Path("svd.safetensors"))
    assert sum(parameter.numel() for parameter in unet.parameters()) == listed["n_params"] == 1_524_623_082
    assert len(unet.state_dict()) == len(tensors) == 1428
    assert list(unet.config.num_attention_heads) == [5, 10, 20, 20]

    modules = [name for name, module in unet.named_modules() if isinstance(getattr(module, "weight", None), Tensor)]
    theirs = [keys.unet_key(name) for name in modules]
    assert len(set(theirs)) == len(modules)
    assert {f"{keys.UNET}{name}.weight" for name in theirs} <= set(tensors)
    targets = [n for n, m in unet.named_modules() if ".attentions." in n and isinstance(m, nn.Linear)]
    assert len(targets) == 416
    adapted = [name for name in targets if name.endswith(tuple(f".{t}" for t in StableVideoDiffusion.lora_targets))]
    assert len(adapted) == 256


def test_comfy_names_are_those_of_its_table() -> None:
    for ours, theirs in {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2": "input_blocks.8.1.transformer_blocks.0.ff.net.2",
        "up_blocks.3.attentions.2.temporal_transformer_blocks.0.ff.net.2": "output_blocks.11.1.time_stack.0.ff.net.2",
        "mid_block.attentions.0.time_pos_embed.linear_2": "middle_block.1.time_pos_embed.2",
    }.items():
        assert keys.unet_key(ours) == theirs


def test_autoencoder_and_image_encoder_equal_a_second_implementation(checkpoint: Path) -> None:
    tensors, model = load_file(checkpoint), build(Config(folder=str(checkpoint)))
    merged = {f"vae.{key}": value for key, value in keys.section(tensors, keys.CONDITIONING_VAE).items()}
    merged |= {f"vae.{key}": value for key, value in keys.section(tensors, keys.VAE).items()}
    reference = Original(merged, "vae.")
    images, z = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(5, 4, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(model.vae.encode(images).latent_dist.mean, reference.encode(images))
        decoded = model.vae.decode(z, num_frames=5).sample
        torch.testing.assert_close(decoded, reference.decode(z), rtol=1e-4, atol=1e-4)
        pictures_ = torch.randn(2, 3, 224, 224)
        embedded = Original(tensors, keys.IMAGE_ENCODER).embed(pictures_)
        torch.testing.assert_close(model.image_encoder(pictures_).image_embeds, embedded, rtol=1e-4, atol=1e-5)


def test_the_published_autoencoder_and_image_encoder_have_these_names() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2
        )
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                             patch_size=14, projection_dim=1024)
        )  # fmt: skip
    listed = published()
    tensors = original_checkpoint({"vae": vae, "image_encoder": image_encoder})
    assert {key for key in tensors if key.startswith(keys.VAE)} == set(listed["vae_decoder"])
    assert {key for key in tensors if key.startswith(keys.CONDITIONING_VAE)} == set(listed["vae_encoder"])
    assert {key for key in tensors if key.startswith(keys.IMAGE_ENCODER)} == set(listed["image_encoder"])
    again = build_vae(keys.vae_tensors(tensors), torch.float32, Path("svd"))
    assert shapes(again) == shapes(vae)
    tower = keys.section(tensors, keys.IMAGE_ENCODER)
    assert shapes(build_image_encoder(tower, torch.float32, Path("svd"))) == shapes(image_encoder)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_an_original_file_gives_the_same_networks(networks: dict[str, Any], checkpoint: Path) -> None:
    assert svd.matches(checkpoint)
    model = build(Config(folder=str(checkpoint)))
    for name, network in networks.items():
        found = model.parts()[NETWORKS[name]].state_dict()
        assert found.keys() == network.state_dict().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in network.state_dict().items()), name
    assert model.defaults.video == VideoSpec(25, 576, 1024, 7.0)
    assert model.process.schedule(3, VIDEO).sigma[0] == pytest.approx(700)


def test_a_file_without_the_second_encoder_uses_the_first(networks: dict[str, Any], tmp_path: Path) -> None:
    tensors = original_checkpoint(networks)
    moved = {key.replace(keys.CONDITIONING_VAE, keys.VAE): v for key, v in tensors.items() if "quant_conv" not in key}
    save_file(moved, tmp_path / "svd.safetensors")
    model = build(Config(folder=str(tmp_path / "svd.safetensors")))
    image = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        moments = networks["vae"].encoder(image * 2 - 1)
        latents = model.encode_video(image[:, None])[:, :, 0]
    torch.testing.assert_close(latents, moments.chunk(2, dim=1)[0] * 0.18215)
    assert model.defaults.video.frames == 14


@pytest.mark.parametrize("lost", [keys.UNET, keys.VAE, keys.IMAGE_ENCODER])
def test_a_file_that_lacks_a_part_is_refused(checkpoint: Path, tmp_path: Path, lost: str) -> None:
    tensors = {key: value for key, value in load_file(checkpoint).items() if not key.startswith(lost)}
    save_file(tensors, tmp_path / "svd.safetensors")
    assert svd.matches(tmp_path / "svd.safetensors") == (lost != keys.UNET)
    with pytest.raises(InputError, match="not the whole checkpoint"):
        build(Config(folder=str(tmp_path / "svd.safetensors")))


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (keys.UNET + "middle_block.3.weight", (1,), "unknown"),
        (keys.UNET + "label_emb.0.0.weight", (256, 25), "three equal parts"),
        (keys.VAE + "post_quant_conv.weight", (4, 4, 1, 1), "unknown"),
        (keys.VAE + "decoder.mid.block_1.conv1.weight", (64, 64, 1, 1), "of another shape"),
    ],
)
def test_a_file_of_another_architecture_is_refused(
    checkpoint: Path, tmp_path: Path, key: str, shape: tuple[int, ...], words: str
) -> None:
    save_file({**load_file(checkpoint), key: torch.zeros(shape)}, tmp_path / "svd.safetensors")
    with pytest.raises(InputError, match=words):
        build(Config(folder=str(tmp_path / "svd.safetensors")))


def test_other_folders_and_files_do_not_match(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({keys.UNET + "label_emb.0.0.weight": torch.zeros(4, 3)}, tmp_path / "sdxl.safetensors")
    assert not any(svd.matches(path) for path in (tmp_path, tmp_path / "gone", *tmp_path.glob("*.safetensors")))


@pytest.mark.parametrize("lost", ["unet", "vae", "image_encoder", "scheduler", "feature_extractor"])
def test_a_folder_that_lacks_a_part_is_refused(folder: Path, tmp_path: Path, lost: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / lost)
    with pytest.raises(InputError):
        build(Config(folder=str(copy)))


# --- the process -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_noise_levels_are_those_of_the_scheduler(steps: int) -> None:
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    schedule = EDM(svd.sigma_spacing(SCHEDULER)).schedule(steps, VIDEO)
    torch.testing.assert_close(torch.tensor(schedule.sigma), scheduler.sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(schedule.timesteps), scheduler.timesteps, rtol=1e-5, atol=1e-6)
    assert schedule.start == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)


class Closed:
    """A denoiser in closed form; what it sees is the scaled latent."""

    process = EDM(svd.sigma_spacing(SCHEDULER))

    def predict(self, z: Tensor, t: float, cond: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(z) * (1 + float(t)) + cond["shift"]


def test_sampling_equals_the_scheduler_step_by_step() -> None:
    noise, shift = (
        torch.randn(2, 4, 3, 2, 2, dtype=torch.float64),
        torch.full((2, 1, 1, 1, 1), 0.3, dtype=torch.float64),
    )
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(6)
    z = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = Closed().predict(scheduler.scale_model_input(z, t), t, {"shift": shift})
        z = scheduler.step(prediction, t, z).prev_sample
    cond = Conditioning({"shift": shift}, {"shift": shift})
    ours = sample(Closed(), noise, cond, Closed.process.schedule(6, VIDEO), GradPlan.none(6))
    # The scheduler itself computes in float32, from a standard deviation of 700 down.
    torch.testing.assert_close(ours.latents, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "epsilon"},
        {"timestep_type": "discrete"},
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": False},
        {"sigma_max": None},
        {"final_sigmas_type": "sigma_min"},
    ],
)
def test_other_schedulers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="scheduler"):
        svd.sigma_spacing({**SCHEDULER, **change})


# --- the pipeline ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 24), (300, 500), (224, 90)])
def test_image_embedding_equals_the_pipelines(
    networks: dict[str, Any], model: StableVideoDiffusion, size: tuple[int, int]
) -> None:
    images = pictures(2, *size)
    theirs = tiny_pipeline(networks)._encode_image(images, "cpu", 1, True)
    cond = model.encode(["", ""], VIDEO, images=pixels(images))
    for ours, reference in zip((cond.negative, cond.positive), theirs.chunk(2), strict=True):
        torch.testing.assert_close(ours["image"], reference, rtol=0, atol=1e-4)


def test_latents_equal_the_pipelines(networks: dict[str, Any], model: StableVideoDiffusion) -> None:
    images, steps = pictures(2), 4
    noise = torch.randn(model.latent_shape(VIDEO, 2), generator=torch.Generator().manual_seed(1))
    theirs = tiny_pipeline(networks)(
        images, height=16, width=24, num_frames=5, num_inference_steps=steps, latents=noise.transpose(1, 2),
        generator=torch.Generator().manual_seed(2), output_type="latent",
    ).frames  # fmt: skip
    cond = model.encode(["", ""], VIDEO, images=pixels(images), rng=torch.Generator().manual_seed(2))
    guidance = guidance_scale(model, 0.0, VIDEO)
    assert isinstance(guidance, Tensor)
    assert guidance.flatten().tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    schedule = model.process.schedule(steps, VIDEO)
    ours = sample(model, noise, cond, schedule, GradPlan.none(steps), guidance=guidance).latents
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=1e-4, atol=2e-4)

    flat = sample(model, noise, cond, schedule, GradPlan.none(steps), guidance=3.0).latents
    assert (flat - theirs.transpose(1, 2)).abs().max() > 0.01, "the guidance per frame has no effect here"


def test_images_without_rng_get_the_same_noise_in_every_batch(model: StableVideoDiffusion) -> None:
    images = pixels(pictures(2))
    both = model.encode(["", ""], VIDEO, images=images).positive["image_latents"]
    alone = model.encode([""], VIDEO, images=images[1:]).positive["image_latents"]
    torch.testing.assert_close(both[1:], alone)
    other = model.encode(["", ""], VIDEO, images=images, rng=torch.Generator().manual_seed(5))
    assert not torch.allclose(other.positive["image_latents"], both)


def test_conditioning_is_batch_first_and_zero_in_the_negative_branch(model: StableVideoDiffusion) -> None:
    cond = model.encode(["", "", ""], VIDEO, images=torch.rand(3, 3, 40, 40))
    assert {name: tuple(tensor.shape) for name, tensor in cond.positive.items()} == {
        "image": (3, 1, 16), "image_latents": (3, 4, 1, 8, 12), "time_ids": (3, 3)
    }  # fmt: skip
    assert not cond.negative["image"].any()
    assert not cond.negative["image_latents"].any()
    assert cond.negative["time_ids"].tolist() == cond.positive["time_ids"].tolist()
    assert cond.positive["time_ids"][0].tolist() == pytest.approx([6, 127, 0.02])


def test_wrong_inputs_are_told(model: StableVideoDiffusion) -> None:
    with pytest.raises(InputError, match="from images"):
        model.encode(["a cat"], VIDEO)
    with pytest.raises(InputError, match="2 start images for 1"):
        model.encode(["a cat"], VIDEO, images=torch.rand(2, 3, 16, 24))
    with pytest.raises(InputError, match="reads no text"):
        model.encode(["a cat"], VIDEO, images=torch.rand(1, 3, 16, 24), negative="a dog")
    with pytest.raises(InputError, match="multiple of 4"):
        model.check(VideoSpec(5, 18, 24))
    model.check(VIDEO)


# --- decoding --------------------------------------------------------------------------------


def test_decoding_equals_the_pipelines(networks: dict[str, Any], model: StableVideoDiffusion) -> None:
    z = torch.randn(2, 4, 5, 8, 12)
    theirs = torch.cat([tiny_pipeline(networks).decode_latents(v[None], 5, 5) for v in z.transpose(1, 2)])
    ours = model.decode(z, range(5))
    torch.testing.assert_close(ours, (theirs.transpose(1, 2) / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(model.decode(z, [3, 1]), ours[:, [3, 1]])


def test_a_frame_comes_from_its_whole_chunk(folder: Path, model: StableVideoDiffusion) -> None:
    chunked = build(Config(folder=str(folder), decode_chunk=2))
    z = torch.randn(1, 4, 5, 8, 12)
    whole = chunked.decode(z, range(5))
    for frames in ([0], [3], [4], [4, 0, 3]):
        torch.testing.assert_close(chunked.decode(z, frames), whole[:, frames])
    torch.testing.assert_close(whole[:, 2:4], model.decode(z[:, :, 2:4], range(2)))
    seam, alone = (
        float((model.decode(z, [3]) - other).abs().max()) for other in (whole[:, 3:4], model.decode(z[:, :, 3:4], [0]))
    )
    assert min(seam, alone) > 0.05, (
        f"a frame of a chunk of 2 is off by {seam:.3f}, a frame decoded alone by {alone:.3f}"
    )


def test_decoding_is_differentiable_in_its_chunk_only(folder: Path) -> None:
    model = build(Config(folder=str(folder), decode_chunk=2))
    z = torch.randn(1, 4, 5, 8, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.decode(z, [3]).square().mean(), z)
    assert [bool(gradient[:, :, t].any()) for t in range(5)] == [False, False, True, True, False]
    assert gradient.isfinite().all()


def test_half_precision_encodes_in_full_precision(folder: Path, model: StableVideoDiffusion) -> None:
    half = build(Config(folder=str(folder), dtype="float16"))
    video = torch.rand(1, 2, 3, 16, 24)
    torch.testing.assert_close(half.encode_video(video), model.encode_video(video), rtol=0.05, atol=0.01)
    assert half.vae.dtype == torch.float16
    assert half.encode_video(video).dtype == torch.float32


def test_gradient_reaches_latents_through_network_and_decoder(model: StableVideoDiffusion) -> None:
    cond = model.encode(["", ""], VIDEO, images=torch.rand(2, 3, 16, 24))
    z = torch.randn(model.latent_shape(VIDEO, 2), requires_grad=True)
    prediction = model.predict(z, 0.5, dict(cond.positive))
    assert prediction.shape == z.shape
    assert prediction.dtype == torch.float32
    (gradient,) = torch.autograd.grad(model.decode(prediction, [0])[1].mean(), z)
    assert not gradient[0].any()
    assert gradient[1].any()
