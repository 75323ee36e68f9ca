"""Open-Sora 1.2: parity with the original, every key of the published checkpoints, a whole tiny checkpoint."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_opensora import TINY, repack_as_shards, save_tiny
from torch import Tensor, nn
from vader_nodes.tools.parity import opensora as parity
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.generate import SampleConfig, VideoConfig, generate
from vader_nodes.vader_backend.lora import LoraConfig, applied, attached, export
from vader_nodes.vader_backend.memory.gradient_checkpointing import gradient_checkpointing
from vader_nodes.vader_backend.models import opensora
from vader_nodes.vader_backend.models._opensora_vae import VideoAutoencoder
from vader_nodes.vader_backend.models._stdit3 import Architecture, STDiT3
from vader_nodes.vader_backend.models.opensora import Config, OpenSora, build, clean, sampling_times, scored
from vader_nodes.vader_backend.sampling import guided_prediction
from vader_nodes.vader_backend.types import VideoSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
VIDEO = VideoSpec(frames=34, height=16, width=24, fps=24)
PUBLISHED = VideoSpec(frames=51, height=276, width=368, fps=24)


@pytest.mark.parametrize("item", ["stdit3", "rflow", "rflow_plain", "vae", "vae_plain"])
def test_equals_the_original(item: str) -> None:
    fixture = read(FIXTURES / f"opensora_{item}.json")
    results = compare(fixture, parity.RUN[fixture.item])
    assert results
    assert not [result for result in results if not result[2]]


# --- the published checkpoints, on the meta device -------------------------------------------


def shapes(network: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, list[int]]]:
    with gzip.open(FIXTURES / "opensora_keys.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def test_every_published_weight_has_its_place(published: dict[str, dict[str, list[int]]]) -> None:
    with torch.device("meta"):
        denoiser = STDiT3(Architecture.of(published["transformer"]))
        # the published config.json names its parts, without their sizes
        vae = VideoAutoencoder.from_config({"vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4}})
    for network, keys, count, total in (
        (denoiser, published["transformer"], 973, 1_208_872_772),
        (vae, published["vae"], 517, 393_341_015),
    ):
        assert len(keys) == count
        assert shapes(network) == keys
        assert sum(math.prod(shape) for shape in keys.values()) == total
    assert (denoiser.arch.heads, len(denoiser.blocks)) == (16, 56)
    assert (vae.window, vae.batch, vae.factor, vae.spatial_factor) == (17, 4, 4, 8)


# --- a tiny checkpoint in the published layout -----------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("opensora")
    save_tiny(root)
    return root


@pytest.fixture(scope="module")
def model(original: Path) -> OpenSora:
    return build(Config(folder=str(original)))


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def noise(model: OpenSora, batch: int = 2) -> Tensor:
    return torch.randn(model.latent_shape(VIDEO, batch), generator=torch.Generator().manual_seed(1))


def conditions(model: OpenSora, *prompts: str, **settings: Any) -> dict[str, Tensor]:
    return dict(model.encode(prompts, VIDEO, **settings).positive)


def test_a_folder_is_recognised_and_built(original: Path, model: OpenSora) -> None:
    assert opensora.matches(original)
    assert model.denoiser.arch == TINY
    assert float(model.vae.scale[0, 0]) == pytest.approx(3.85)
    assert not any(p.requires_grad for network in model.parts().values() for p in network.parameters())
    assert model.defaults == opensora.PUBLISHED


def test_latents_of_published_sizes(model: OpenSora) -> None:
    assert model.latent_shape(PUBLISHED, 2) == (2, 4, 15, 34, 46)
    assert model.latent_shape(VideoSpec(102, 240, 426), 1) == (1, 4, 30, 30, 53)
    assert model.latent_shape(VideoSpec(1, 512, 512), 1) == (1, 4, 1, 64, 64)
    for frames, size in ((51, (276, 368)), (102, (240, 426)), (1, (512, 512)), (17, (16, 16))):
        model.check(VideoSpec(frames, *size))


@pytest.mark.parametrize("size", [(51, 65, 64), (51, 64, 1), (0, 64, 64), (16, 64, 64), (24, 64, 64)])
def test_sizes_outside_the_model_are_refused(model: OpenSora, size: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="multiple of"):
        model.check(VideoSpec(*size))


# --- the flow --------------------------------------------------------------------------------


def test_times_of_the_published_size(original: Path, model: OpenSora) -> None:
    assert opensora.time_shift(PUBLISHED) == pytest.approx(2.411, abs=5e-4)
    assert sampling_times(30, PUBLISHED)[0] == 1
    rounded = build(Config(folder=str(original), bf16_times=True))
    for built, last in ((model, 76.75), (rounded, 76.62)):
        assert built.process.schedule(30, PUBLISHED).timesteps[-1] == pytest.approx(last, abs=0.01)


@pytest.mark.parametrize("frames", [0, 2, 16, -17])
def test_lengths_without_a_clip_are_refused(model: OpenSora, frames: int) -> None:
    with pytest.raises(InputError, match=f"frames is {frames}; .*multiple of 17 frames, such as 51"):
        model.process.schedule(30, VideoSpec(frames, 64, 64))


# --- text ------------------------------------------------------------------------------------


def test_prompts_are_cleaned_and_scored() -> None:
    assert clean("  A &amp;amp; B\n see https://example.com/a?b=c NOW ") == "a & b see now"
    assert scored("A dog.") == "a dog. aesthetic score: 6.5."
    assert scored("A dog. Aesthetic score: 4.0.") == "a dog. aesthetic score: 4.0."


def test_the_null_text_stands_under_the_mask_of_the_prompt(model: OpenSora) -> None:
    cond = model.encode(["a red circle", "a cat"], VIDEO)
    lengths = [len(f"_{scored(prompt)}") + 1 for prompt in ("a red circle", "a cat")]
    assert cond.positive["mask"].sum(1).tolist() == lengths
    assert torch.equal(cond.negative["mask"], cond.positive["mask"])
    for row in cond.negative["text"]:
        assert torch.equal(row, model.denoiser.y_embedder.y_embedding)
    for part in (cond.positive, cond.negative):
        assert [part[name].tolist() for name in ("fps", "height", "width")] == [[24, 24], [16, 16], [24, 24]]
        assert all(len(tensor) == 2 for tensor in part.values())


def test_a_negative_prompt_replaces_the_null_text(model: OpenSora) -> None:
    cond = model.encode(["a red circle", "a cat"], VIDEO, negative="Blurry")
    assert cond.negative["mask"].sum(1).tolist() == [8, 8]
    alone = model.text.encode(["blurry"], hide_padding=True)[0]
    assert torch.equal(cond.negative["text"], alone.expand(2, -1, -1))


def test_the_text_is_encoded_as_if_alone(model: OpenSora) -> None:
    ids = [*model.text.tokenizer.ids(scored("A cat")), 1]
    with torch.no_grad():
        alone = model.text.encoder(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(conditions(model, "A cat")["text"][:, : len(ids)], alone)


def test_padding_has_no_part(model: OpenSora) -> None:
    cond = conditions(model, "a red circle")
    other = {**cond, "text": torch.where(cond["mask"][..., None] == 1, cond["text"], 9.0)}
    seen = {**cond, "mask": torch.ones_like(cond["mask"])}
    z = noise(model, 1)
    with torch.no_grad():
        expected = model.predict(z, 500, cond)
        assert torch.equal(model.predict(z, 500, other), expected)
        assert (model.predict(z, 500, seen) - expected).abs().max() > 1e-4


def test_the_end_of_a_long_prompt_is_told(model: OpenSora) -> None:
    assert model.truncated("A red circle") == ""
    assert model.truncated("moving left and " * 20 + "Omega").endswith("omega")


# --- network and decoder ---------------------------------------------------------------------


def test_samples_do_not_mix_and_guidance_is_one_batch(model: OpenSora) -> None:
    z = noise(model)
    cond = model.encode(["a red circle", "a blue cross and more"], VIDEO)
    with torch.no_grad():
        both = model.predict(z, 300, dict(cond.positive))
        alone = model.predict(z[1:], 300, dict(cond.select([1]).positive))
        null = model.predict(z, 300, dict(cond.negative))
        guided = guided_prediction(model, z, 300, cond, 7.0)
    torch.testing.assert_close(both[1:], alone)
    torch.testing.assert_close(guided, null + 7 * (both - null), rtol=1e-4, atol=1e-4)
    assert both.shape == z.shape
    assert both.dtype == torch.float32


def test_the_parts_are_wired_to_the_networks_ranges(model: OpenSora) -> None:
    z, cond, video = noise(model, 1), conditions(model, "a"), torch.rand(1, 17, 3, 16, 24)
    order = [cond[name] for name in ("text", "mask", "fps", "height", "width")]
    with torch.no_grad():
        velocity = model.predict(z, 300, cond)
        torch.testing.assert_close(velocity, model.denoiser(z, torch.tensor([300.0]), *order)[:, :4])
        pixels = model.vae.decode(z, [20])[:, :, 0] / 2 + 0.5
        torch.testing.assert_close(model.decode(z, [20])[:, 0], pixels.clamp(0, 1))
        torch.testing.assert_close(model.encode_video(video), model.vae.encode(video.transpose(1, 2) * 2 - 1))
    torch.testing.assert_close(model.process.split(z, velocity, 0.7, 0.3)[0], z + 0.3 * velocity)  # v = x0 - noise


@pytest.mark.parametrize("change", [{"fps": 8.0}, {"height": 64}, {"width": 64}])
def test_what_the_network_is_told_matters(model: OpenSora, change: dict[str, float]) -> None:
    z, cond = noise(model), conditions(model, "a", "b")
    with torch.no_grad():
        other = {**cond, **{name: torch.full_like(cond[name], value) for name, value in change.items()}}
        assert (model.predict(z, 300, other) - model.predict(z, 300, cond)).abs().max() > 1e-4


def test_frames_decoded_alone_are_the_frames_of_the_whole(model: OpenSora) -> None:
    z = noise(model)
    with torch.no_grad():
        whole = model.decode(z, range(34))
        part = model.decode(z, [20, 3, 33, 3])
    assert whole.shape == (2, 34, 3, 16, 24)
    assert 0 <= whole.min() < whole.max() <= 1
    torch.testing.assert_close(part, whole[:, [20, 3, 33, 3]])


def test_only_what_holds_the_frames_is_decoded(model: OpenSora) -> None:
    z = noise(model).requires_grad_()
    (gradient,) = torch.autograd.grad(model.vae.decode(z, [20]).square().mean(), z)
    assert gradient[:, :, 5:7].abs().sum(dim=(1, 2, 3, 4)).min() > 0
    assert not gradient[:, :, :5].any()  # the window before
    seen: list[int] = []
    decoders = (model.vae.temporal_vae.decoder, model.vae.spatial_vae["module"].decoder)
    hooks = [decoder.register_forward_hook(lambda _, given, out: seen.append(len(out))) for decoder in decoders]
    with torch.no_grad():
        model.decode(z, [20, 33])
    for hook in hooks:
        hook.remove()
    assert seen == [2, 4]  # one window, then two frames, of both samples


def test_an_image_is_a_video_of_one_frame(model: OpenSora) -> None:
    image = VideoSpec(1, 16, 24)
    z = torch.randn(model.latent_shape(image, 1))
    with torch.no_grad():
        assert model.decode(z, [0]).shape == (1, 1, 3, 16, 24)
        assert model.encode_video(torch.rand(1, 1, 3, 16, 24)).shape == z.shape


def test_a_video_is_encoded_to_its_latents(model: OpenSora) -> None:
    video = torch.rand(2, 34, 3, 16, 24)
    latents = model.encode_video(video)
    assert latents.shape == model.latent_shape(VIDEO, 2)
    torch.testing.assert_close(model.encode_video(video[:, 17:]), latents[:, :, 5:])


def test_gradient_reaches_latents_through_the_network_and_the_decoder(model: OpenSora) -> None:
    z = noise(model).requires_grad_()
    frame = model.vae.decode(model.predict(z, 500, conditions(model, "a", "b")), [20])
    (gradient,) = torch.autograd.grad(frame.square().mean(), z)
    assert gradient.isfinite().all()
    assert gradient.abs().sum(dim=(1, 3, 4)).min() > 0  # every frame of every sample, through temporal attention


def test_checkpointing_leaves_the_gradients_equal(model: OpenSora) -> None:
    z, cond = noise(model), conditions(model, "a", "b")

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model.predict(z, 500, cond).square().mean(), list(parameters.values())))

    with attached(model, LoraConfig(rank=2, alpha=2.0, dropout=0.0), seed=0) as parameters:
        for parameter in parameters.values():
            parameter.data.normal_(std=0.2)
        plain = gradients()
        with gradient_checkpointing(model):
            checkpointed = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert all(gradient.any() for gradient in plain)


def test_lora_goes_on_the_published_layers_and_comes_back(model: OpenSora) -> None:
    z, cond = noise(model), conditions(model, "a", "b")
    with attached(model, LoraConfig(rank=2, alpha=2.0, dropout=0.0), seed=0) as parameters, torch.no_grad():
        modules = {name.rpartition(".lora_")[0] for name in parameters}
        for parameter in parameters.values():
            parameter.normal_(std=0.2)
        expected = model.predict(z, 500, cond)
        lora = export(model, dict(parameters), 1.0, {})
    assert modules == {
        f"{kind}_blocks.{n}.{layer}"
        for kind in ("spatial", "temporal")
        for n in range(TINY.depth)
        for layer in ("attn.qkv", "cross_attn.q_linear", "cross_attn.kv_linear")
    }
    with applied(model, lora), torch.no_grad():
        torch.testing.assert_close(model.predict(z, 500, cond), expected)
    with torch.no_grad():
        assert (model.predict(z, 500, cond) - expected).abs().max() > 1e-3


def test_sampling_from_prompt_to_video(model: OpenSora) -> None:
    video = generate(model, ["a red circle"], SampleConfig(steps=2), VideoConfig(frames=17, height=16, width=24))
    assert video.shape == (1, 17, 3, 16, 24)
    assert video.isfinite().all()


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_held_in_the_chosen_precision(original: Path, model: OpenSora, dtype: str) -> None:
    half = build(Config(folder=str(original), dtype=dtype))
    for name in ("denoiser", "vae"):
        assert {p.dtype for p in half.parts()[name].parameters()} == {getattr(torch, dtype)}
    z = noise(model)
    with torch.no_grad():
        prediction = half.predict(z, 500, conditions(half, "a", "b"))
        expected = model.predict(z, 500, conditions(model, "a", "b"))
        assert half.decode(z, [0]).dtype == torch.float32
    assert prediction.dtype == torch.float32
    torch.testing.assert_close(prediction, expected, rtol=0.1, atol=0.1)


def test_the_text_encoder_may_be_pickled_shards(copy: Path, model: OpenSora) -> None:
    repack_as_shards(copy)
    loaded = build(Config(folder=str(copy)))
    torch.testing.assert_close(conditions(loaded, "a red circle"), conditions(model, "a red circle"))


def test_the_published_sentencepiece_model_is_read_beside_the_text_encoder(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    (copy / "text_encoder" / "spiece.model").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"install sentencepiece|tokenizer .* cannot be read"):
        build(Config(folder=str(copy)))
    processor = pytest.importorskip("sentencepiece")
    lines = iter(["a red circle and a blue cross. aesthetic score: 6.5."] * 20)
    with (copy / "text_encoder" / "spiece.model").open("wb") as file:
        processor.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=30, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            hard_vocab_limit=False,
        )  # fmt: skip
    text = build(Config(folder=str(copy))).text
    ids = text.tokenizer.ids("a red cross")
    assert (text.tokenizer.text(ids), text.tokenizer.end, text.tokenizer.pad) == ("a red cross", 1, 0)


def truncate(folder: Path) -> None:
    file = folder / "transformer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def exchange(folder: Path) -> None:
    shutil.copy(folder / "vae" / "model.safetensors", folder / "transformer" / "model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no folder transformer; put the files of hpcai-tech/OpenSora-STDiT-v3 into"),
    "no autoencoder": (lambda folder: shutil.rmtree(folder / "vae"), "hpcai-tech/OpenSora-VAE-v1.2"),
    "no text encoder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "DeepFloyd/t5-v1_1-xxl"),
    "no text weights": (lambda folder: (folder / "text_encoder/model.safetensors").unlink(), "holds no weights"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is missing: put spiece.model of"),
    "no configuration": (lambda folder: (folder / "vae/config.json").unlink(), "autoencoder's configuration"),
    "broken configuration": (
        lambda folder: (folder / "vae/config.json").write_text("["),
        "autoencoder's configuration",
    ),
    "no weights": (lambda folder: (folder / "vae/model.safetensors").unlink(), "autoencoder is missing"),
    "truncated": (truncate, "denoiser .* cannot be read"),
    "foreign": (exchange, "denoiser .* cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence(copy: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    change(copy)
    with pytest.raises(InputError, match=words) as caught:
        build(Config(folder=str(copy)))
    assert "\n" not in str(caught.value)


def test_other_folders_are_not_claimed(copy: Path) -> None:
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps({"architectures": ["STDiT3"]}))
    assert opensora.matches(copy)
    for content in ('{"_class_name": "WanTransformer3DModel"}', "[]", "{"):
        config.write_text(content)
        assert not any(map(opensora.matches, (copy, copy / "absent", config)))
