"""Writes the workflow files, canvas and API format, from workflows/source/*.toml through the real front end.

A source names the nodes, their inputs and the groups they stand in; a string "@name" or "@name.output"
is a link. The front end sizes the nodes, serialises the graph and converts it, so that both files say
the same. Run as `make workflows`.
"""

from __future__ import annotations

import io
import json
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..nodes import NODE_CLASS_MAPPINGS
from . import frontend

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
_GROUP_KEYS = {"title", "color", "note", "nodes"}
_NODE_KEYS = {"class", "title", "inputs", "models"}
_ROOM = {  # what nodes grow by while they run, in pixels of the canvas
    "VaderTrainLoRA": 420,
    "VaderApplyLoRASample": 260,
    "VaderCompareVideos": 260,
    "VaderSaveVideo": 300,
    "VaderSaveLoRA": 50,
    "VaderScoreVideo": 260,
}
_DRAW = """async ({ api, groups, about, width, gap, room }) => {
    const graph = app.graph;
    graph.clear();
    await app.loadApiJson(api, "workflow");
    const note = (text, x, y) => {
        const node = LiteGraph.createNode("MarkdownNote");
        graph.add(node);
        node.widgets[0].value = text;
        const shown = text.replace(/\\]\\([^)]*\\)/g, "]").split("\\n");
        const lines = shown.reduce((sum, line) => sum + 1 + Math.floor(line.length / 58), 0);
        node.pos = [x, y];
        node.size = [width, 60 + 19 * lines];
        return node;
    };
    const top = gap + note(about, 0, 0).size[1] + 60;
    let x = 0;
    for (const group of groups) {
        let y = top;
        const members = group.nodes.map((id) => graph.getNodeById(id));
        if (group.note) y += note(group.note, x, y).size[1] + gap;
        for (const node of members) {
            node.size = [width, node.computeSize()[1]];
            node.pos = [x, y];
            y += node.size[1] + gap + (room[node.comfyClass] ?? 0);
        }
        const box = new LiteGraph.LGraphGroup(group.title);
        box.color = group.color;
        box.pos = [x - 20, top - 90];
        box.size = [width + 40, y - top + 90 - gap / 2];
        graph.add(box);
        x += width + gap + 40;
    }
    return JSON.stringify({ ui: graph.serialize(), api: (await app.graphToPrompt()).output });
}"""

_SHOW = """([width]) => {
    const boxes = [...app.graph.nodes, ...app.graph.groups].map((box) => [...box.pos, ...box.size]);
    const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]));
    app.graph.nodes.forEach((node) => { node.has_errors = false; });
    app.canvas.ds.scale = width / (Math.max(...boxes.map((box) => box[0] + box[2])) - left);
    app.canvas.ds.offset = [-left, 40 - top];
    app.canvas.setDirty(true, true);
}"""
_VIEW, _THUMBNAIL = (1672, 866), (836, 433)  # pixels


def sources() -> list[Path]:
    """The source files, by name."""
    return sorted((FOLDER / "source").glob("*.toml"))


def downloads(path: Path) -> list[dict[str, str]]:
    """What the nodes of a source ask for that is not embedded: each model's name, url, and directory in models/."""
    nodes = tomllib.loads(path.read_text(encoding="utf-8"))["nodes"].values()
    return [model for node in nodes for model in node.get("models", [])]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A source file and its graph in API format, ids counted from 1 in the order of the nodes.

    Raises:
        ValueError: it has keys that mean nothing, or a link or group names no node or output.
    """
    source = tomllib.loads(path.read_text(encoding="utf-8"))
    ids = {name: str(number) for number, name in enumerate(source["nodes"], 1)}
    _check(source, path.name)
    api = {
        ids[name]: {
            "class_type": node["class"],
            "inputs": {key: _value(value, source["nodes"], ids) for key, value in node.get("inputs", {}).items()},
            "_meta": {"title": node["title"]},
        }
        for name, node in source["nodes"].items()
    }
    return source, api


def _check(source: dict[str, Any], name: str) -> None:
    strange = [key for node in source["nodes"].values() for key in node.keys() - _NODE_KEYS]
    strange += [key for group in source["groups"] for key in group.keys() - _GROUP_KEYS]
    grouped = sorted(member for group in source["groups"] for member in group["nodes"])
    if strange or grouped != sorted(source["nodes"]):
        raise ValueError(f"{name}: unknown keys {strange}, or a node that stands in no group or in two")


def _value(value: Any, nodes: dict[str, Any], ids: dict[str, str]) -> Any:
    """A literal as it is; "@name.output" as [id, number of the output]."""
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    name, _, output = value[1:].partition(".")
    outputs = NODE_CLASS_MAPPINGS[nodes[name]["class"]].RETURN_NAMES
    return [ids[name], outputs.index(output) if output else 0]


def draw(page: Page, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The UI-format and the API-format file of a source."""
    source, api = read(path)
    numbers = {name: number for number, name in enumerate(source["nodes"], 1)}
    groups = [{**group, "nodes": [numbers[name] for name in group["nodes"]]} for group in source["groups"]]
    given = {"api": api, "groups": groups, "about": source["about"], "width": 380, "gap": 60, "room": _ROOM}
    drawn = json.loads(page.evaluate(_DRAW, given))
    models = {numbers[name]: node.get("models", []) for name, node in source["nodes"].items()}
    return _finished(drawn["ui"], path.stem, models), drawn["api"]


def _finished(ui: dict[str, Any], name: str, models: dict[int, list[dict[str, str]]]) -> dict[str, Any]:
    """Stable ids, the pack that each node is from, and where its checkpoints are downloaded."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for node in ui["nodes"]:
        if node["type"].startswith("Vader"):
            node["properties"] |= {"cnr_id": frontend.PACK, "ver": version}
            if models[node["id"]]:
                node["properties"]["models"] = models[node["id"]]
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{frontend.PACK}/{name}"))
    return {**ui, "id": identity, "revision": 0, "extra": {}}


def picture(page: Page, path: Path) -> None:
    """A thumbnail of the graph on the page, its upper part in full width, for the template browser."""
    page.set_viewport_size({"width": _VIEW[0], "height": _VIEW[1]})
    page.add_style_tag(content=frontend.BARE)
    page.evaluate(_SHOW, list(_VIEW))
    page.wait_for_timeout(1000)
    with Image.open(io.BytesIO(page.locator("#graph-canvas").screenshot())) as shot:
        shot.convert("RGB").resize(_THUMBNAIL, Image.Resampling.LANCZOS).save(path, quality=80)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write every workflow file anew; a thumbnail that is there is kept, since it may show videos."""
    with frontend.serving() as address:
        for path in sources():
            with frontend.opened(address) as page:
                ui, api = draw(page, path)
                if not (thumbnail := FOLDER / f"{path.stem}.jpg").exists():
                    picture(page, thumbnail)
            write(FOLDER / f"{path.stem}.json", ui)
            write(FOLDER / "api" / f"{path.stem}.json", api)
            print(f"{path.stem}: {len(api)} nodes")


if __name__ == "__main__":
    main()
