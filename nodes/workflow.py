"""An API-format workflow: reading the file, and changing its settings from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..vader_backend.config import InputError, suggest

Classes = Mapping[str, type[Any]]
_TRUTH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


@dataclass
class Node:
    """One node of a workflow; `inputs` holds literals and links [node id, output]."""

    id: str
    class_type: str
    title: str
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"node {self.id} ({self.title or self.class_type})"


def load(path: Path) -> dict[str, Node]:
    """Read an API-format workflow file.

    Raises:
        InputError: it is missing, no JSON, in the canvas format, or not a workflow.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The workflow {path} cannot be read ({error.strerror}); check its name.") from error
    except ValueError as error:
        raise InputError(f"The workflow {path} is not JSON ({error}); export it again.") from error
    return parse(data, path.name)


def parse(data: Any, name: str = "workflow") -> dict[str, Node]:
    """The nodes of a workflow by id. Raises InputError as `load`."""
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        raise InputError(f"{name} is in the canvas format; export it with File > Export (API) and run that file.")
    if not isinstance(data, dict) or not data:
        raise InputError(f"{name} is no workflow in API format; export it with File > Export (API).")
    for key, entry in data.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_type"), str):
            raise InputError(f"Node {key} of {name} has no class_type; export the workflow in API format again.")
        if not isinstance(entry.get("inputs", {}), dict):
            raise InputError(f"Node {key} of {name} has inputs that are not a JSON object; export the workflow again.")
    return {
        key: Node(key, entry["class_type"], str(entry.get("_meta", {}).get("title", "")), dict(entry.get("inputs", {})))
        for key, entry in data.items()
    }


def override(nodes: Mapping[str, Node], settings: Iterable[str], classes: Classes) -> None:
    """Apply NODE.INPUT=VALUE settings in place; NODE is an id, a class or a title.

    Raises:
        InputError: a setting is malformed, fits no or several nodes, or names no setting of its node.
    """
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, dot, key = target.rpartition(".")
        if not equals or not dot or not name or not key:
            raise InputError(f"--set {setting} is not of the form NODE.INPUT=VALUE.")
        node = _find(nodes, name, setting)
        kind, _ = declared(node, classes, key, f"--set {setting}")
        node.inputs[key] = _parsed(value, kind, f"--set {setting}")


def declared(node: Node, classes: Classes, name: str, what: str) -> tuple[Any, dict[str, Any]]:
    if node.class_type not in classes:
        raise InputError(f"{what}: {node.class_type} is not a node of this pack.")
    declared = inputs(classes[node.class_type])
    if name not in declared:
        raise InputError(f"{what} has no input {name!r}: {suggest(name, list(declared), limit=40)}")
    entry = declared[name]
    return entry[0], entry[1] if len(entry) > 1 else {}


def inputs(cls: type[Any]) -> dict[str, Any]:
    declared = cls.INPUT_TYPES()
    return {**declared.get("required", {}), **declared.get("optional", {})}


def is_link(value: Any) -> bool:
    return isinstance(value, list)


def _find(nodes: Mapping[str, Node], name: str, setting: str) -> Node:
    for key in ("id", "title", "class_type"):
        found = [node for node in nodes.values() if getattr(node, key) == name]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(node.label for node in found)
            raise InputError(f"--set {setting} fits several nodes: {ids}; use the id.")
    known = [word for node in nodes.values() for word in (node.id, node.title, node.class_type) if word]
    raise InputError(f"--set {setting}: there is no node {name!r} in the workflow; {suggest(name, known, limit=40)}")


def _parsed(value: str, kind: Any, what: str) -> Any:
    """A command-line value as its input's type."""
    try:
        if kind == "INT":
            return int(value)
        if kind == "FLOAT":
            return float(value)
        if kind == "BOOLEAN":
            return _TRUTH[value.lower()]
    except (ValueError, KeyError):
        wanted = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}[kind]
        raise InputError(f"{what}: {value!r} is not {wanted}.") from None
    if not is_text(kind):
        raise InputError(f"{what}: this input is linked to another node ({kind}) and cannot be set.")
    return value


def is_text(kind: Any) -> bool:
    return kind == "STRING" or isinstance(kind, list)
