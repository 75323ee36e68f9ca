"""The pack on the canvas of a real ComfyUI: opening, running, reloading, and what an error dialog says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from vader_nodes.tools import frontend, workflow_sources
from vader_nodes.tools.comfyui import Server
from vader_nodes.vader_backend.memory.options import PRESETS

NAMES = list(workflow_sources.sources())
PANEL = "id => app.graph.getNodeById(id)?.vaderPanel?.root.innerText ?? ''"
TRAIN = 5  # the Train node of the quickstart
MEMORY = 4  # the Memory node of quickstart_modelscope
WIDGETS = "id => Object.fromEntries(app.graph.getNodeById(id).widgets.map(({ name, value }) => [name, value]))"
CHANGE = """async ([id, name, value]) => {
    await new Promise((done) => setTimeout(done)); // no user is faster than a node that has just been made
    const node = app.graph.getNodeById(id), widget = node.widgets.find((one) => one.name === name);
    widget.setValue(value, { e: {}, node, canvas: app.canvas });
}"""


@pytest.fixture(scope="module")
def page(comfy: Server) -> Iterator[Any]:
    reason = frontend.missing()
    if reason is not None:
        pytest.skip(reason)
    comfy.client.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
    with frontend.opened(f"http://{comfy.client.address}") as page:
        yield page


def drawn(name: str, /, **widgets: Any) -> dict[str, Any]:
    """A shipped canvas file; `widgets` are changed wherever a node has them."""
    ui = json.loads((workflow_sources.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for node in ui["nodes"]:
        named = node.pop("widgets_values_named", {})
        for position, key in enumerate(named):
            if key in widgets:
                node["widgets_values"][position] = widgets[key]
    return ui


def opened(page: Any, ui: dict[str, Any]) -> None:
    page.evaluate("async ui => { await app.loadGraphData(ui); }", ui)


def press_run(page: Any) -> None:
    page.get_by_role("button", name="Run", exact=True).first.click()


@pytest.mark.parametrize("name", NAMES)
def test_canvas_files_open_and_convert_to_their_api_files(page: Any, name: str) -> None:
    converted = frontend.converted(page, drawn(name))
    assert converted == json.loads((workflow_sources.FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_template_browser_lists_the_workflows(comfy: Server) -> None:
    assert set(comfy.client.get("/workflow_templates")[frontend.PACK]) == set(NAMES)


def test_a_help_page_shows_its_pictures(page: Any) -> None:
    opened(page, drawn("quickstart"))
    page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", TRAIN)
    page.get_by_test_id("info-button").click()
    page.get_by_text("Common mistakes").wait_for(timeout=20_000)
    widths = page.eval_on_selector_all("img[src*='/docs/images/']", "all => all.map(one => one.naturalWidth)")
    assert len(widths) == 2
    assert min(widths) > 0


def test_the_train_node_shows_its_run_also_after_a_reload(page: Any, comfy: Server) -> None:
    ui = drawn("quickstart", steps=4, sampling_steps=4, limit=1, preview_every=2, batch_size=1, name="canvas")
    opened(page, ui)
    press_run(page)
    page.wait_for_function(f"({PANEL})({TRAIN}).includes('step')", timeout=60_000)
    page.reload()
    page.wait_for_function("() => window.app?.graph && app.extensionManager", timeout=60_000)
    opened(page, ui)
    page.wait_for_function(f"({PANEL})({TRAIN}).includes('4 steps')", timeout=90_000)
    assert "held-out reward" in page.evaluate(PANEL, TRAIN)
    assert page.evaluate("id => app.graph.getNodeById(id).vaderPanel.video.getAttribute('src')", TRAIN)


def test_a_refused_run_shows_our_sentence(page: Any) -> None:
    opened(page, drawn("quickstart", k=21))
    press_run(page)
    page.get_by_text("K is 21", exact=False).first.wait_for(timeout=20_000)


def test_a_preset_fills_in_the_settings_and_another_setting_is_custom(page: Any) -> None:
    opened(page, drawn("quickstart_modelscope"))
    page.evaluate(CHANGE, [MEMORY, "preset", "16 GB"])
    filled = {"preset": "16 GB", **asdict(PRESETS["16 GB"])}
    assert page.evaluate(WIDGETS, MEMORY) == filled
    page.evaluate(CHANGE, [MEMORY, "stepwise", False])
    assert page.evaluate(WIDGETS, MEMORY) == {**filled, "stepwise": False, "preset": "custom"}
    page.evaluate(CHANGE, [MEMORY, "preset", "off"])
    assert page.evaluate(WIDGETS, MEMORY) == {"preset": "off", **asdict(PRESETS["off"])}


@pytest.mark.parametrize("preset", ["24 GB", "custom"])
def test_opening_a_workflow_changes_no_setting_of_its_memory_node(page: Any, preset: str) -> None:
    saved = {"preset": preset, **asdict(PRESETS["12 GB"]), "decode_tile": 64}
    ui = drawn("quickstart_modelscope", **saved)
    opened(page, ui)
    assert page.evaluate(WIDGETS, MEMORY) == saved
    page.evaluate("async ui => { await app.loadApiJson(ui, 'again'); }", frontend.converted(page, ui))
    assert page.evaluate(WIDGETS, MEMORY) == saved
    page.evaluate(CHANGE, [MEMORY, "preset", "48 GB"])
    assert page.evaluate(WIDGETS, MEMORY) == {"preset": "48 GB", **asdict(PRESETS["48 GB"])}
