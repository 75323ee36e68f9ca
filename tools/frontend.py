"""ComfyUI's real front end in a browser, and a small server that gives it our nodes where there is no ComfyUI."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

if TYPE_CHECKING:
    from aiohttp import web
    from playwright.sync_api import Page

PACK = "vader-video-alignment"
_WEB = Path(__file__).resolve().parents[1] / "nodes" / "web"
BARE = "body * { visibility: hidden } #graph-canvas, .dom-widget, .dom-widget * { visibility: visible }"  # style
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_READY = """() => {
    const known = window.LiteGraph?.registered_node_types ?? {};
    return Boolean(window.app?.graph && window.app.extensionManager && known["VaderTrainLoRA"]);
}"""
_ANSWERS: dict[str, Any] = {
    "users": {"storage": "server", "migrated": True},
    "settings": {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False},
    "system_stats": {"system": {"os": "", "python_version": "", "pytorch_version": "", "comfyui_version": "0.33.0",
                                "embedded_python": False, "argv": [], "ram_total": 0, "ram_free": 0}, "devices": []},
    "queue": {"queue_running": [], "queue_pending": []},
    "jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
    **{name: [] for name in ("embeddings", "userdata", "v2/userdata", "experiment/models")},
}  # fmt: skip


def missing() -> str | None:
    """What is lacking to open the front end here, as a sentence; None if nothing is."""
    for module in ("aiohttp", "playwright", "comfyui_frontend_package"):
        if importlib.util.find_spec(module) is None:
            return f"the front end cannot be opened without the Python package {module}: pip install -e '.[dev]'"
    if _browser() is None:
        return "the front end cannot be opened without a browser: install Chromium (apt install chromium)"
    return None


def _browser() -> str | None:
    return next((found for found in map(shutil.which, _BROWSERS) if found), None)


def object_info() -> dict[str, Any]:
    """Our nodes as ComfyUI's /object_info describes them."""
    return {
        name: {
            "input": cls.INPUT_TYPES(),
            "input_order": {part: list(entries) for part, entries in cls.INPUT_TYPES().items()},
            "is_input_list": False,
            "output": cls.RETURN_TYPES,
            "output_is_list": [False] * len(cls.RETURN_TYPES),
            "output_name": getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES),
            "output_tooltips": getattr(cls, "OUTPUT_TOOLTIPS", ()),
            "output_node": getattr(cls, "OUTPUT_NODE", False),
            "name": name,
            "display_name": NODE_DISPLAY_NAME_MAPPINGS[name],
            "description": cls.DESCRIPTION,
            "category": cls.CATEGORY,
            "python_module": f"custom_nodes.{PACK}",
            "search_aliases": getattr(cls, "SEARCH_ALIASES", []),
        }
        for name, cls in NODE_CLASS_MAPPINGS.items()
    }


@contextmanager
def serving(answers: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Serve comfyui-frontend-package with our nodes on a free port of the loopback; yields the address.

    Args:
        answers: further replies of the server, by their path below /api/.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(_start(answers or {}), loop).result(30)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


async def _start(given: Mapping[str, Any]) -> tuple[web.AppRunner, int]:
    from aiohttp import web

    server = web.Application()
    extensions = [f"/extensions/{PACK}/{path.name}" for path in _WEB.glob("*.js")]
    answers = {**_ANSWERS, "object_info": object_info(), "extensions": extensions, **given}

    async def answer(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        return await _socket(request) if name == "ws" else web.json_response(answers.get(name, {}))

    server.router.add_route("*", "/api/{name:.*}", answer)
    server.router.add_route("*", "/{name:ws}", answer)
    server.router.add_get("/{path:.*}", _file)
    runner = web.AppRunner(server, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


async def _file(request: web.Request) -> web.StreamResponse:
    import comfyui_frontend_package
    from aiohttp import web

    name, ours = request.match_info["path"] or "index.html", f"extensions/{PACK}/"
    folder = _WEB if name.startswith(ours) else Path(comfyui_frontend_package.__file__).parent / "static"
    path = (folder / name.removeprefix(ours)).resolve()
    if not path.is_file() or not path.is_relative_to(folder.resolve()):
        return web.Response(status=404)
    return web.FileResponse(path)


async def _socket(request: web.Request) -> web.WebSocketResponse:
    from aiohttp import web

    socket = web.WebSocketResponse()
    await socket.prepare(request)
    status = {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "0"}
    await socket.send_json({"type": "status", "data": status})
    async for _ in socket:
        pass
    return socket


@contextmanager
def opened(address: str) -> Iterator[Page]:
    """A page on which the front end has started and knows our nodes.

    Draw one graph on it: the front end keeps the values of a graph's widgets by node id for the next one.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_browser(), args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            page.goto(address)
            page.wait_for_function(_READY, timeout=120_000)
            yield page
        finally:
            browser.close()


def converted(page: Page, ui: dict[str, Any]) -> dict[str, Any]:
    """Open a UI-format workflow and return what the front end would post of it, in API format.

    Raises:
        ValueError: the front end does not know all of its nodes.
    """
    lacking = page.evaluate("ui => ui.nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types))", ui)
    if lacking:
        raise ValueError(f"the front end does not know {lacking}")
    return page.evaluate("async ui => { await app.loadGraphData(ui); return (await app.graphToPrompt()).output; }", ui)
