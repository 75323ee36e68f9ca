"""The shipped workflows are sound, and ComfyUI's front end reads the canvas files as the API files say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, graph, validate, workflow
from vader_nodes.tools import frontend
from vader_nodes.tools.workflow_sources import FOLDER, downloads, sources
from vader_nodes.tools.workflow_sources import graph as source_graph
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.config import InputError

NAMES = list(sources())
DOWNLOADS = {name: found for name, source in sources().items() if (found := downloads(source))}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    reason = frontend.missing()
    if reason is not None:
        pytest.skip(reason)
    with frontend.serving() as address, frontend.opened(address) as page:
        yield page


def inputs(class_type: str) -> dict[str, Any]:
    """A class's inputs by name, as it declares them."""
    parts = NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES().values()
    return {name: entry for part in parts for name, entry in part.items()}


def default(entry: Any) -> Any:
    return entry[1].get("default", entry[0][0])


def embed(nodes: dict[str, workflow.Node], models: list[dict[str, str]]) -> set[str]:
    """Set every input that names a download, or the folder it lies in, to its default; the downloads so named."""
    found = set()
    for node in nodes.values():
        for key, value in node.inputs.items():
            named = {model["name"] for model in models if value in (model["name"], model["name"].partition("/")[0])}
            if named:
                node.inputs[key] = default(inputs(node.class_type)[key])
                found |= named
    return found


@pytest.mark.parametrize("name", NAMES)
def test_shipped_workflows_are_sound(name: str, empty_base: Path) -> None:
    """Those of the real models too, once what they name is there."""
    nodes = workflow.load(FOLDER / "api" / f"{name}.json")
    for folder in {value for node in nodes.values() for key, value in node.inputs.items() if key.endswith("folder")}:
        (empty_base / "input" / folder).mkdir(parents=True, exist_ok=True)
        (empty_base / "input" / folder / "a_red_kite.png").touch()
    models = DOWNLOADS.get(name, [])
    assert embed(nodes, models) == {model["name"] for model in models}
    validate.check(nodes, NODE_CLASS_MAPPINGS)
    assert len(graph.order(nodes, NODE_CLASS_MAPPINGS)) == len(nodes)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_workflow_without_its_downloads_is_refused(name: str, empty_base: Path) -> None:
    lacking = [re.escape(model["name"]) for model in DOWNLOADS[name] if model["directory"] == "reward_models"]
    with pytest.raises(InputError, match="|".join(lacking)):
        validate.check(workflow.load(FOLDER / "api" / f"{name}.json"), NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_canvas_file_says_where_its_downloads_are(name: str) -> None:
    drawn = read(FOLDER / f"{name}.json")
    stated = [model for node in drawn["nodes"] for model in node["properties"].get("models", [])]
    assert stated == DOWNLOADS[name]
    notes = "\n".join(str(node["widgets_values"]) for node in drawn["nodes"] if node["type"] == "MarkdownNote")
    for model in stated:
        assert model["url"].startswith("https://")
        assert model["url"].split("/")[2] in notes
        assert f"models/{model['directory']}" in notes


def test_each_family_has_its_quickstart() -> None:
    assert {f"quickstart_{family}" for family in registry.names("models")} <= set(DOWNLOADS)


def test_each_workflow_has_its_source() -> None:
    assert set(NAMES) >= {"quickstart", "demo"}
    for pattern in ("*.json", "*.jpg", "api/*.json"):
        assert sorted(path.stem for path in FOLDER.glob(pattern)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_api_file_says_what_the_source_says(name: str) -> None:
    wanted = source_graph(sources()[name])
    shipped = read(FOLDER / "api" / f"{name}.json")
    assert shipped.keys() == wanted.keys()
    for key, node in wanted.items():
        assert {**shipped[key], "inputs": {**shipped[key]["inputs"], **node["inputs"]}} == shipped[key]
        assert shipped[key]["class_type"] == node["class_type"]
        declared = inputs(node["class_type"])
        for name, value in shipped[key]["inputs"].items():
            if name not in node["inputs"]:
                assert value == default(declared[name]), f"{key}.{name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_canvas_file_explains_itself_and_nothing_overlaps(name: str) -> None:
    drawn = read(FOLDER / f"{name}.json")
    assert drawn["version"] == 0.4
    assert drawn["groups"]
    assert any(entry["type"] == "MarkdownNote" for entry in drawn["nodes"])
    ours = [entry["properties"] for entry in drawn["nodes"] if entry["type"].startswith("Vader")]
    assert {properties["cnr_id"] for properties in ours} == {frontend.PACK}
    boxes = [(*entry["pos"], *entry["size"]) for entry in drawn["nodes"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, a, b in boxes[:i]:
            assert x + w <= u or u + a <= x or y + h <= v or v + b <= y


@pytest.mark.parametrize("name", NAMES)
def test_the_front_end_converts_the_canvas_file_to_the_api_file(page: Any, name: str) -> None:
    converted = frontend.converted(page, read(FOLDER / f"{name}.json"))
    assert converted == read(FOLDER / "api" / f"{name}.json")


def test_a_shifted_widget_or_a_missing_node_would_be_seen(page: Any) -> None:
    drawn = read(FOLDER / "quickstart.json")
    sample = next(entry for entry in drawn["nodes"] if entry["type"] == "VaderApplyLoRASample")
    sample["widgets_values"].remove("fixed")
    sample.pop("widgets_values_named", None)
    assert frontend.converted(page, drawn) != read(FOLDER / "api" / "quickstart.json")
    sample["type"] = "VaderNoSuchNode"
    with pytest.raises(ValueError, match="VaderNoSuchNode"):
        frontend.converted(page, drawn)
