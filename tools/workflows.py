"""Writes the workflow files, canvas and API format, from their sources through the real front end.

The front end sizes the nodes, serialises the graph and converts it, so that both files say the same. Run as
`make workflows`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import frontend
from .workflow_sources import FOLDER, ROOT, Source, completed, graph, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from playwright.sync_api import Page

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


def draw(page: Page, name: str, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The UI-format and the API-format file of a workflow.

    Every setting is stated: the front end would keep those that are not from the graph that it drew before.
    """
    members: dict[str, list[int]] = {key: [] for key in source["groups"]}
    for number, node in enumerate(source["nodes"].values(), 1):
        members[node["group"]].append(number)
    groups = [{**group, "nodes": members[key]} for key, group in source["groups"].items()]
    given = {"api": completed(graph(source)), "groups": groups, "about": source["about"]}
    given |= {"width": 380, "gap": 60, "room": _ROOM}
    drawn = json.loads(page.evaluate(_DRAW, given))
    models = {number: node.get("models", []) for number, node in enumerate(source["nodes"].values(), 1)}
    return _finished(drawn["ui"], name, models), drawn["api"]


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
    """Write the named workflows anew, or all; a thumbnail that is there is kept, since it may show videos."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.tools.workflows", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a workflow's name; all by default")
    names = parser.parse_args().names or list(sources())
    with frontend.serving() as address, frontend.opened(address) as page:
        for name in names:
            ui, api = draw(page, name, sources()[name])
            if not (thumbnail := FOLDER / f"{name}.jpg").exists():
                picture(page, thumbnail)
            write(FOLDER / f"{name}.json", ui)
            write(FOLDER / "api" / f"{name}.json", api)
            print(f"{name}: {len(api)} nodes", flush=True)


if __name__ == "__main__":
    main()
