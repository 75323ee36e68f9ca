"""Turns an API-format workflow into ComfyUI's canvas format (version 0.4), laid out in columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .workflow import Classes, Node, inputs, is_link

_WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING")
_COLUMNS = (
    "Model, prompts, reward",
    "Base videos and training",
    "Aligned videos",
    "Compare and save",
    "Files",
    "Files",
)
_WIDTH, _GAP, _TOP = 340, 90, 160
_ROW, _HEAD, _TEXT = 24, 50, 90
_PACK = {"cnr_id": "vader-video-alignment", "ver": "0.1.0"}


def to_canvas(nodes: Mapping[str, Node], classes: Classes, note: str = "") -> dict[str, Any]:
    """The canvas form of a checked workflow whose ids are whole numbers.

    Every widget has its value in the order of the node's inputs, a seed followed by what happens after a run.

    Args:
        note: text of a note above the nodes.
    """
    links = _links(nodes, classes)
    depth = _depths(nodes)
    entries: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for column in range(max(depth.values()) + 1):
        y = _TOP
        x = column * (_WIDTH + _GAP)
        for key in (key for key in nodes if depth[key] == column):
            entry = _entry(nodes[key], classes[nodes[key].class_type], links, len(entries))
            entry["pos"] = [x, y]
            y += entry["size"][1] + _GAP // 2
            entries.append(entry)
        title = _COLUMNS[min(column, len(_COLUMNS) - 1)]
        groups.append(_group(len(groups) + 1, title, [x - 20, _TOP - 80, _WIDTH + 40, y - _TOP + 80]))
    last = max(entry["id"] for entry in entries)
    if note:
        last += 1
        entries.append(_note(last, note, len(entries)))
    return {
        "last_node_id": last, "last_link_id": len(links), "nodes": entries, "links": links, "groups": groups,
        "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def _links(nodes: Mapping[str, Node], classes: Classes) -> list[list[Any]]:
    """[link id, source, output, target, input, type] for every link."""
    found: list[list[Any]] = []
    for node in nodes.values():
        sockets = _sockets(classes[node.class_type])
        for name, value in node.inputs.items():
            if is_link(value):
                place = list(sockets).index(name)
                found.append([len(found) + 1, int(value[0]), value[1], int(node.id), place, sockets[name]])
    return found


def _sockets(cls: type[Any]) -> dict[str, str]:
    """The inputs that take links only, with their types."""
    return {name: entry[0] for name, entry in inputs(cls).items() if not _is_widget(entry[0])}


def _is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in _WIDGETS


def _values(node: Node, cls: type[Any]) -> list[Any]:
    values = []
    for name, (kind, options) in inputs(cls).items():
        if _is_widget(kind):
            values.append(node.inputs.get(name, options.get("default")))
            if "control_after_generate" in options:
                values.append("fixed")
    return values


def _depths(nodes: Mapping[str, Node]) -> dict[str, int]:
    """How many links lie between a node and the start, at most."""
    known: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in known:
            sources = [value[0] for value in nodes[key].inputs.values() if is_link(value)]
            known[key] = 1 + max((depth(source) for source in sources), default=-1)
        return known[key]

    return {key: depth(key) for key in nodes}


def _entry(node: Node, cls: type[Any], links: list[list[Any]], order: int) -> dict[str, Any]:
    key = int(node.id)
    sockets = _sockets(cls).items()
    incoming = {link[4]: link[0] for link in links if link[3] == key}
    outgoing = [[link[0] for link in links if link[1] == key and link[2] == i] for i in range(len(cls.RETURN_TYPES))]
    return {
        "id": key, "type": node.class_type, "pos": [0, 0], "size": [_WIDTH, _height(cls)], "flags": {}, "order": order,
        "mode": 0, "title": node.title or node.class_type,
        "inputs": [
            {"name": name, "type": kind, "link": incoming.get(i)} for i, (name, kind) in enumerate(sockets)
        ],
        "outputs": [
            {"name": name, "type": kind, "links": outgoing[i] or None, "slot_index": i}
            for i, (name, kind) in enumerate(zip(cls.RETURN_NAMES, cls.RETURN_TYPES, strict=True))
        ],
        "properties": {"Node name for S&R": node.class_type, **_PACK},
        "widgets_values": _values(node, cls),
    }  # fmt: skip


def _height(cls: type[Any]) -> int:
    """Roughly what the front end needs when the advanced widgets are in sight."""
    declared = inputs(cls).values()
    texts = sum(1 for _, options in declared if options.get("multiline"))
    extra = sum(1 for _, options in declared if "control_after_generate" in options)
    return _HEAD + _ROW * (len(declared) + extra) + _TEXT * texts


def _group(key: int, title: str, bounding: list[int]) -> dict[str, Any]:
    return {"id": key, "title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}}


def _note(key: int, text: str, order: int) -> dict[str, Any]:
    return {
        "id": key, "type": "Note", "pos": [0, -100], "size": [2 * _WIDTH, 140], "flags": {}, "order": order, "mode": 0,
        "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text], "title": "About",
    }  # fmt: skip
