"""The shipped workflows are sound, and the canvas file says the same as the API file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_graph import story
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, canvas, graph, validate, workflow

SHIPPED = sorted((Path(__file__).parents[2] / "workflows" / "api").glob("*.json"))
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING")


def from_canvas(drawn: dict[str, Any], classes: workflow.Classes) -> dict[str, Any]:
    """Read a canvas file by position, as the front end does."""
    links = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    found: dict[str, Any] = {}
    for entry in drawn["nodes"]:
        if entry["type"] == "Note":
            continue
        values = list(entry["widgets_values"])
        named: dict[str, Any] = {}
        for name, (kind, options) in workflow.inputs(classes[entry["type"]]).items():
            if isinstance(kind, list) or kind in WIDGETS:
                named[name] = values.pop(0)
                if "control_after_generate" in options:
                    assert values.pop(0) == "fixed"
        assert values == []
        named |= {slot["name"]: links[slot["link"]] for slot in entry["inputs"] if slot["link"] is not None}
        found[str(entry["id"])] = {"class_type": entry["type"], "inputs": named, "_meta": {"title": entry["title"]}}
    return found


def with_defaults(data: dict[str, Any], classes: workflow.Classes) -> dict[str, Any]:
    """An API workflow with every widget's value written out."""
    full = {}
    for key, entry in data.items():
        declared = workflow.inputs(classes[entry["class_type"]])
        defaults = {name: options["default"] for name, (_, options) in declared.items() if "default" in options}
        title = entry.get("_meta", {"title": entry["class_type"]})
        full[key] = {"class_type": entry["class_type"], "inputs": {**defaults, **entry["inputs"]}, "_meta": title}
    return full


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_workflows_are_sound(path: Path) -> None:
    nodes = workflow.load(path)
    validate.check(nodes, NODE_CLASS_MAPPINGS)
    assert len(graph.order(nodes, NODE_CLASS_MAPPINGS)) == len(nodes)


def test_there_are_a_quickstart_and_a_demo() -> None:
    assert {path.stem for path in SHIPPED} >= {"quickstart", "demo"}


def test_a_canvas_file_reads_back_as_it_was() -> None:
    data = {key: entry for key, entry in story().items() if key not in ("3", "5", "6", "7", "8", "9", "10")}
    data["3"] = {"class_type": "VaderSaveVideo", "inputs": {"images": ["4", 0], "prompts": ["4", 1]}}
    drawn = canvas.to_canvas(workflow.parse(data), NODE_CLASS_MAPPINGS, "About.")
    assert from_canvas(drawn, NODE_CLASS_MAPPINGS) == with_defaults(data, NODE_CLASS_MAPPINGS)


def test_the_shipped_canvas_file_says_what_the_api_file_says(root: Path) -> None:
    drawn = json.loads((root / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
    data = json.loads((root / "workflows" / "api" / "quickstart.json").read_text(encoding="utf-8"))
    assert drawn["version"] == 0.4
    assert from_canvas(drawn, NODE_CLASS_MAPPINGS) == with_defaults(data, NODE_CLASS_MAPPINGS)


def test_nodes_on_the_canvas_do_not_overlap(root: Path) -> None:
    drawn = json.loads((root / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
    boxes = [(*entry["pos"], *entry["size"]) for entry in drawn["nodes"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, a, b in boxes[:i]:
            assert x + w <= u or u + a <= x or y + h <= v or v + b <= y
