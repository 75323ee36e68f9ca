"""Settings as dataclasses: each field carries its range and its explanation, and is checked against them.

Node inputs, the headless command line and the library all read the same fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """A setting or file that the user can mend; the message names it and says how."""


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    choices: Sequence[str] | None = None,
    multiline: bool = False,
) -> Any:
    """A dataclass field with its tooltip, its inclusive range or its choices."""
    metadata = {"help": help, "low": low, "high": high, "step": step, "choices": choices, "multiline": multiline}
    return dataclasses.field(
        default=default, metadata={k: v for k, v in metadata.items() if v is not None and v is not False}
    )


def inherited(parent: type, name: str, default: Any) -> Any:
    """A parent's field with another default."""
    return dataclasses.field(default=default, metadata=parent.__dataclass_fields__[name].metadata)  # type: ignore[attr-defined]


def check(config: Any) -> None:
    """Check every field of a dataclass made with `option`.

    Raises:
        InputError: a value has the wrong type, is not finite, lies outside its range or is not a choice.
    """
    for field in dataclasses.fields(config):
        check_value(field.name, getattr(config, field.name), field)


def check_value(name: str, value: Any, field: dataclasses.Field[Any]) -> None:
    """Check one value against one field made with `option`; `name` is what the message calls it."""
    kind = type(field.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind in (bool, int, float, str) and type(value) is not kind:
        raise InputError(f"{name} is {value!r}, but must be of type {kind.__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} is {value}; enter a finite number.")
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = (
            f"between {low} and {high}"
            if None not in (low, high)
            else f"at least {low}"
            if high is None
            else f"at most {high}"
        )
        raise InputError(f"{name} is {value}; it must be {bounds}.")
    choices = field.metadata.get("choices")
    if choices is not None and value not in choices:
        raise InputError(f"{name} is {value!r}; {suggest(value, choices)}")


def suggest(value: str, choices: Sequence[str], limit: int = 12) -> str:
    """«did you mean ...» for a miss, or the list of what is valid."""
    close = difflib.get_close_matches(str(value), choices, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(c) for c in choices[:limit])
    return f"choose one of {shown}{', ...' if len(choices) > limit else ''}."
