"""The pack in a real ComfyUI server: loading, workflows, mistakes, cached results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfyui.graphs import LORA, SAMPLE, TRAIN, checked, core, files, run_folder, sampling, steps, training
from tiny_graph import QUICK, node, quick
from vader_nodes.nodes import NODE_CLASS_MAPPINGS
from vader_nodes.tools.comfyui import PACK, Server
from vader_nodes.tools.comfyui_client import Prompt, Refused
from vader_nodes.tools.workflow_sources import FOLDER, downloads, sources

API = FOLDER / "api"
DOWNLOADS = {name: found for name, source in sources().items() if (found := downloads(source))}


def test_the_pack_loads_without_a_warning(comfy: Server) -> None:
    started = comfy.log.read_text(encoding="utf-8").split("Starting server")[0]
    about = [line for line in started.splitlines() if PACK in line or "vader" in line.lower()]
    assert len(about) == 1
    assert "seconds:" in about[0]  # the list of import times, which says "seconds (IMPORT FAILED):" of a broken pack


def test_every_node_is_offered_with_a_tooltip_for_every_input(comfy: Server) -> None:
    offered = comfy.client.object_info()
    assert set(NODE_CLASS_MAPPINGS) <= set(offered)
    for name in NODE_CLASS_MAPPINGS:
        declared = offered[name]["input"]
        entries = {**declared.get("required", {}), **declared.get("optional", {})}
        assert [key for key, entry in entries.items() if not entry[1].get("tooltip", "").strip()] == [], name


def test_help_pages_are_served(comfy: Server, root: Path) -> None:
    for page in (root / "nodes" / "web" / "docs").glob("*.md"):
        assert comfy.client.text(f"/extensions/{PACK}/docs/{page.name}") == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(sources().keys() - DOWNLOADS))
def test_shipped_workflows_run(comfy: Server, name: str) -> None:
    prompt: Prompt = quick(json.loads((API / f"{name}.json").read_text(encoding="utf-8")))
    folders = comfy.base / "output" / "vader_runs"
    before = set(folders.glob("*"))
    run = checked(comfy.client.run(prompt))
    cached = {key for data in run.of("execution_cached") for key in data["nodes"]}
    assert run.ran | cached == set(prompt)
    trained = set(folders.glob("*")) > before  # else it shares the finished run of another workflow
    slow = {
        key
        for key, entry in prompt.items()
        if "steps" in QUICK.get(entry["class_type"], {}) and (trained or entry["class_type"] != "VaderTrainLoRA")
    }
    assert slow - cached <= {data["node"] for data in run.of("progress")}
    assert any(state["state"] == "running" for data in run.of("progress_state") for state in data["nodes"].values())
    assert files(comfy, run)
    assert [file for file in files(comfy, run) if not file.is_file()] == []


@pytest.mark.parametrize("name", DOWNLOADS)
def test_workflows_without_their_downloads_are_refused(comfy: Server, name: str) -> None:
    with pytest.raises(Refused) as refused:
        comfy.client.run(json.loads((API / f"{name}.json").read_text(encoding="utf-8")))
    lacking = {model["name"] for model in DOWNLOADS[name] if model["directory"] == "reward_models"}
    assert [model for model in lacking if model in refused.value.details()]


def change(prompt: Prompt, key: str, **inputs: Any) -> Prompt:
    return {**prompt, key: {**prompt[key], "inputs": {**prompt[key]["inputs"], **inputs}}}


TYPED = {"2": node("VaderPrompts", source="typed", text=" \n")}


@pytest.mark.parametrize(
    ("prompt", "key", "sentence"),
    [
        (training("wrong", k=5), TRAIN, "K is 5; with 2 sampling steps it must be between 1 and 2."),
        (change(training("wrong"), TRAIN, name="../up"), TRAIN, "name is '../up'; enter a plain name without '..'"),
        ({**training("wrong"), **TYPED}, "2", "holds no prompt; write at least one line that is not blank."),
        (change(training("wrong"), LORA, filename_prefix="a/../b"), LORA, "enter a plain name without '..'"),
        (sampling("wrong", lora_name="absent.safetensors"), SAMPLE, "There is no 'absent.safetensors' in"),
        (sampling("wrong", lora_name="../absent.safetensors"), SAMPLE, "enter a plain name without '..'"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_our_words(comfy: Server, prompt: Prompt, key: str, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        comfy.client.run(prompt)
    assert set(refused.value.errors) == {key}
    assert sentence in refused.value.details()
    assert comfy.client.queue() == 0


def test_mistakes_that_only_a_run_can_find_are_told_in_our_words(comfy: Server) -> None:
    blind = {**training("blind"), "3": node("VaderRewardMiniOracle")}
    assert comfy.client.run(blind).error.startswith("The reward oracle has no gradient, so VADER cannot train on it;")
    assert not list((comfy.output / "vader_runs").glob("blind_*"))
    error = comfy.client.run(sampling("odd", width=9)).error
    assert error.strip() == "width is 9; tiny needs a multiple of 2."


def test_a_lora_of_another_model_is_refused_in_our_words(comfy: Server) -> None:
    checked(comfy.client.run(training("foreign")))
    prompt = change(sampling("foreign", lora_name="foreign_00001.safetensors"), "1", checkpoint="mini/modelscope")
    run = comfy.client.run(prompt)
    assert run.error.startswith("This LoRA does not fit modelscope")
    assert run.error.strip().endswith("It was made for tiny; load that model, or choose another LoRA.")


def test_the_same_prompt_again_runs_nothing(comfy: Server) -> None:
    prompt = training("cached")
    checked(comfy.client.run(prompt))
    again = checked(comfy.client.run(prompt))
    assert again.ran == set()
    assert set(again.of("execution_cached")[0]["nodes"]) == set(prompt)


def test_a_finished_training_is_reused_from_disk(comfy: Server) -> None:
    prompt = training("finished")
    checked(comfy.client.run(prompt))
    metrics = run_folder(comfy, "finished") / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    comfy.client.free()
    checked(comfy.client.run(core("after_free")))  # by its end the server has done what /free asked for
    again = checked(comfy.client.run(prompt))
    assert again.ran == set(prompt)
    assert "of a finished run, reused" in again.outputs[TRAIN]["text"][0]
    assert steps(metrics.parent) == [1, 2]
    assert metrics.stat().st_mtime_ns == before
