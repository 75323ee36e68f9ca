"""Bad files of every family and layout, opened as Load Video Model opens them: one clear sentence each."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny_videocrafter2
import torch
from safetensors.torch import load, save_file
from tiny_families import VARIANTS
from tiny_files import save_models
from torch import Tensor
from vader_nodes.nodes import host
from vader_nodes.nodes.load import VaderLoadVideoModel
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.config import InputError

FOLDERS = {
    "modelscope": "unet/diffusion_pytorch_model.safetensors",
    "opensora": "transformer/model.safetensors",
    "svd": "unet/diffusion_pytorch_model.safetensors",
    "wan": "transformer/diffusion_pytorch_model.safetensors",
    "ltx": "transformer/diffusion_pytorch_model.safetensors",
}
WAN = {"vae": "wan_vae.safetensors", "text_encoder": "umt5.safetensors", "image_encoder": "clip.safetensors",
       "tokenizer": "words"}  # fmt: skip
LTX = {"vae": "ltx", "text_encoder": "t5.safetensors", "tokenizer": "words"}


@dataclass(frozen=True)
class Case:
    """checkpoint: its name in the node. file: the one to spoil, below models. parts: what is chosen beside it."""

    family: str
    checkpoint: str
    file: str
    parts: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> None:
        VaderLoadVideoModel().load(self.checkpoint, **self.parts)


def folder(family: str, file: str) -> Case:
    return Case(family, f"tiny/{family}", f"diffusers/tiny/{family}/{file}")


def single(family: str, name: str, file: str = "", parts: Mapping[str, str] | None = None) -> Case:
    return Case(family, name, file or name, parts or {})


WAN_FILE = "diffusion_models/wan_i2v.safetensors"
CASES = {
    **{f"{family} folder": folder(family, file) for family, file in FOLDERS.items()},
    "modelscope text encoder": folder("modelscope", "text_encoder/model.safetensors"),
    "opensora autoencoder": folder("opensora", "vae/model.safetensors"),
    "opensora text encoder": folder("opensora", "text_encoder/model.safetensors"),
    "videocrafter2 file": single("videocrafter2", "checkpoints/videocrafter2.safetensors"),
    "svd file": single("svd", "checkpoints/svd.safetensors"),
    "wan file": single("wan", WAN_FILE, parts=WAN),
    "wan autoencoder": single("wan", WAN_FILE, "vae/wan_vae.safetensors", WAN),
    "wan text encoder": single("wan", WAN_FILE, "text_encoders/umt5.safetensors", WAN),
    "wan image encoder": single("wan", WAN_FILE, "clip_vision/clip.safetensors", WAN),
    "ltx file": single("ltx", "diffusion_models/ltx.safetensors", parts=LTX),
    "ltx text encoder": single("ltx", "diffusion_models/ltx.safetensors", "text_encoders/t5.safetensors", LTX),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A models folder with every family; the nodes read it."""
    base = tmp_path_factory.mktemp("base")
    save_models(base / "models")
    (base / "models" / "checkpoints" / "videocrafter2.ckpt").unlink()
    tensors = tiny_videocrafter2.tiny_tensors()
    save_file(tensors, base / "models" / "checkpoints" / "videocrafter2.safetensors")
    rows = len(tensors["cond_stage_model.model.token_embedding.weight"])
    tiny_videocrafter2.write_tokenizer(base / "models" / "text_encoders" / "clip", rows)
    for family in FOLDERS:
        path = base / "models" / "diffusers" / "tiny" / family
        path.mkdir(parents=True)
        VARIANTS[family].write(path)
    host.use_base_directory(base)
    yield base / "models"
    host.use_base_directory(Path.cwd())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, models: Path) -> Iterator[Case]:
    """One file may be spoilt; it is whole again afterwards."""
    found = CASES[request.param]
    file = models / found.file
    content = file.read_bytes()
    renew(file, content)
    yield found
    renew(file, content)


def renew(file: Path, content: bytes) -> None:
    """Writing over a file that a network is mapped from would take its weights away."""
    file.unlink()
    file.write_bytes(content)


def read(file: Path) -> dict[str, Tensor]:
    return load(file.read_bytes())


def matrix(tensors: dict[str, Tensor]) -> str:
    """The name of one, inside a block where there are blocks: such a one has neighbours that its shape must fit."""
    names = [key for key, tensor in sorted(tensors.items()) if tensor.ndim > 1 and min(tensor.shape) > 1]
    return next((name for name in names if "block" in name or ".layers." in name), names[0])


def truncate(file: Path, _: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def exchange(file: Path, models: Path) -> None:
    """The weights of another model."""
    other = CASES["ltx file" if file.parent.name == "vae" else "wan autoencoder"].file
    save_file(read(models / other), file)


def misshape(file: Path, _: Path) -> None:
    """A tensor with a row less, as if two sizes of a model had been mixed."""
    tensors = read(file)
    name = matrix(tensors)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)


def flatten(file: Path, _: Path) -> None:
    """Every tensor with one dimension."""
    save_file({key: tensor.flatten() for key, tensor in read(file).items()}, file)


def add(file: Path, _: Path) -> None:
    tensors = read(file)
    save_file({**tensors, f"{matrix(tensors).rpartition('.')[0]}.surplus": torch.zeros(1)}, file)


def remove(file: Path, _: Path) -> None:
    tensors = read(file)
    del tensors[matrix(tensors)]
    save_file(tensors, file)


def archive(file: Path, _: Path) -> None:
    torch.save(read(file), file)


class Bomb:
    """What a pickle may do to whoever opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def bomb(file: Path, _: Path) -> None:
    file.write_bytes(pickle.dumps({"state_dict": Bomb(file.with_name("exploded"))}))


def packed_bomb(file: Path, _: Path) -> None:
    torch.save({"state_dict": Bomb(file.with_name("exploded"))}, file)


def pointer(file: Path, _: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def page(file: Path, _: Path) -> None:
    file.write_text("<!DOCTYPE html><html>Sign in</html>")


def text(file: Path, _: Path) -> None:
    file.write_text("no")


SPOILT: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "truncated": (truncate, "it is truncated or damaged"),
    "another model's": (exchange, "weights missing|it lacks|no known family|is no Wan|not a T5|is no CLIP"),
    "mixed shapes": (misshape, r"weights of another shape: \d, such as"),
    "flat": (flatten, "weights of another shape|other shapes than expected|no known family"),
    "unknown weights": (add, r"weights unknown: 1, such as .*surplus"),
    "missing weights": (remove, r"weights missing: \d, such as|it lacks"),
    "zip": (archive, "not a safetensors file but a zip archive"),
    "pickle": (bomb, "not a safetensors file but a pickle"),
    "pointer": (pointer, "but a Git LFS pointer"),
    "web page": (page, "but a web page"),
    "short text": (text, "it is truncated or damaged"),
}


def test_every_family_is_tried(models: Path) -> None:
    assert {case.family for case in CASES.values()} == set(registry.names("models"))


def test_whole_files_are_opened(case: Case) -> None:
    case.load()


@pytest.mark.parametrize("damage", SPOILT)
def test_a_bad_file_is_one_sentence(case: Case, models: Path, damage: str) -> None:
    spoil, words = SPOILT[damage]
    spoil(models / case.file, models)
    with pytest.raises(InputError, match=words) as caught:
        case.load()
    said = str(caught.value)
    assert "\n" not in said
    assert not (models / case.file).with_name("exploded").exists()
    assert any(part in said for part in (Path(case.file).name, Path(case.file).parent.name)), said


@pytest.mark.parametrize("write", [bomb, packed_bomb])
def test_a_pickle_that_is_read_as_one_runs_nothing(models: Path, write: Callable[[Path, Path], None]) -> None:
    """Originals such as model.ckpt are pickles; only tensors are taken from them."""
    file = models / "checkpoints" / "bad.ckpt"
    write(file, models)
    with pytest.raises(InputError, match=r"bad\.ckpt cannot be read") as caught:
        VaderLoadVideoModel().load("checkpoints/bad.ckpt")
    assert "\n" not in str(caught.value)
    assert not file.with_name("exploded").exists()
    file.unlink()


def test_a_truncated_original_is_one_sentence(models: Path) -> None:
    file = models / "checkpoints" / "videocrafter2.ckpt"
    torch.save({"state_dict": tiny_videocrafter2.tiny_tensors()}, file)
    truncate(file, models)
    with pytest.raises(InputError, match=r"videocrafter2\.ckpt cannot be read") as caught:
        VaderLoadVideoModel().load("checkpoints/videocrafter2.ckpt")
    assert "\n" not in str(caught.value)
    file.unlink()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modelscope/tokenizer/vocab.json", "<html>"),
        ("modelscope/scheduler/scheduler_config.json", "null"),
        ("svd/feature_extractor/preprocessor_config.json", "[]"),
        ("wan/scheduler/scheduler_config.json", "null"),
        ("ltx/scheduler/scheduler_config.json", "3"),
        ("opensora/vae/config.json", "null"),
    ],
)
def test_a_bad_configuration_is_one_sentence(models: Path, file: str, content: str) -> None:
    path = models / "diffusers" / "tiny" / file
    whole = path.read_bytes()
    path.write_text(content)
    with pytest.raises(InputError, match="cannot be read") as caught:
        VaderLoadVideoModel().load(f"tiny/{file.partition('/')[0]}")
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)


def test_unknown_weights_beside_the_t5_encoder_are_told(models: Path) -> None:
    """Of a whole T5 the decoder is left out; what is neither is not."""
    file = models / "diffusers" / "tiny" / "opensora" / "text_encoder" / "model.safetensors"
    whole = file.read_bytes()
    for name in ("decoder.block.0.layer.0.layer_norm.weight", "surplus.weight"):
        tensors = {**load(whole), name: torch.zeros(1)}
        file.unlink()
        save_file(tensors, file)
        if name.startswith("decoder."):
            VaderLoadVideoModel().load("tiny/opensora")
    with pytest.raises(InputError, match=r"weights unknown: 1, such as surplus\.weight"):
        VaderLoadVideoModel().load("tiny/opensora")
    renew(file, whole)
