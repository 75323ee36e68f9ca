"""What every node owes its user, and the mistakes that nodes find before a run."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import VARIANTS
from tiny_graph import Redness
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, host, validate, workflow
from vader_nodes.nodes.evaluate import VaderScoreVideo
from vader_nodes.nodes.images import rows, tiled, to_images, to_videos
from vader_nodes.nodes.prompts import VaderImagePrompts, VaderPrompts
from vader_nodes.nodes.rewards import RewardNode, VaderCombineRewards, VaderRewardTowards, reward_nodes
from vader_nodes.nodes.save import VaderSaveLoRA, VaderSaveVideo
from vader_nodes.nodes.train import VaderTrainLoRA
from vader_nodes.tools import locales
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.lora import LoraConfig, attached, export, load_lora
from vader_nodes.vader_backend.prompts import PromptSet

NODES = sorted(NODE_CLASS_MAPPINGS.items())


@pytest.mark.parametrize(("name", "cls"), NODES)
def test_every_node_explains_itself(name: str, cls: type[Any], root: Path) -> None:
    assert cls.DESCRIPTION.strip()
    assert cls.SEARCH_ALIASES
    assert cls.CATEGORY == "VADER"
    assert len(cls.OUTPUT_TOOLTIPS) == len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES)
    for section in ("required", "optional"):
        for key, entry in cls.INPUT_TYPES().get(section, {}).items():
            assert entry[1]["tooltip"].strip(), key
    page = root / "nodes" / "web" / "docs" / f"{name}.md"
    if page.exists() or not issubclass(cls, RewardNode):  # a reward is one file: its page is welcome, not owed
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}\n")
        assert all(f"## {part}" in text for part in ("Inputs", "Outputs", "Example", "Common mistakes"))


@pytest.mark.parametrize(("name", "cls"), NODES)
def test_arguments_of_node_functions_are_inputs(name: str, cls: type[Any]) -> None:
    declared = {key for section in cls.INPUT_TYPES().values() for key in section}
    for function in (getattr(cls, cls.FUNCTION), getattr(cls, "VALIDATE_INPUTS", None)):
        if function is not None:
            parameters = inspect.signature(function).parameters.values()
            named = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} - {"self"}
            assert named <= declared


@pytest.mark.parametrize(("name", "cls"), NODES)
def test_defaults_pass_the_nodes_own_validation(name: str, cls: type[Any]) -> None:
    assert getattr(cls, "VALIDATE_INPUTS", lambda: True)() is True


def test_help_pages_belong_to_nodes_and_show_an_example(root: Path) -> None:
    folder = root / "nodes" / "web" / "docs"
    shown = set()
    for page in folder.glob("*.md"):
        assert page.stem in NODE_CLASS_MAPPINGS
        example = page.read_text(encoding="utf-8").partition("## Example")[2].partition("\n## ")[0]
        assert f"(images/{page.stem}.jpg)" in example
        shown |= set(re.findall(r"!\[[^]]+\]\((images/[^)]+)\)", page.read_text(encoding="utf-8")))
    assert shown == {path.relative_to(folder).as_posix() for path in folder.glob("images/*")}


def test_every_reward_has_its_node() -> None:
    keys = {cls.key for cls in NODE_CLASS_MAPPINGS.values() if issubclass(cls, RewardNode)}
    assert keys == set(registry.names("rewards"))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 5, "sampling_steps": 4}, "K is 5"),
        ({"truncation": "from_step", "from_step": 4, "sampling_steps": 4}, "from_step"),
        ({"truncation": "last"}, "last_k"),
        ({"name": "../up"}, "name"),
        ({"name": "/top"}, "name"),
        ({"name": " "}, "name"),
    ],
)
def test_training_mistakes_are_found_early(given: dict[str, Any], word: str) -> None:
    assert word in str(VaderTrainLoRA.VALIDATE_INPUTS(**given))


def test_linked_settings_are_not_judged_early() -> None:
    assert VaderTrainLoRA.VALIDATE_INPUTS(k=None, sampling_steps=4) is True
    assert VaderPrompts.VALIDATE_INPUTS(source="typed", text=None) is True
    assert VaderSaveLoRA.VALIDATE_INPUTS(filename_prefix=None) is True


@pytest.mark.parametrize("prefix", ["../x", "/x", "a/../../x", "", "C:\\x", "~/x"])
def test_output_names_that_leave_the_folder_are_refused(prefix: str) -> None:
    assert "filename_prefix" in str(VaderSaveLoRA.VALIDATE_INPUTS(prefix))
    assert "filename_prefix" in str(VaderSaveVideo.VALIDATE_INPUTS(prefix))


def _tiny_svd(folder: Path) -> Any:
    VARIANTS["svd"].write(folder)
    return VARIANTS["svd"].build(folder)


def test_a_lora_is_saved_in_either_layout(empty_base: Path) -> None:
    model = _tiny_svd(empty_base / "model")
    with attached(model, LoraConfig(rank=2), seed=0) as parameters:
        expected = {name: value.detach().clone() for name, value in parameters.items()}
    lora = export(model, expected, 1.0, {"base_model": model.name})
    files = {
        layout: VaderSaveLoRA().save(lora, model=model, layout=layout)["result"][0]
        for layout in ("comfyui", "diffusers")
    }
    read = {layout: load_lora(host.current().output() / name) for layout, name in files.items()}
    assert set(read["comfyui"]) == set(lora)
    assert set(read["diffusers"]) == {f"unet.{name}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(read["diffusers"][f"unet.{name}"], tensor)
    assert read["diffusers"].metadata == read["comfyui"].metadata
    with pytest.raises(InputError, match="connect the model"):
        VaderSaveLoRA().save(lora, layout="diffusers")


@pytest.mark.parametrize("given", [{"source": "typed"}, {"source": "typed", "text": " \n "}, {"source": "file"}])
def test_blank_prompts_are_found_early(given: dict[str, str]) -> None:
    assert "prompt" in str(VaderPrompts.VALIDATE_INPUTS(**given))


def test_prompt_files_are_read_from_the_input_folder_only(empty_base: Path) -> None:
    (empty_base / "input").mkdir()
    (empty_base / "input" / "mine.txt").write_text("a cat\n")
    (empty_base / "secret.txt").write_text("no\n")
    assert VaderPrompts().read(source="file", file="mine.txt")[0].train == ("a cat",)
    assert "file" in str(VaderPrompts.VALIDATE_INPUTS(source="file", file="../secret.txt"))
    before = VaderPrompts.IS_CHANGED(source="file", file="mine.txt")
    (empty_base / "input" / "mine.txt").write_text("a dog\n")
    assert VaderPrompts.IS_CHANGED(source="file", file="mine.txt") != before


def test_weights_that_are_all_zero_are_refused() -> None:
    validate = VaderCombineRewards.VALIDATE_INPUTS
    assert "zero" in str(validate(weight_1=0.0))
    assert "zero" in str(validate(weight_1=0.0, weight_2=0.0, reward_2=None))
    assert validate(weight_1=0.0, reward_2=None) is True
    with pytest.raises(InputError, match="zero"):
        VaderCombineRewards().combine(reward_1=Redness(), weight_1=0.0)


def test_combined_and_wrapped_rewards_compute_what_they_say() -> None:
    video = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = Redness()(video, ["", ""], range(3))
    (both,) = VaderCombineRewards().combine(reward_1=Redness(), reward_3=Redness(), weight_1=2.0, weight_3=0.5)
    torch.testing.assert_close(both(video, ["", ""], range(3)), 2.5 * plain)
    (aimed,) = VaderRewardTowards().wrap(Redness(), target=1.0, weight=0.5)
    torch.testing.assert_close(aimed(video, ["", ""], range(3)), -0.5 * (1 - plain))


def test_images_and_videos_convert_both_ways() -> None:
    video = torch.rand(3, 2, 3, 4, 5)
    assert torch.equal(to_videos(to_images(video), 3), video)
    with pytest.raises(InputError, match="baseline has 6 images"):
        to_videos(to_images(video), 4, "baseline")
    grid = tiled(video)
    assert grid.shape == (2, 3, 8, 10)
    assert torch.equal(grid[:, :, :4, 5:], video[1])
    assert torch.equal(grid[:, :, 4:, :5], video[2])
    assert not grid[:, :, 4:, 5:].any()


def test_a_limit_spreads_over_the_list() -> None:
    assert rows(240, 3) == [0, 80, 160]
    assert rows(2, 5) == rows(2, 0) == [0, 1]


def test_scores_are_told_per_part_and_against_the_baseline() -> None:
    prompts = PromptSet(("a",), ("b", "c"))
    images = torch.zeros(6, 4, 4, 3)
    brighter = images.clone()
    brighter[2:, ..., 0] = 0.5
    (table,) = VaderScoreVideo().score(brighter, prompts, Redness(), images)["result"]
    assert prompts.texts == ("a", "b", "c")
    first, second = table.split("\n\n")
    assert first.startswith("1 training prompts")
    assert "+0.0000" in first
    assert second.startswith("2 held-out prompts")
    assert "+0.5000" in second
    with pytest.raises(InputError, match="5 images"):
        VaderScoreVideo().score(images[:5], prompts, Redness())


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'timm'", name="timm.models"),
        ModuleNotFoundError("Could not import YolosModel: timm is missing"),  # as transformers says it, without a name
    ],
)
def test_a_missing_package_disables_its_reward_alone(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    load = registry.load

    def lacking(kind: str, name: str) -> Any:
        if name == "yolos":
            raise error
        return load(kind, name)

    monkeypatch.setattr(registry, "load", lacking)
    nodes = reward_nodes()
    assert nodes["VaderRewardAesthetic"].INPUT_TYPES()["optional"]
    yolos = nodes["VaderRewardYolos"]
    assert "timm" in yolos.DESCRIPTION
    with pytest.raises(InputError, match="timm"):
        yolos().make(threshold=0.5)
    data = {"1": {"class_type": "VaderRewardYolos", "inputs": {"threshold": 0.5}}}
    with pytest.raises(InputError, match=r"node 1 .* not available: .*timm") as caught:
        validate.check(workflow.parse(data), nodes)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mistake_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str, name: str) -> Any:
        raise ImportError("cannot import name", name="vader_nodes.vader_backend.rewards.base")

    monkeypatch.setattr(registry, "load", broken)
    with pytest.raises(ImportError):
        reward_nodes()


def test_the_english_names_are_those_of_the_classes() -> None:
    assert json.loads(locales.FILE.read_text(encoding="utf-8")) == locales.definitions(), "run `make locales`"


def test_image_prompts_take_connected_images_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(3, 4, 6, 4)
    prompts, text = VaderImagePrompts().read(images, source="connected", text="a\nb\nc", held_out_fraction=0.34)
    assert sorted(text.splitlines()) == ["a", "b", "c"]
    for caption, image in zip(prompts.texts, prompts.images, strict=True):
        assert torch.equal(image, images["abc".index(caption), :, :, :3].permute(2, 0, 1))
    monkeypatch.setattr(host.current(), "base", tmp_path)
    assert "no folder 'kites'" in str(VaderImagePrompts.VALIDATE_INPUTS(source="folder", folder="kites"))
    (tmp_path / "input" / "kites").mkdir(parents=True)
    assert "no pictures" in str(VaderImagePrompts.VALIDATE_INPUTS(source="folder", folder="kites"))
    before = VaderImagePrompts.IS_CHANGED(source="folder", folder="kites")
    (tmp_path / "input" / "kites" / "a.png").write_bytes(b"")
    assert VaderImagePrompts.VALIDATE_INPUTS(source="folder", folder="kites") is True
    assert VaderImagePrompts.IS_CHANGED(source="folder", folder="kites") != before
    assert "'..'" in str(VaderImagePrompts.VALIDATE_INPUTS(source="folder", folder="../x"))
