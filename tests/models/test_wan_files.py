"""Wan's original files: every published key finds its place, and files give what a folder gives."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    WanTransformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from tiny_files import save_image_encoder, save_wan, wan_names, wan_vae_names
from tiny_flow import original_shapes, original_state, save_folder, save_text_file, text_encoder
from tiny_wan import EULER, VIDEO, noise_for, picture, tiny_transformer, tiny_vae, tiny_vae_2_2
from torch import Tensor
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.models import _t5, _wan_keys, wan
from vader_nodes.vader_backend.models._clip_image import CLIPImage
from vader_nodes.vader_backend.models._flow import static_spacing
from vader_nodes.vader_backend.models.wan import Config, Wan
from vader_nodes.vader_backend.types import VideoSpec

TRANSFORMERS = {
    "wan2.1 t2v 1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan2.1 i2v 14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 36,
                       "image_dim": 1280, "added_kv_proj_dim": 5120},
    "wan2.2 ti2v 5B": {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48,
                       "out_channels": 48},
}  # fmt: skip


def on_meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("item", TRANSFORMERS)
def test_every_key_of_a_published_transformer_finds_its_place(item: str) -> None:
    shapes = original_shapes(item)
    config = _wan_keys.transformer_config({key: tuple(shape) for key, shape in shapes.items()})
    assert {k: config[k] for k in TRANSFORMERS[item]} == TRANSFORMERS[item]
    with torch.device("meta"):
        network = WanTransformer3DModel(**config)
    found = {key: t.shape for key, t in convert_wan_transformer_to_diffusers(on_meta(shapes)).items()}
    assert found == {key: t.shape for key, t in network.state_dict().items()}


@pytest.mark.parametrize("item", ["wan2.1 vae", "wan2.2 vae"])
def test_every_key_of_a_published_autoencoder_finds_its_place(item: str) -> None:
    shapes = original_shapes(item)
    config = _wan_keys.vae_config({key: tuple(shape) for key, shape in shapes.items()})
    with torch.device("meta"):
        network = AutoencoderKLWan(**config)
    newer = item == "wan2.2 vae"
    assert config.get("is_residual", False) is newer
    tensors = on_meta(shapes)
    renamed = {_wan_keys.vae_key(k): t for k, t in tensors.items()} if newer else convert_wan_vae_to_diffusers(tensors)
    assert {k: t.shape for k, t in renamed.items()} == {k: t.shape for k, t in network.state_dict().items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A transformer with ComfyUI's prefix, an autoencoder and a text encoder, each in a file of its own."""
    folder = tmp_path_factory.mktemp("files")
    transformer = save_wan(folder / "wan.safetensors")
    save_file(original_state(tiny_vae(), wan_vae_names("wan2.1 vae")), folder / "vae.safetensors")
    save_text_file(folder / "text.safetensors", text_encoder(umt5=True))
    whole = save_folder(folder / "whole", {"_class_name": "WanPipeline"}, EULER, transformer=transformer,
                        vae=tiny_vae(), text_encoder=text_encoder(umt5=True))  # fmt: skip
    return {
        "folder": str(folder / "wan.safetensors"), "vae": str(folder / "vae.safetensors"),
        "text_encoder": str(folder / "text.safetensors"), "tokenizer": str(whole / "tokenizer"),
    }  # fmt: skip


def assert_equal(found: Wan, expected: Wan, tolerance: float = 1e-5) -> None:
    z = noise_for(expected, VIDEO, 1)
    cond = expected.encode(["a red circle"], VIDEO).positive
    assert (found.encode(["a red circle"], VIDEO).positive["text"] - cond["text"]).abs().max() <= tolerance
    with torch.no_grad():
        assert (found.predict(z, 700, dict(cond)) - expected.predict(z, 700, dict(cond))).abs().max() <= tolerance
        assert (found.decode(z, [5]) - expected.decode(z, [5])).abs().max() <= tolerance


def test_files_give_the_same_model_as_a_folder(files: dict[str, str]) -> None:
    whole = wan.build(Config(folder=str(Path(files["tokenizer"]).parent)))
    assert wan.matches(Path(files["folder"]))
    assert not wan.matches(Path(files["vae"]))
    found = wan.build(Config(**files))
    assert_equal(found, whole)
    expected = static_spacing({"use_flow_sigmas": True, "flow_shift": 3.0})(5, VIDEO)
    assert found.process.schedule(5, VIDEO).sigma[:-1] == tuple(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision_is_held_as_from_a_folder(files: dict[str, str], dtype: str) -> None:
    whole = wan.build(Config(folder=str(Path(files["tokenizer"]).parent), dtype=dtype))
    found = wan.build(Config(**files, dtype=dtype))
    for name in ("denoiser", "text_encoder", "vae"):
        expected = {key: t.dtype for key, t in whole.parts()[name].state_dict().items()}
        assert {key: t.dtype for key, t in found.parts()[name].state_dict().items()} == expected
    assert_equal(found, whole)


def test_an_image_to_video_model_is_read_from_files(files: dict[str, str], tmp_path: Path) -> None:
    transformer = save_wan(tmp_path / "i2v.safetensors", images=True)
    encoder = save_image_encoder(tmp_path / "clip.safetensors")
    settings = files | {
        "folder": str(tmp_path / "i2v.safetensors"),
        "image_encoder": str(tmp_path / "clip.safetensors"),
    }
    found = wan.build(Config(**settings))
    video = VideoSpec(5, 32, 32)
    pixels = picture(video)[1]
    cond = found.encode(["a red circle"], video, images=pixels).positive
    expected = CLIPImage(encoder).encode(pixels)
    assert cond["image"].shape == (1, 5, 160)
    assert (cond["image"] - expected).abs().max() < 1e-5
    z = noise_for(found, video, 1)
    with torch.no_grad():
        prediction = found.predict(z, 300, dict(cond))
        inputs = torch.cat([z, cond["image_latents"]], dim=1)
        reference = transformer(inputs, torch.tensor([300.0]), cond["text"], expected).sample
    assert (prediction - reference).abs().max() < 1e-5
    with pytest.raises(InputError, match="set image_encoder"):
        wan.build(Config(**settings | {"image_encoder": ""}))
    with pytest.raises(InputError, match="no CLIP"):
        wan.build(Config(**settings | {"image_encoder": files["vae"]}))


def test_half_of_a_two_expert_model_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    transformer = tiny_transformer(head_dim=128, num_attention_heads=1, in_channels=36)
    save_file(original_state(transformer, wan_names("wan2.1 t2v 1.3B", 2)), tmp_path / "high.safetensors")
    with pytest.raises(InputError, match="half of"):
        wan.build(Config(**files | {"folder": str(tmp_path / "high.safetensors")}))


@pytest.mark.parametrize(("channels", "images"), [(48, True), (32, True), (32, False), (52, False)])
def test_a_variant_for_control_is_refused(files: dict[str, str], tmp_path: Path, channels: int, images: bool) -> None:
    """48 channels with images: Wan 2.1 Fun Control, which is no Wan 2.2 5B."""
    image = {"image_dim": 160, "added_kv_proj_dim": 128} if images else {}
    transformer = tiny_transformer(head_dim=128, num_attention_heads=1, in_channels=channels, **image)
    names = wan_names("wan2.1 i2v 14B" if images else "wan2.1 t2v 1.3B", 2)
    save_file(original_state(transformer, names), tmp_path / "control.safetensors")
    with pytest.raises(InputError, match=f"takes {channels} channels"):
        wan.build(Config(**files | {"folder": str(tmp_path / "control.safetensors")}))


def test_the_tokenizer_inside_a_text_encoder_file_is_used(files: dict[str, str], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moves left", "the blue square"] * 10), model_writer=model,
        vocab_size=24, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    stored = torch.tensor(list(model.getvalue()), dtype=torch.uint8)
    save_file(load_file(files["text_encoder"]) | {"spiece_model": stored}, tmp_path / "text.safetensors")
    found = wan.build(Config(**files | {"text_encoder": str(tmp_path / "text.safetensors"), "tokenizer": ""}))
    tokenizer = found.text.tokenizer
    assert tokenizer.text(tokenizer.ids("a red circle")) == "a red circle"
    assert (tokenizer.end, tokenizer.pad) == (1, 0)


def test_a_missing_sentencepiece_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match="install sentencepiece"):
        _t5.sentencepiece_tokenizer(torch.zeros(3, dtype=torch.uint8))


def test_wan_2_2s_autoencoder_is_read_from_its_original_file(tmp_path: Path) -> None:
    vae = tiny_vae_2_2(48)
    save_file(original_state(vae, wan_vae_names("wan2.2 vae")), tmp_path / "vae.safetensors")
    found = _wan_keys.read_vae(tmp_path / "vae.safetensors", torch.float32)
    z = torch.randn(1, 48, 2, 2, 2)
    with torch.no_grad():
        assert (found.decode(z).sample - vae.decode(z).sample).abs().max() < 1e-5


def scaled(files: dict[str, str], path: Path, scale_name: str, *, scales: bool = True) -> dict[str, str]:
    """The transformer with fp8 linear weights of blocks, each with its scale."""
    state: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in load_file(files["folder"]).items():
        if ".blocks." in key and key.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            state[key] = (tensor / scale).to(torch.float8_e4m3fn)
            if scales:
                state[key.removesuffix("weight") + scale_name] = scale.reshape(())
        else:
            state[key] = tensor
    save_file(state, path)
    return {**files, "folder": str(path)}


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_multiplied_by_its_scales(files: dict[str, str], tmp_path: Path, scale_name: str) -> None:
    found = wan.build(Config(**scaled(files, tmp_path / "fp8.safetensors", scale_name)))
    expected = wan.build(Config(**files))
    name = "blocks.1.attn1.to_q.weight"
    found_weight, weight = found.denoiser.state_dict()[name], expected.denoiser.state_dict()[name]
    assert found_weight.dtype == torch.float32
    assert 0 < (found_weight - weight).abs().max() < weight.abs().max() / 16


def test_scaled_fp8_without_scales_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised"):
        wan.build(Config(**scaled(files, tmp_path / "fp8.safetensors", "", scales=False)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae": ""}, "set vae"),
        ({"text_encoder": ""}, "set text_encoder"),
        ({"tokenizer": ""}, "set tokenizer"),
        ({"tokenizer": "absent"}, "tokenizer is missing"),
        ({"vae": "absent.safetensors"}, "autoencoder is missing"),
    ],
)
def test_what_is_missing_is_one_sentence(files: dict[str, str], change: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        wan.build(Config(**files | change))
    assert "\n" not in str(caught.value)


def test_exchanged_files_are_refused(files: dict[str, str]) -> None:
    for part, words in (("folder", "no Wan"), ("vae", "no Wan autoencoder"), ("text_encoder", "not a T5")):
        other = files["vae"] if part != "vae" else files["folder"]
        with pytest.raises(InputError, match=words):
            wan.build(Config(**files | {part: other}))
