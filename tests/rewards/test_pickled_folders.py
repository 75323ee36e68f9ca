"""A transformers folder whose weights are published as pytorch_model.bin gives the same network, and runs no code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPModel, YolosForObjectDetection
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.loading import DTYPES, load_frozen
from vader_nodes.vader_backend.registry import load
from vader_nodes.vader_backend.rewards._clip import ScaledClip

from .conftest import PROMPTS, video

CLASSES: dict[str, Any] = {"detector": YolosForObjectDetection, "clip": CLIPModel}


@pytest.fixture
def pickled(folder: Path, tmp_path: Path) -> Path:
    """The small networks, each with its weights in a pickle."""
    root = Path(shutil.copytree(folder, tmp_path / "pickled"))
    for name in CLASSES:
        file = root / name / "model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    return root


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "cls"), [*CLASSES.items(), ("clip", ScaledClip)])
def test_it_is_the_same_network(folder: Path, pickled: Path, name: str, cls: Any, dtype: str) -> None:
    known, found = (load_frozen(cls, root / name, DTYPES[dtype], "network") for root in (folder, pickled))
    expected = known.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for key, tensor in found.state_dict().items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_it_scores_the_same(folder: Path, pickled: Path) -> None:
    module = load("rewards", "yolos")
    config = module.Config(checkpoint="detector", target="book", height=16)
    known, found = (module.build(config, lambda name, root=root: root / name) for root in (folder, pickled))
    assert found.description == known.description
    assert torch.equal(found(video(), PROMPTS, [0, 1]), known(video(), PROMPTS, [0, 1]))


def test_it_may_be_in_shards(folder: Path, pickled: Path) -> None:
    file = pickled / "detector" / "pytorch_model.bin"
    tensors = load_file(folder / "detector" / "model.safetensors")
    for number in (0, 1):
        some = dict(list(tensors.items())[number::2])
        torch.save(some, file.with_name(f"pytorch_model-0000{number + 1}-of-00002.bin"))
    file.unlink()
    load_frozen(YolosForObjectDetection, pickled / "detector", torch.float32, "network")
    file.with_name("pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="weights missing"):
        load_frozen(YolosForObjectDetection, pickled / "detector", torch.float32, "network")


def test_safetensors_come_first(folder: Path, pickled: Path) -> None:
    (pickled / "detector" / "pytorch_model.bin").write_bytes(b"no")
    shutil.copy(folder / "detector" / "model.safetensors", pickled / "detector")
    load_frozen(YolosForObjectDetection, pickled / "detector", torch.float32, "network")


class Intruder:
    """Touches a file when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_code_is_refused(pickled: Path, tmp_path: Path) -> None:
    file = pickled / "detector" / "pytorch_model.bin"
    torch.save({**torch.load(file, weights_only=True), "extra": Intruder(tmp_path / "mark")}, file)
    refused(pickled, "could run code")
    assert not (tmp_path / "mark").exists()


def test_damage_is_one_sentence(pickled: Path) -> None:
    file = pickled / "detector" / "pytorch_model.bin"
    refused(pickled, r"pytorch_model\.bin is a pickle", AutoencoderKL)  # diffusers publishes none of this name
    whole = file.read_bytes()
    shutil.copy(pickled / "clip" / "pytorch_model.bin", file)
    refused(pickled, "weights missing")
    file.write_bytes(whole[: len(whole) // 2])
    refused(pickled, "cannot be read")
    file.rename(file.with_name("training_args.bin"))
    refused(pickled, r"has no \.safetensors file; training_args\.bin is a pickle")


def refused(root: Path, words: str, cls: Any = YolosForObjectDetection) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_frozen(cls, root / "detector", torch.float32, "network")
    assert "\n" not in str(caught.value)
