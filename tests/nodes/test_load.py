"""Load Video Model: what it lists, under which names, how it finds the parts of single files, what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_videocrafter2
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from tiny_files import PREFIX, save_models, save_videocrafter2
from tiny_opensora import save_tiny as save_opensora
from vader_nodes.nodes import host, sources
from vader_nodes.nodes.load import VaderLoadVideoModel
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.files import ROOT
from vader_nodes.vader_backend.models import ltx, videocrafter2, wan

ROWS = 101  # of the tiny VideoCrafter2's token embedding
SINGLE = [
    "checkpoints/svd.safetensors", "checkpoints/videocrafter2.ckpt", "diffusion_models/ltx.safetensors",
    "diffusion_models/wan.safetensors", "diffusion_models/wan_i2v.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a file of every kind, and folders of two families in models/diffusers."""
    base = tmp_path_factory.mktemp("filled")
    save_models(base / "models")
    save_tiny(base / "models" / "diffusers" / "tiny")
    (base / "models" / "diffusers" / "org").mkdir()
    (base / "models" / "diffusers" / "org" / "opensora").mkdir()
    save_opensora(base / "models" / "diffusers" / "org" / "opensora")
    return base


@pytest.fixture
def base(filled: Path, tmp_path: Path) -> Iterator[Path]:
    """Links to all of it, so that a test may add and take away."""
    for path in filled.rglob("*"):
        target = tmp_path / path.relative_to(filled)
        if path.is_dir():
            target.mkdir()
        else:
            target.hardlink_to(path)
    host.use_base_directory(tmp_path)
    yield tmp_path
    host.use_base_directory(Path.cwd())


def offered(name: str = "checkpoint") -> list[str]:
    declared = VaderLoadVideoModel.INPUT_TYPES()
    return {**declared["required"], **declared["optional"]}[name][0]


def load(checkpoint: str, **parts: str) -> Any:
    return VaderLoadVideoModel().load(checkpoint, **parts)[0]


# --- what is listed --------------------------------------------------------------------------


def test_everything_that_a_family_recognises_is_listed(base: Path) -> None:
    found = offered()
    embedded = [name for name in found if name.startswith("mini/")]
    assert "mini/modelscope" in embedded
    assert all((ROOT / name.removeprefix("mini/")).is_dir() for name in embedded)
    assert not {"mini/clip", "mini/detector", "mini/aesthetic"} & set(embedded)
    assert found[len(embedded) :] == ["org/opensora", "tiny", *SINGLE]
    assert all(sources.locate(name).exists() for name in found)


def test_parts_are_offered_after_auto_and_never_as_pieces_of_a_folder(base: Path) -> None:
    assert offered("vae") == ["auto", "wan_vae.safetensors", "ltx"]
    assert offered("text_encoder") == ["auto", "t5.safetensors", "umt5.safetensors"]
    assert offered("image_encoder") == ["auto", "clip.safetensors"]
    assert offered("tokenizer") == ["auto", "words"]
    names = list(VaderLoadVideoModel.INPUT_TYPES()["optional"])
    assert names[-4:] == ["vae", "text_encoder", "image_encoder", "tokenizer"]  # canvas files count widgets


def test_older_folder_names_are_read_too(base: Path) -> None:
    for old, new in (("clip", "text_encoders"), ("unet", "diffusion_models")):
        (base / "models" / new).rename(base / "models" / old)
    assert offered("text_encoder") == ["auto", "t5.safetensors", "umt5.safetensors"]
    assert "diffusion_models/wan.safetensors" in offered()


def test_what_cannot_be_read_or_is_foreign_is_skipped(base: Path) -> None:
    checkpoints = base / "models" / "checkpoints"
    content = (checkpoints / "svd.safetensors").read_bytes()
    (checkpoints / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (checkpoints / "empty.safetensors").touch()
    (checkpoints / "text.ckpt").write_text("no archive")
    (checkpoints / "gone.safetensors").symlink_to(checkpoints / "nowhere")
    save_file({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(3)}, checkpoints / "flat.safetensors")
    broken = base / "models" / "diffusers" / "broken"
    (broken / "transformer").mkdir(parents=True)
    (broken / "model_index.json").write_text("[1]")
    (broken / "transformer" / "config.json").write_text('{"architectures": 5}')
    assert [name for name in offered() if name.startswith("checkpoints/")] == SINGLE[:2]
    assert "broken" not in offered()


def test_folders_whose_name_would_mean_another_place_are_not_listed(base: Path) -> None:
    diffusers = base / "models" / "diffusers"
    for name in ("checkpoints", "mini"):
        (diffusers / name).mkdir()
        (diffusers / "tiny").rename(diffusers / name / "tiny")
        assert f"{name}/tiny" not in offered()
        (diffusers / name / "tiny").rename(diffusers / "tiny")


def test_a_file_is_looked_into_once_until_it_changes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    original = wan.matches

    def counted(path: Path) -> bool:
        looked.append(path.name)
        return original(path)

    monkeypatch.setattr(wan, "matches", counted)
    file = base / "models" / "diffusion_models" / "wan.safetensors"
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert "diffusion_models/wan.safetensors" in offered()
    assert looked.count("wan.safetensors") == 1
    offered()
    assert looked.count("wan.safetensors") == 1
    weights = load_file(file)
    file.unlink()  # the weights are mapped from it
    save_file({**weights, f"{PREFIX}vace_blocks.0.weight": torch.zeros(1)}, file)  # a Wan that is not offered
    assert "diffusion_models/wan.safetensors" not in offered()


# --- parts of single files -------------------------------------------------------------------


def test_the_parts_of_a_single_file_are_found(base: Path) -> None:
    found = load("diffusion_models/wan.safetensors")
    chosen = load(
        "diffusion_models/wan.safetensors", vae="wan_vae.safetensors", text_encoder="umt5.safetensors",
        tokenizer="words", image_encoder="auto",
    )  # fmt: skip
    assert isinstance(found, wan.Wan)
    assert found.fingerprint == chosen.fingerprint
    for name, network in found.parts().items():
        theirs = chosen.parts()[name].state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in network.state_dict().items()), name
    assert found.text.tokenizer.ids("a red circle") == chosen.text.tokenizer.ids("a red circle")
    assert load("diffusion_models/wan_i2v.safetensors").image is not None


def test_a_chosen_part_is_taken_as_chosen(base: Path) -> None:
    assert isinstance(load("diffusion_models/ltx.safetensors", vae="ltx"), ltx.LTX)
    with pytest.raises(InputError, match=r"T5 v1\.1, but this model needs UMT5"):
        load("diffusion_models/wan.safetensors", text_encoder="t5.safetensors")
    with pytest.raises(InputError, match=r"needs LTX-Video's autoencoder, and none was found in .*vae; put it there"):
        load("diffusion_models/ltx.safetensors")


def test_two_that_fit_are_left_to_the_user(base: Path) -> None:
    file = base / "models" / "vae" / "wan_vae.safetensors"
    (base / "models" / "vae" / "other.safetensors").hardlink_to(file)
    with pytest.raises(InputError, match=r"may be other\.safetensors or wan_vae\.safetensors; choose one as vae"):
        load("diffusion_models/wan.safetensors")
    assert load("diffusion_models/wan.safetensors", vae="other.safetensors").fingerprint


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("vae/wan_vae.safetensors", r"the Wan 2\.1 autoencoder, and none was found in .*vae"),
        ("text_encoders/umt5.safetensors", "a UMT5 text encoder, and none was found in .*text_encoders or .*clip"),
        ("clip_vision/clip.safetensors", "the CLIP vision encoder ViT-H, and none was found in .*clip_vision"),
        ("text_encoders/words/tokenizer.json", "UMT5's tokenizer .* none was found in .*text_encoders"),
    ],
)
def test_a_part_that_nowhere_lies_is_named_with_its_place(base: Path, removed: str, words: str) -> None:
    (base / "models" / removed).unlink()
    with pytest.raises(InputError, match=words) as caught:
        load("diffusion_models/wan_i2v.safetensors")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_size_does_not_fit(base: Path) -> None:
    file = base / "models" / "text_encoders" / "words" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["surplus"] = 17
    file.unlink()
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="UMT5's tokenizer"):
        load("diffusion_models/wan.safetensors")


def test_comfyuis_own_tokenizers_serve_where_the_user_has_none(base: Path) -> None:
    words = base / "models" / "text_encoders" / "words"
    (base / "comfy" / "text_encoders").mkdir(parents=True)
    words.rename(base / "comfy" / "text_encoders" / "t5_tokenizer")
    with pytest.raises(InputError, match=r"needs CLIP's tokenizer \(vocab\.json and merges\.txt\)"):
        load("checkpoints/videocrafter2.ckpt")
    tiny_videocrafter2.write_tokenizer(base / "comfy" / "sd1_tokenizer", ROWS)
    assert load("diffusion_models/ltx.safetensors", vae="ltx").text.tokenizer.ids("a red circle")
    assert isinstance(load("checkpoints/videocrafter2.ckpt"), videocrafter2.VideoCrafter2)
    tiny_videocrafter2.write_tokenizer(base / "models" / "text_encoders" / "clip", ROWS - 1)
    with pytest.raises(InputError, match=f"{ROWS - 1} tokens"):
        load("checkpoints/videocrafter2.ckpt")


def test_a_tokenizer_beside_the_checkpoint_comes_first(base: Path) -> None:
    folder = base / "models" / "diffusers" / "mine"
    folder.mkdir()
    rows = len(save_videocrafter2(folder / "model.safetensors")["cond_stage_model.model.token_embedding.weight"])
    assert rows == ROWS
    tiny_videocrafter2.write_tokenizer(folder / "tokenizer", ROWS)
    assert "mine" in offered()
    assert load("mine").name == "mine"


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "place"),
    [
        ("checkpoints/absent.safetensors", "checkpoints"),
        ("diffusion_models/sub/absent.safetensors", "diffusion_models"),
        ("absent", "diffusers"),
    ],
)
def test_a_missing_checkpoint_of_a_saved_workflow_is_told_before_the_run(
    base: Path, checkpoint: str, place: str
) -> None:
    verdict = str(VaderLoadVideoModel.VALIDATE_INPUTS(checkpoint=checkpoint))
    assert f"models/{place}" in verdict
    assert "absent" in verdict
    assert "put it there" in verdict
    assert "\n" not in verdict


def test_a_missing_part_of_a_saved_workflow_is_told_before_the_run(base: Path) -> None:
    check = VaderLoadVideoModel.VALIDATE_INPUTS
    assert check(checkpoint="tiny", vae="wan_vae.safetensors", tokenizer="words") is True
    assert "did you mean 'wan_vae.safetensors'" in str(check(checkpoint="tiny", vae="wan_vea.safetensors"))
    assert "plain name" in str(check(tokenizer="../words"))
    assert "plain name" in str(check(checkpoint="checkpoints/../tiny"))
    assert check(checkpoint="absent", hub_id="org/net") is True
    assert check(checkpoint=None, vae=None) is True


def test_a_file_of_no_known_family_is_told_before_the_run(base: Path) -> None:
    save_file({"weight": torch.zeros(2)}, base / "models" / "checkpoints" / "other.safetensors")
    assert "of no known family" in str(VaderLoadVideoModel.VALIDATE_INPUTS(checkpoint="checkpoints/other.safetensors"))


def test_names_that_cannot_be_chosen_are_left_out(base: Path) -> None:
    before = sources.checkpoints()
    for name in ("a:b", "~c"):
        folder = base / "models" / "diffusers" / name
        folder.mkdir()
        (folder / "model_index.json").write_text('{"_class_name": "TextToVideoSDPipeline"}')
    assert sources.checkpoints() == before
