"""Draws the pictures of the help pages: each node with what it is wired to in an example.

The example is a shipped workflow, or the quickstart with another reward in it. Run with `make screenshots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..nodes import NODE_CLASS_MAPPINGS, workflow
from . import frontend, workflow_sources

if TYPE_CHECKING:
    from playwright.sync_api import Page

FOLDER = workflow_sources.ROOT / "nodes" / "web" / "docs" / "images"
_WIDTH = 900  # pixels; the help panel is rarely wider
_DRAW = """async ([api, name, width]) => {
    app.graph.clear();
    await app.loadApiJson(api, "workflow");
    const node = app.graph.nodes.find((node) => node.comfyClass === name);
    const links = [...app.graph.links.values()];
    const around = (mine, other) => {
        const ids = links.filter((link) => link[mine] === node.id).map((link) => link[other]);
        return [...new Set(ids)].map((id) => app.graph.getNodeById(id));
    };
    const columns = [around("target_id", "origin_id"), [node], around("origin_id", "target_id")];
    app.graph.nodes.filter((other) => !columns.flat().includes(other)).forEach((other) => app.graph.remove(other));
    const margin = 30, title = 30;
    let x = 0, bottom = 0;
    for (const column of columns.filter((column) => column.length)) {
        let y = 0;
        for (const member of column) {
            member.size = [300, member.computeSize()[1]];
            member.pos = [x, y];
            if (member !== node && member.widgets?.length > 8) member.collapse();
            y += (member.flags.collapsed ? 0 : member.size[1]) + title + margin;
        }
        bottom = Math.max(bottom, y - title - margin);
        x += 360;
    }
    const scale = width / (x - 60 + 2 * margin);
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [margin, title + margin];
    app.canvas.deselectAll();
    app.canvas.setDirty(true, true);
    return Math.ceil(scale * (bottom + title + 2 * margin));
}"""


def examples() -> dict[str, dict[str, Any]]:
    """A graph in API format for each node of the pack."""
    known = workflow_sources.sources()
    names = sorted(known, key=lambda name: (bool(workflow_sources.downloads(known[name])), name != "quickstart"))
    graphs = [workflow_sources.graph(known[name]) for name in names]
    shipped = {node["class_type"]: graph for graph in reversed(graphs) for node in graph.values()}
    shipped["VaderRewardTable"] = _beside("VaderScoreVideo", shipped["VaderScoreVideo"], "VaderRewardTable")
    shipped["VaderEstimateMemory"] = _beside("VaderTrainLoRA", graphs[0], "VaderEstimateMemory")
    return {name: shipped.get(name) or _with_reward(graphs[0], name) for name in NODE_CLASS_MAPPINGS}


def _beside(neighbour: str, graph: dict[str, Any], name: str) -> dict[str, Any]:
    """The graph with a node that stands in no workflow, wired to what its neighbour is wired to where it takes that."""
    links = next(node["inputs"] for node in graph.values() if node["class_type"] == neighbour)
    takes = workflow.inputs(NODE_CLASS_MAPPINGS[name])
    inputs = {key: value for key, value in links.items() if key in takes and workflow.is_link(value)}
    return {**graph, str(1 + max(map(int, graph))): {"class_type": name, "inputs": inputs}}


def _with_reward(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """The graph with a reward that stands in no workflow: before the Train node, after another where it takes one."""
    train = next(key for key, node in graph.items() if node["class_type"] == "VaderTrainLoRA")
    old, own = graph[train]["inputs"]["reward"], str(1 + max(map(int, graph)))
    takes = "reward" in NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    node = {"class_type": name, "inputs": {"reward": old} if takes else {}}
    changed = {**graph[train], "inputs": {**graph[train]["inputs"], "reward": [own, 0]}}
    return {**graph, own: node, train: changed}


def _take(page: Page, name: str, graph: dict[str, Any]) -> None:
    page.add_style_tag(content=frontend.BARE)
    height = page.evaluate(_DRAW, [graph, name, _WIDTH])
    page.set_viewport_size({"width": _WIDTH, "height": height})
    page.wait_for_timeout(500)
    page.locator("#graph-canvas").screenshot(path=FOLDER / f"{name}.jpg", type="jpeg", quality=80)


def main() -> None:
    """Draw every picture anew."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with frontend.serving() as address:
        for name, graph in examples().items():
            with frontend.opened(address) as page:
                _take(page, name, graph)
            print((FOLDER / f"{name}.jpg").relative_to(workflow_sources.ROOT))


if __name__ == "__main__":
    main()
