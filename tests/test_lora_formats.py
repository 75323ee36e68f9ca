"""LoRA files of other programs give the weights that they stand for; ours are written as others read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import VIDEO, tiny_model
from tiny_flow import original_shapes
from torch import Tensor, nn
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.lora import LoraConfig, LoraWeights, applied, attached, export, load_lora
from vader_nodes.vader_backend.lora_formats import by_module
from vader_nodes.vader_backend.memory.block_swap import frozen_weights
from vader_nodes.vader_backend.memory.low_bit import STORAGES, low_bit
from vader_nodes.vader_backend.models._ltx_keys import comfy_module as ltx_module
from vader_nodes.vader_backend.models._wan_keys import comfy_module as wan_module
from vader_nodes.vader_backend.models._wan_keys import transformer_config
from vader_nodes.vader_backend.models.base import Defaults, LoraNames
from vader_nodes.vader_backend.models.modelscope import ModelScope

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class Holder:
    """The parts of a VideoModel that LoRA files meet."""

    denoiser: nn.Module
    lora_names: LoraNames = field(default_factory=LoraNames)
    name: str = "holder"
    lora_prefix: str = "transformer."
    lora_targets: tuple[str, ...] = TARGETS
    defaults: Defaults = field(default_factory=lambda: Defaults(VIDEO, steps=1, guidance=1.0))


def tiny_wan() -> Any:
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
        image_dim=8, added_kv_proj_dim=24, rope_max_seq_len=32,
    )  # fmt: skip
    return Holder(network, LoraNames(comfy=wan_module))


def tiny_ltx() -> Any:
    torch.manual_seed(0)
    network = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    return Holder(network, LoraNames(comfy=ltx_module))


FAMILIES: dict[str, Callable[[], Any]] = {"wan": tiny_wan, "ltx": tiny_ltx}


def targets(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_modules() if name.endswith(TARGETS)]


def lora_of(network: nn.Module, rank: int = 3) -> dict[str, Tensor]:
    """Random halves for every target, under the module's own name."""
    rng, result = torch.Generator().manual_seed(2), {}
    for name in targets(network):
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        result[f"{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=rng)
        result[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=rng)
    return result


Rename = Callable[[str], str]


def flat(prefix: str) -> Callable[[str, Rename], str]:
    """kohya's way of naming a weight, after the given prefix."""

    def spell(name: str, rename: Rename) -> str:
        module, _, side = name.rpartition(".lora_")
        return f"{prefix}{rename(module).replace('.', '_')}.lora_{'down' if side == 'A.weight' else 'up'}.weight"

    return spell


def native(name: str, rename: Rename) -> str:
    module, _, rest = name.rpartition(".lora_")
    return f"{rename(module)}.lora_{rest}"


SPELLINGS: dict[str, Callable[[str, Rename], str]] = {
    "ours": lambda name, rename: name,
    "diffusers": lambda name, rename: f"transformer.{name}",
    "peft": lambda name, rename: f"base_model.model.{name}",
    "peft within diffusers": lambda name, rename: f"transformer.base_model.model.{name}",
    "peft with adapter name": lambda name, rename: f"base_model.model.{name.replace('.weight', '.default.weight')}",
    "diffusion_model": lambda name, rename: f"diffusion_model.{native(name, rename)}",
    "bare native names": native,
    "DiffSynth": lambda name, rename: native(name.replace("weight", "default.weight"), rename),
    "kohya": flat("lora_unet_"),
    "kohya with diffusers names": lambda name, rename: flat("lora_unet_")(name, str),
    "VideoX-Fun": flat("lora_unet__"),
    "OneTrainer": lambda name, rename: flat("lora_transformer_")(name, str),
    "old diffusers": lambda name, rename: "unet." + name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
}  # fmt: skip
OTHERS = ("diffusers", "kohya", "diffusion_model")


def spelled(model: Any, lora: Mapping[str, Tensor], spelling: str) -> dict[str, Tensor]:
    return {SPELLINGS[spelling](name, model.lora_names.comfy): tensor for name, tensor in lora.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling: str, family: str) -> None:
    model = FAMILIES[family]()
    expected = lora_of(model.denoiser)
    found = by_module(model, spelled(model, expected, spelling), "")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["diffusion_model", "kohya"])
def test_alpha_is_folded(spelling: str, family: str) -> None:
    model = FAMILIES[family]()
    plain = lora_of(model.denoiser)
    weights = {key: tensor.half() for key, tensor in spelled(model, plain, spelling).items()}
    modules = {key.partition(".lora_")[0] for key in weights}
    found = by_module(model, weights | {f"{module}.alpha": torch.tensor(6.0) for module in modules}, "")
    for name, tensor in plain.items():
        expected = tensor.half().float() * (2 if ".lora_B." in name else 1)
        assert torch.equal(found[name].float(), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", OTHERS)
def test_another_programs_lora_is_a_start_and_samples(spelling: str, family: str) -> None:
    """Training begins with its weights, in layers of its rank; sampling adds what they stand for."""
    model, rank = FAMILIES[family](), 3
    lora = lora_of(model.denoiser, rank)
    name = targets(model.denoiser)[-1]
    layer, states = model.denoiser.get_submodule(name), torch.randn(2, model.denoiser.get_submodule(name).in_features)
    plain = layer(states)
    update = states @ lora[f"{name}.lora_A.weight"].T @ lora[f"{name}.lora_B.weight"].T
    weights = LoraWeights(spelled(model, lora, spelling))
    with attached(model, LoraConfig(rank=rank + 1), seed=0, start=weights) as parameters:
        assert set(parameters) == set(lora)
        assert all(torch.equal(tensor, lora[key]) and tensor.requires_grad for key, tensor in parameters.items())
        assert (model.denoiser.get_submodule(name)(states) - plain - update).abs().max() < 1e-4
    with applied(model, weights, 0.5):
        assert (model.denoiser.get_submodule(name)(states) - plain - 0.5 * update).abs().max() < 1e-4
    assert model.denoiser.get_submodule(name) is layer
    assert update.abs().max() > 1e-2


def test_names_of_the_first_implementation_are_read() -> None:
    def original(name: str) -> str:
        return name.replace("middle_block.1", "blocks.0").replace(".qkv.", ".attn1.")

    model = tiny_wan()
    model.lora_names = LoraNames(original=original)
    down = "blocks.0.attn1.to_q.lora_A.weight"
    expected = {k: t for k, t in lora_of(model.denoiser).items() if k.startswith("blocks.0.attn1.to_q.")}
    published = {
        "base_model.model.model.diffusion_model.middle_block.1.qkv.to_q" + k.removeprefix("blocks.0.attn1.to_q"): t
        for k, t in expected.items()
    }
    found = by_module(model, published, "")
    assert set(found) == set(expected)
    assert torch.equal(found[down], expected[down])


def forward(network: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    z, text, image = (torch.randn(size, generator=rng) for size in ((1, 16, 1, 4, 4), (1, 5, 16), (1, 257, 8)))
    with torch.no_grad():
        return network(z, torch.tensor([5.0]), text, image).sample


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_files_have_the_scale_that_their_metadata_tell(tmp_path: Path, prefix: str, stabilised: bool) -> None:
    """diffusers writes no alpha beside the weights, but peft's configuration into the metadata."""
    network, model = tiny_wan().denoiser, tiny_wan()
    plain = forward(network)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, alpha_pattern={"blocks.1.attn1.to_q": 2}, rank_pattern={"blocks.1.attn2.to_k": 2},
        target_modules=list(TARGETS), init_lora_weights=False, use_rslora=stabilised,
    )  # fmt: skip
    network.add_adapter(config)
    expected = forward(network)
    network.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    path = tmp_path / "lora.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {prefix + key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({prefix + key: v for key, v in told.items()})})
    with applied(model, load_lora(path)):
        found = forward(model.denoiser)
    assert (expected - plain).abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("told", "scale"), [('{"r": 3, "lora_alpha": 6}', 2.0), ("{", 1.0), ("[]", 1.0)])
def test_finetrainers_metadata_tell_the_scale(tmp_path: Path, told: str, scale: float) -> None:
    model = tiny_ltx()
    lora = lora_of(model.denoiser, rank=3)
    save_file(spelled(model, lora, "diffusers"), tmp_path / "lora.safetensors", {"lora_config": told})
    found = by_module(model, load_lora(tmp_path / "lora.safetensors"), "")
    for name, tensor in lora.items():
        assert torch.equal(found[name], tensor * (scale if ".lora_B." in name else 1))


def test_metadata_that_say_nothing_sensible_are_one_sentence(tmp_path: Path) -> None:
    told = {"lora_adapter_metadata": '{"r": 3, "lora_alpha": null}'}
    save_file(lora_of(tiny_ltx().denoiser), tmp_path / "lora.safetensors", told)
    with pytest.raises(InputError, match=r"lora\.safetensors cannot be read"):
        load_lora(tmp_path / "lora.safetensors")


def test_published_vader_loras_have_the_scale_of_their_training(tmp_path: Path) -> None:
    """They are pickles without an alpha, trained with peft's default of 8: .5 at rank 16, 1 at rank 8."""
    model = tiny_wan()
    for rank, scale, zipped in ((16, 0.5, True), (8, 1.0, True), (4, 2.0, False)):
        lora = lora_of(model.denoiser, rank)
        published = {f"base_model.model.model.diffusion_model.{name}": tensor for name, tensor in lora.items()}
        torch.save(published, tmp_path / "vader_videocrafter.pt", _use_new_zipfile_serialization=zipped)
        found = by_module(model, load_lora(tmp_path / "vader_videocrafter.pt"), "")
        for name, tensor in lora.items():
            assert torch.equal(found[name], tensor * (scale if ".lora_B." in name else 1))


def test_a_convolution_takes_no_lora_of_another_kernel() -> None:
    """Neither half is spread over a larger kernel, or over a layer of another kind."""
    base = tiny_wan().denoiser.patch_embedding.weight
    down, up = torch.ones(2, *base.shape[1:]), torch.ones(len(base), 2, 1, 1, 1)
    sides = {"A": down, "B": up}
    names = {side: f"patch_embedding.lora_{side}.weight" for side in sides}
    assert set(by_module(tiny_wan(), {names[side]: sides[side] for side in "AB"}, "")) == set(names.values())
    for side, wrong in (("A", down[..., :1]), ("A", down[:0]), ("B", up.expand(-1, -1, 1, 2, 2))):
        assert "does not fit" in refusal({names[s]: wrong if s == side else sides[s] for s in "AB"})
    norm = {f"blocks.0.norm2.lora_{side}.weight": torch.ones(3) for side in "AB"}
    assert "does not fit" in refusal(norm)


def refusal(tensors: Mapping[str, Tensor]) -> str:
    with pytest.raises(InputError) as caught:
        by_module(tiny_wan(), tensors, "another base model")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_told_in_a_sentence() -> None:
    lora = lora_of(tiny_wan().denoiser)
    down, up = list(lora)[:2]
    module = down.partition(".lora_")[0]
    assert "not a plain LoRA" in refusal({f"{module}.hada_w1_a": lora[down]}).replace("part of ", "")
    assert "plain LoRA" in refusal({**lora, f"{module}.dora_scale": lora[down]})
    assert "text encoder" in refusal({**lora, "lora_te_text_model_encoder_layers_0_q.lora_down.weight": lora[down]})
    assert "another base model" in refusal({"blocks.9.attn1.to_q.lora_A.weight": lora[down]})
    assert "another base model" in refusal({**lora, down: torch.zeros(3, 7)})
    assert "another base model" in refusal({**lora, down: torch.zeros(3)})
    assert "not whole" in refusal({down: lora[down]})
    assert "not whole" in refusal({f"{module}.alpha": torch.tensor(1.0)})
    assert "does not fit" in refusal({**lora, f"{module}.alpha": torch.ones(3)})
    assert "not whole" in refusal({down: lora[down], up: torch.zeros(len(lora[up]), 5)})


def test_a_kohya_file_acts_as_its_weights_say(tmp_path: Path) -> None:
    """On a model that runs: the file's update, alpha / rank and all, is what the layers add."""
    model = tiny_model(tmp_path, torch.float32)
    lora = lora_of(model.denoiser)
    name = next(iter(lora)).partition(".lora_")[0]
    flat = f"lora_unet_{name.replace('.', '_')}"
    down, up = lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]
    save_file(
        {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.5)},
        tmp_path / "kohya.safetensors",
    )
    z, cond = torch.randn(1, 4, 3, 4, 4), model.encode(["x"], VIDEO).positive
    with torch.no_grad(), applied(model, load_lora(tmp_path / "kohya.safetensors"), 0.5):
        found = model.predict(z, 500, dict(cond))
    weight = model.denoiser.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        base = model.predict(z, 500, dict(cond))
        weight += 0.5 * 1.5 / 3 * up @ down
        expected = model.predict(z, 500, dict(cond))
    assert (expected - base).abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("storage", STORAGES)
def test_a_lora_goes_onto_weights_in_few_bits(tmp_path: Path, storage: str) -> None:
    """For sampling and as a start of a training, on matrices and kernels of blocks: as onto weights so rounded."""
    model = tiny_model(tmp_path, torch.float32)
    rng, lora = torch.Generator().manual_seed(2), {}
    for name, layer in model.denoiser.down_blocks.named_modules(prefix="down_blocks"):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            shape = layer.weight.shape
            lora[f"{name}.lora_A.weight"] = 0.1 * torch.randn(2, *shape[1:], generator=rng)
            lora[f"{name}.lora_B.weight"] = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=rng)
    assert {tensor.ndim for tensor in lora.values()} == {2, 4, 5}
    z, cond = torch.randn(1, 4, 3, 4, 4, generator=rng), dict(model.encode(["x"], VIDEO).positive)

    def predictions() -> list[Tensor]:
        with torch.no_grad(), applied(model, LoraWeights(lora)):
            found = model.predict(z, 500, cond)
        with torch.no_grad(), attached(model, LoraConfig(), seed=0, start=LoraWeights(lora)):
            return [model.predict(z, 500, cond), found]

    with low_bit(model, storage):
        found = predictions()
    for block in model.blocks:
        for layer, name, weight in list(frozen_weights(block)):
            if weight.ndim > 1:
                pack = STORAGES[storage](weight)
                layer._parameters[name] = nn.Parameter(pack.unpack(pack.data, pack.scale), requires_grad=False)
    for ours, expected in zip(found, predictions(), strict=True):
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("item", ["wan2.1 t2v 1.3B", "wan2.1 i2v 14B", "wan2.2 ti2v 5B"])
def test_exported_names_are_those_of_comfyuis_wan(item: str) -> None:
    shapes = original_shapes(item)
    with torch.device("meta"):
        network = WanTransformer3DModel(**transformer_config({key: tuple(shape) for key, shape in shapes.items()}))
    assert_comfy(Holder(network, LoraNames(comfy=wan_module)), shapes)


def test_exported_names_are_those_of_comfyuis_ltx() -> None:
    with torch.device("meta"):
        network = LTXVideoTransformer3DModel()
    assert_comfy(Holder(network, LoraNames(comfy=ltx_module)), original_shapes("ltx 2B"))


def assert_comfy(model: Any, shapes: dict[str, list[int]]) -> None:
    """Every exported key names a weight of ComfyUI's network, of the shape that the LoRA was made for."""
    names = targets(model.denoiser)
    halves = {f"{name}.lora_{side}.weight": torch.zeros(1, 1) for name in names for side in "AB"}
    found = export(model, halves, 1.0, {})
    modules = {key.removeprefix("diffusion_model.").partition(".lora_")[0] for key in found}
    assert len(names) == len(modules) == 8 * len({name.split(".")[1] for name in names})
    linear = {name: module for name, module in model.denoiser.named_modules() if isinstance(module, nn.Linear)}
    assert set(names) <= set(linear)
    for name, module in linear.items():
        assert shapes[f"{model.lora_names.comfy(name)}.weight"] == list(module.weight.shape)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_what_is_exported_is_read_back(layout: str) -> None:
    model = tiny_wan()
    expected = lora_of(model.denoiser)
    weights = export(model, expected, 1.0, {}, layout=layout)
    start = {"comfyui": "diffusion_model.blocks.0.self_attn.q.", "diffusers": "transformer.blocks.0.attn1.to_q."}
    assert next(iter(weights)).startswith(start[layout])
    found = by_module(model, weights, "")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_family_that_comfyui_lacks_keeps_diffusers_layout(tmp_path: Path) -> None:
    model: ModelScope = tiny_model(tmp_path, torch.float32)
    with attached(model, LoraConfig(rank=2), seed=0) as parameters:
        keys = {layout: set(export(model, dict(parameters), 1.0, {}, layout)) for layout in ("comfyui", "diffusers")}
        with pytest.raises(InputError, match="layout"):
            export(model, dict(parameters), 1.0, {}, "kohya")
    assert keys["comfyui"] == keys["diffusers"]
    assert all(key.startswith("unet.") for key in keys["comfyui"])
