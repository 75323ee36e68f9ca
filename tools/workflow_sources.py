"""Reads workflows/source/*.toml: what each workflow holds, and its graph in API format.

A source names nodes, their inputs and the group that each stands in; a string "@name" or "@name.output" is a link.
`parts` names files of source/parts that it is laid upon, in their order. Of a source with tables `mini` and `paper`,
which are laid upon the rest, come two workflows, <source>_mini and <source>_paper. A node that is `like` another takes
all that it does not say itself from that one. In texts, {name} stands for the workflow and {experiment} for the source.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from ..nodes import NODE_CLASS_MAPPINGS, workflow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
VARIANTS = ("mini", "paper")
_KEYS = {"about", "groups", "nodes"}
_GROUP_KEYS = {"title", "color", "note"}
_NODE_KEYS = {"class", "title", "group", "inputs", "models"}
_TEXTS = {"about", "note"}  # what is laid upon them is added as a paragraph

Source = dict[str, Any]


@cache
def sources() -> dict[str, Source]:
    """Every workflow by its name, in the order of names: about, groups and nodes.

    Raises:
        ValueError: a source has keys that mean nothing, or a node stands in no known group.
    """
    found = {}
    for path in (FOLDER / "source").glob("*.toml"):
        whole = _laid_on_parts(path)
        tables = {variant: whole.pop(variant) for variant in VARIANTS if variant in whole}
        if not tables:
            found[path.stem] = _finished(whole, path.stem, path.stem)
        for variant, table in tables.items():
            name = f"{path.stem}_{variant}"
            found[name] = _finished(merged(whole, table), name, path.stem)
    return dict(sorted(found.items()))


def downloads(source: Source) -> list[dict[str, str]]:
    """What the nodes ask for that is not embedded: each model's name, url, and directory in models/."""
    return [model for node in source["nodes"].values() for model in node.get("models", [])]


def graph(source: Source) -> dict[str, Any]:
    """The graph in API format, ids counted from 1 in the order of the nodes.

    Raises:
        KeyError, ValueError: a link names no node, or no output of it.
    """
    nodes = source["nodes"]
    ids = {name: str(number) for number, name in enumerate(nodes, 1)}
    return {
        ids[name]: {
            "class_type": node["class"],
            "inputs": {key: _value(value, nodes, ids) for key, value in node.get("inputs", {}).items()},
            "_meta": {"title": node["title"]},
        }
        for name, node in nodes.items()
    }


def completed(api: dict[str, Any]) -> dict[str, Any]:
    """The same graph with every setting that a node leaves open at its default."""
    return {
        key: {**node, "inputs": _defaults(NODE_CLASS_MAPPINGS[node["class_type"]]) | node["inputs"]}
        for key, node in api.items()
    }


def merged(under: Any, over: Any, key: str = "") -> Any:
    """`over` laid upon `under`: tables key by key, lists and descriptions added, anything else replaced."""
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {k: merged(under[k], value, k) if k in under else value for k, value in over.items()}
    if isinstance(under, list) and isinstance(over, list):
        return under + over
    if key in _TEXTS:
        return f"{under.strip()}\n\n{over.strip()}\n"
    return over


def _defaults(cls: type[Any]) -> dict[str, Any]:
    return {name: entry[1]["default"] for name, entry in workflow.inputs(cls).items() if "default" in entry[1]}


def _laid_on_parts(path: Path) -> Source:
    own = tomllib.loads(path.read_text(encoding="utf-8"))
    whole: Source = {}
    for part in own.pop("parts", []):
        whole = merged(whole, _laid_on_parts(FOLDER / "source" / "parts" / f"{part}.toml"))
    return merged(whole, own)


def _finished(source: Source, name: str, experiment: str) -> Source:
    nodes = {key: _resolved(node, source["nodes"]) for key, node in source["nodes"].items()}
    finished: Source = _filled(source | {"nodes": nodes}, {"{name}": name, "{experiment}": experiment})
    strange = finished.keys() - _KEYS
    strange |= {key for group in finished["groups"].values() for key in group.keys() - _GROUP_KEYS}
    strange |= {key for node in nodes.values() for key in node.keys() - _NODE_KEYS}
    if strange or {node.get("group") for node in nodes.values()} != finished["groups"].keys():
        raise ValueError(f"{name}: unknown keys {sorted(strange)}, or nodes and groups that do not belong together")
    return finished


def _resolved(node: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """A node with what it takes from the one that it is like."""
    if "like" not in node:
        return node
    own = {key: value for key, value in node.items() if key != "like"}
    return merged(_resolved(nodes[node["like"]], nodes), own)


def _filled(value: Any, words: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, words) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, words) for part in value]
    if isinstance(value, str):
        for word, text in words.items():
            value = value.replace(word, text)
    return value


def _value(value: Any, nodes: dict[str, Any], ids: dict[str, str]) -> Any:
    """A literal as it is; "@name.output" as [id, number of the output]."""
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    name, _, output = value[1:].partition(".")
    outputs = NODE_CLASS_MAPPINGS[nodes[name]["class"]].RETURN_NAMES
    return [ids[name], outputs.index(output) if output else 0]
