"""Finds the mistakes of a workflow before anything runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..vader_backend.config import InputError, suggest
from .workflow import Classes, Node, declared, is_link, is_text


def check(nodes: Mapping[str, Node], classes: Classes) -> None:
    """Find every mistake that can be known before anything runs.

    Raises:
        InputError: one line per mistake.
    """
    _raise(_unknown(nodes, classes))
    problems = []
    for node in nodes.values():
        problems += _node_problems(node, nodes, classes)
    _raise(problems)
    _raise([line for node in nodes.values() for line in _validated(node, classes)])


def known(names: Iterable[str], classes: Classes) -> None:
    """Raises InputError where a name is not of a class."""
    for name in names:
        if name not in classes:
            raise InputError(f"There is no node class {name!r}: {suggest(name, list(classes))}")


def _raise(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))


def _unknown(nodes: Mapping[str, Node], classes: Classes) -> list[str]:
    strange = [node for node in nodes.values() if node.class_type not in classes]
    if not strange:
        return []
    named = ", ".join(f"{node.id} {node.class_type}" for node in strange)
    close = [f"{n.class_type}: {suggest(n.class_type, list(classes))}" for n in strange if n.class_type[:5] == "Vader"]
    return [f"These nodes are not of this pack and need ComfyUI: {named}; remove them or run it there.", *close]


def _node_problems(node: Node, nodes: Mapping[str, Node], classes: Classes) -> list[str]:
    cls = classes[node.class_type]
    if hasattr(cls, "UNAVAILABLE"):
        return [f"{node.label}: {cls.VALIDATE_INPUTS()}"]
    problems = [
        f"{node.label} lacks its input {name}; connect or enter it."
        for name in cls.INPUT_TYPES().get("required", {})
        if name not in node.inputs
    ]
    unchecked = _validator_arguments(cls)
    for name, value in node.inputs.items():
        try:
            kind, options = declared(node, classes, name, node.label)
            if is_link(value):
                _check_link(node, name, value, kind, nodes, classes)
            else:
                node.inputs[name] = _literal(value, kind, f"{name} of {node.label}")
                if name not in unchecked:
                    _check_range(node.inputs[name], kind, options, f"{name} of {node.label}")
        except InputError as error:
            problems.append(str(error))
    return problems


def _check_link(
    node: Node, name: str, value: list[Any], kind: Any, nodes: Mapping[str, Node], classes: Classes
) -> None:
    where = f"{name} of {node.label}"
    if len(value) != 2 or not isinstance(value[0], str) or type(value[1]) is not int:
        raise InputError(f"{where} is {value}; a link has the form [node id, output number].")
    source = nodes.get(value[0])
    if source is None:
        raise InputError(f"{where} is linked to node {value[0]}, which does not exist; connect it anew.")
    outputs = classes[source.class_type].RETURN_TYPES
    if not 0 <= value[1] < len(outputs):
        raise InputError(f"{where} is linked to output {value[1]} of {source.label}, which has {len(outputs)}.")
    if outputs[value[1]] != kind and "*" not in (kind, outputs[value[1]]):
        wanted = "a choice" if isinstance(kind, list) else kind
        raise InputError(
            f"{where} takes {wanted}, but {source.label} gives {outputs[value[1]]}; connect another output."
        )


def _literal(value: Any, kind: Any, what: str) -> Any:
    """The value as its input's type; numbers are not made from text, nor whole numbers from fractions."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise InputError(f"{what} is {value}; enter a finite number.")
    if kind == "FLOAT" and number:
        return float(value)
    if kind == "INT" and number and value == int(value):
        return int(value)
    if (kind == "BOOLEAN" and isinstance(value, bool)) or (isinstance(value, str) and is_text(kind)):
        return value
    wanted = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false", "STRING": "text"}
    name = wanted.get(kind) if isinstance(kind, str) else "one of its choices"
    raise InputError(f"{what} is {value!r}; it must be {name or f'linked to a node that gives {kind}'}.")


def _check_range(value: Any, kind: Any, options: Mapping[str, Any], what: str) -> None:
    if isinstance(kind, list) and not kind:
        raise InputError(f"{what} is {value!r}, but there is nothing to choose from. {options.get('tooltip', '')}")
    if isinstance(kind, list) and value not in kind:
        raise InputError(f"{what} is {value!r}; {suggest(value, kind)}")
    if ("min" in options and value < options["min"]) or ("max" in options and value > options["max"]):
        raise InputError(f"{what} is {value}; it must be between {options.get('min')} and {options.get('max')}.")


def _validator_arguments(cls: type[Any]) -> set[str]:
    """The inputs that a class checks itself; as in ComfyUI, their ranges are then left to it."""
    validator = getattr(cls, "VALIDATE_INPUTS", None)
    return set(inspect.signature(validator).parameters) if validator is not None else set()


def _validated(node: Node, classes: Classes) -> list[str]:
    cls = classes[node.class_type]
    wanted = _validator_arguments(cls)
    if not wanted:
        return []
    given = {name: None if is_link(value) else value for name, value in node.inputs.items() if name in wanted}
    verdict = cls.VALIDATE_INPUTS(**given)
    return [] if verdict is True else [f"{node.label}: {verdict}"]
