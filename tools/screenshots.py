"""Takes the pictures of docs/images in a real ComfyUI: the canvas, the Train node while it runs, a refused input.

The Train node alone goes into its help page.

Run as `make screenshots`; it runs a third of the quickstart and takes some minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import example_graphs, frontend, workflows
from .comfyui import HOW_TO_GET_ONE, find, serve

if TYPE_CHECKING:
    from playwright.sync_api import Page

FOLDER = workflows.ROOT / "docs" / "images"
_RUN_SECONDS = 1800
_MIDDLE: Any = {"x": 590, "y": 45, "width": 420, "height": 640}
_LOOK = """([name, scale, share]) => {
    const node = app.graph.nodes.find((node) => node.comfyClass === name);
    const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + node.size[1] * share];
    const [width, height] = [app.canvas.canvas.clientWidth, app.canvas.canvas.clientHeight];
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [width / 2 / scale - x, height / 2 / scale - y];
    app.canvas.setDirty(true, true);
}"""
_PROGRESS = """share => {
    const panel = app.graph.nodes.find((node) => node.comfyClass === "VaderTrainLoRA")?.vaderPanel;
    const found = panel?.text.textContent.match(/step (\\d+)\\/(\\d+)/);
    return Boolean(panel?.report.textContent) || (found && found[1] >= share * found[2]);
}"""


def main() -> None:
    """Take every picture anew."""
    installation, reason = find(), frontend.missing()
    if installation is None or reason is not None:
        sys.exit(reason or HOW_TO_GET_ONE)
    with tempfile.TemporaryDirectory() as base, serve(installation, Path(base)) as server:
        server.client.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
        with frontend.opened(f"http://{server.client.address}") as page:
            _open(page, workflows.FOLDER / "quickstart.json")
            _take(page, "canvas", "VaderTrainLoRA", 0.62, 0.42)
            _press_run(page)
            page.wait_for_function(_PROGRESS, arg=0.3, timeout=_RUN_SECONDS * 1000)
            _take(page, "training", "VaderTrainLoRA", 1.0, 0.85)
            page.screenshot(path=example_graphs.FOLDER / "training.jpg", type="jpeg", quality=80, clip=_MIDDLE)
            server.client.interrupt()
            _refuse(page)
            _take(page, "refused", "VaderTrainLoRA", 0.62, 0.3)


def _open(page: Page, path: Path) -> None:
    ui: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate("async ui => { await app.loadGraphData(ui); }", ui)


def _press_run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).first.click()


def _refuse(page: Page) -> None:
    find_k = "app.graph.nodes.find((n) => n.comfyClass === 'VaderTrainLoRA').widgets.find((w) => w.name === 'k')"
    page.evaluate(f"() => {{ {find_k}.value = 21; }}")
    _press_run(page)


def _take(page: Page, name: str, node: str, scale: float, share: float) -> None:
    page.evaluate(_LOOK, [node, scale, share])
    page.wait_for_timeout(3000)
    FOLDER.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=FOLDER / f"{name}.jpg", type="jpeg", quality=85)
    print(f"docs/images/{name}.jpg")


if __name__ == "__main__":
    main()
