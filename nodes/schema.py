"""Dataclass fields as node inputs, and node inputs as checked dataclasses again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from ..vader_backend.config import InputError, check, check_value

Input = tuple[Any, dict[str, Any]]
C = TypeVar("C")
CATEGORY = "VADER"
_KINDS = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}


def inputs(
    *configs: type, combos: Mapping[str, Sequence[str]] | None = None, plain: Collection[str] | None = None
) -> dict[str, Input]:
    """The node inputs of one or several dataclasses made with `config.option`, in the order of their fields.

    Args:
        combos: what to offer for fields whose choices are known only at run time, such as files.
        plain: the fields that are always in sight; the others are folded away as advanced. None: all are.

    Raises:
        TypeError: two dataclasses have a field of the same name.
    """
    found: dict[str, Input] = {}
    for config in configs:
        for field in dataclasses.fields(config):
            if field.name in found:
                raise TypeError(f"two settings of one node are named {field.name}")
            kind, options = _entry(field, (combos or {}).get(field.name))
            folded = plain is not None and field.name not in plain
            found[field.name] = kind, {**options, "advanced": True} if folded else options
    return found


def read(config: type[C], values: Mapping[str, Any]) -> C:
    """The dataclass that a node's inputs describe; what is not given takes its default.

    Raises:
        InputError: a value has the wrong type, is not finite, is outside its range or is not a choice.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    made = config(**{name: _as(values[name], fields[name]) for name in fields if name in values})
    check(made)
    return made


def check_some(config: type, **values: Any) -> None:
    """Check some fields of a dataclass; a linked input, which is None during validation, is left out.

    Raises:
        InputError: as for `read`.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name, value in values.items():
        if value is not None:
            check_value(name, _as(value, fields[name]), fields[name])


def verdict(attempt: Callable[[], Any]) -> bool | str:
    """What VALIDATE_INPUTS returns: True, or the sentence of the InputError that `attempt` raises."""
    try:
        attempt()
    except InputError as error:
        return str(error)
    return True


def text(default: str, tooltip: str, **options: Any) -> Input:
    """A STRING input."""
    return "STRING", {"default": default, "tooltip": tooltip, **options}


def combo(choices: Sequence[str], tooltip: str, default: str | None = None) -> Input:
    """A choice among strings; the first is the default."""
    first = default if default is not None else (choices[0] if choices else "")
    return list(choices), {"default": first, "tooltip": tooltip}


def link(kind: str, tooltip: str) -> Input:
    """An input that takes another node's output."""
    return kind, {"tooltip": tooltip}


def _entry(field: dataclasses.Field[Any], choices: Sequence[str] | None) -> Input:
    meta = field.metadata
    choices = choices if choices is not None else meta.get("choices")
    if choices is not None:
        return combo(choices, meta["help"], str(field.default))
    options = {"default": field.default, "tooltip": meta["help"]}
    kind = _KINDS[type(field.default)]
    if kind in ("INT", "FLOAT"):
        options |= _range(field, whole=kind == "INT")
    if meta.get("multiline"):
        options["multiline"] = True
    if field.name == "seed":
        options["control_after_generate"] = "fixed"  # the front end would otherwise draw a new seed on every run
    return kind, options


def _range(field: dataclasses.Field[Any], *, whole: bool) -> dict[str, Any]:
    step = field.metadata.get("step") or (1 if whole else 0.01)
    options: dict[str, Any] = {"step": step}
    if not whole:
        options["round"] = 10.0 ** math.floor(math.log10(step) + 1e-9)
    bounds = {"min": field.metadata.get("low"), "max": field.metadata.get("high")}
    return options | {name: bound for name, bound in bounds.items() if bound is not None}


def _as(value: Any, field: dataclasses.Field[Any]) -> Any:
    if type(field.default) is float and type(value) is int:
        return float(value)
    return value
