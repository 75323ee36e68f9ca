"""Reads a fixture: NAME.safetensors with original weights, inputs and expected outputs, NAME.json with the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Fixture:
    """weights: under the original checkpoint's keys; inputs and outputs by name; about: the whole json file."""

    name: str
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def item(self) -> str:
        """What was computed, whatever the file is called."""
        return self.about["item"]

    @property
    def config(self) -> dict[str, Any]:
        return self.about["config"]

    def tolerance(self, output: str) -> float:
        """The largest allowed error of an output, relative to its largest value or 1."""
        given = self.about["tolerance"]
        return given.get("per_output_max_abs", {}).get(output, given["max_abs"])


def read(path: Path) -> Fixture:
    """Read a pair by the path of either file; float16 and int8 storage is undone, exactly."""
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    scales = about["config"].get("int8_scale", {})
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "in": {}, "out": {}}
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, name = key.split("/", 1)
            tensor = file.get_tensor(key)
            if kind == "weights" and name in scales:
                tensor = tensor.float() * scales[name]
            elif kind == "weights" and tensor.is_floating_point():
                tensor = tensor.float()
            parts[kind][name] = tensor
    return Fixture(path.stem, parts["weights"], parts["in"], parts["out"], about)


def error(reference: Tensor, ours: Tensor) -> float:
    """The largest absolute difference, relative to the reference's largest value or 1; infinite for another shape."""
    if reference.shape != ours.shape:
        return float("inf")
    reference, ours = reference.double(), ours.detach().double()
    difference = float((reference - ours).abs().nan_to_num(float("inf")).max())
    return difference / max(1.0, float(reference.abs().max()))
