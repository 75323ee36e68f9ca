"""Reading a diffusers folder: as diffusers does, and one sentence on every kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import VIDEO, save_tiny
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.models import modelscope
from vader_nodes.vader_backend.models.modelscope import Config, ModelScope, build


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelScope]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_tiny(folder)


@pytest.fixture
def copy(original: tuple[Path, ModelScope], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


def test_a_folder_gives_the_same_network(original: tuple[Path, ModelScope]) -> None:
    folder, model = original
    assert modelscope.matches(folder)
    loaded = build(Config(folder=str(folder)))
    z, cond = torch.randn(1, 4, 3, 4, 4), model.encode(["a red circle"], VIDEO).positive
    with torch.no_grad():
        # Equal weights may still give other last bits: where a file lies in memory decides how a CPU sums.
        torch.testing.assert_close(loaded.predict(z, 10, dict(cond)), model.predict(z, 10, dict(cond)))
        torch.testing.assert_close(loaded.decode(z, [1]), model.decode(z, [1]))
    torch.testing.assert_close(loaded.encode(["a red circle"], VIDEO).positive["text"], cond["text"])
    for name, part in model.parts().items():
        found = loaded.parts()[name].state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in part.state_dict().items())
    assert loaded.fingerprint == model.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_held_in_the_chosen_precision(original: tuple[Path, ModelScope], dtype: str) -> None:
    loaded = build(Config(folder=str(original[0]), dtype=dtype))
    for network in loaded.parts().values():
        assert {p.dtype for p in network.parameters()} == {getattr(torch, dtype)}
    cond = loaded.encode(["a red circle"], VIDEO).positive
    assert loaded.predict(torch.randn(1, 4, 3, 4, 4), 10, dict(cond)).dtype == torch.float32


def truncate(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def exchange(folder: Path) -> None:
    """The weights of another network."""
    shutil.copy(next((folder / "vae").glob("*.safetensors")), next((folder / "unet").glob("*.safetensors")))


def pickled(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))


def spoil(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "scheduler|missing"),
    "no denoiser": (lambda folder: shutil.rmtree(folder / "unet"), "denoiser is missing"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler"),
    "truncated": (truncate, "denoiser .* cannot be read"),
    "foreign": (exchange, "denoiser .* cannot be read"),
    "pickle": (pickled, "pickle"),
    "no json": (spoil, "denoiser .* cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence(copy: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    change(copy)
    with pytest.raises(InputError, match=words) as caught:
        build(Config(folder=str(copy)))
    assert "\n" not in str(caught.value)


def test_other_pipelines_are_not_claimed(copy: Path) -> None:
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert not modelscope.matches(copy)
    assert not modelscope.matches(copy / "absent")


def test_images_are_refused_by_a_text_to_video_model(original: tuple[Path, ModelScope]) -> None:
    with pytest.raises(InputError, match="not from Image Prompts"):
        original[1].encode(["a"], VIDEO, images=torch.zeros(1, 3, 8, 8))
