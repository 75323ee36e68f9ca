"""Runs an API-format workflow without ComfyUI: everything is checked first, then the nodes run in order."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..vader_backend.config import InputError
from .validate import check
from .workflow import Classes, Node, is_link


def order(nodes: Mapping[str, Node], classes: Classes) -> list[Node]:
    """The output nodes and what they need, each after what it needs.

    Raises:
        InputError: nodes wait for each other in a circle, or there is no output node.
    """
    needs = {key: [value[0] for value in node.inputs.values() if is_link(value)] for key, node in nodes.items()}
    try:
        sequence = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = " -> ".join(nodes[key].label for key in error.args[1])
        raise InputError(f"These nodes wait for each other in a circle: {circle}; remove one of the links.") from None
    wanted = {key for key, node in nodes.items() if getattr(classes[node.class_type], "OUTPUT_NODE", False)}
    if not wanted:
        raise InputError("The workflow has no output node, so nothing would run; add Save Videos or Save LoRA.")
    for key in reversed(sequence):
        if key in wanted:
            wanted.update(needs[key])
    return [nodes[key] for key in sequence if key in wanted]


def run(nodes: Mapping[str, Node], classes: Classes, say: Callable[[str], None] = print) -> dict[str, tuple[Any, ...]]:
    """Check the workflow, then run it.

    Args:
        say: takes a line per node and what the nodes have to tell.

    Returns:
        The outputs of every node that ran, by id.

    Raises:
        InputError: see `check`, or from a node.
    """
    check(nodes, classes)
    quick, slow = _parted(order(nodes, classes), classes)
    results: dict[str, tuple[Any, ...]] = {}
    for number, node in enumerate([*quick, *slow], 1):
        if number == len(quick) + 1:
            _check_ahead(slow, classes, results)
        say(f"[{number}/{len(quick) + len(slow)}] {node.title or node.class_type}")
        start = time.monotonic()
        outcome = _call(node, classes[node.class_type], results)
        shown = outcome.get("ui", {}) if isinstance(outcome, dict) else {}
        results[node.id] = tuple(outcome.get("result", ())) if isinstance(outcome, dict) else tuple(outcome)
        for line in _told(shown):
            say(f"    {line}")
        say(f"    {time.monotonic() - start:.1f} s")
    return results


def _parted(sequence: list[Node], classes: Classes) -> tuple[list[Node], list[Node]]:
    """The nodes that load and prepare, then those that work for long (they have CHECK) and what needs them."""
    slow: dict[str, Node] = {}
    for node in sequence:
        if hasattr(classes[node.class_type], "CHECK") or any(v[0] in slow for v in node.inputs.values() if is_link(v)):
            slow[node.id] = node
    return [node for node in sequence if node.id not in slow], list(slow.values())


def _check_ahead(nodes: list[Node], classes: Classes, results: Mapping[str, tuple[Any, ...]]) -> None:
    """Let every long node look at those of its inputs that are there before the first one starts."""
    for node in nodes:
        check = getattr(classes[node.class_type], "CHECK", None)
        if check is None:
            continue
        ready = {k: v for k, v in node.inputs.items() if not is_link(v) or v[0] in results}
        named = [p for p in inspect.signature(check).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if all(p.name in ready for p in named if p.default is p.empty):
            check(**_linked(replace(node, inputs=ready), results))


def _linked(node: Node, results: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A node's inputs, with the results that its links stand for."""
    return {k: results[v[0]][v[1]] if is_link(v) else v for k, v in node.inputs.items()}


def _call(node: Node, cls: type[Any], results: Mapping[str, tuple[Any, ...]]) -> Any:
    values = _linked(node, results)
    for name, kind in cls.INPUT_TYPES().get("hidden", {}).items():
        values[name] = node.id if kind == "UNIQUE_ID" else None
    return getattr(cls(), cls.FUNCTION)(**values)


def _told(shown: Mapping[str, Any]) -> list[str]:
    lines = [line for text in shown.get("text", ()) for line in text.splitlines()]
    files = ["/".join(filter(None, ("output", f["subfolder"], f["filename"]))) for f in shown.get("images", ())]
    return lines + [f"wrote {name}" for name in files]
