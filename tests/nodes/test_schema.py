"""Dataclass fields as node inputs and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest
from vader_nodes.nodes import schema
from vader_nodes.nodes.train import _PARTS
from vader_nodes.vader_backend.config import InputError, option


@dataclass(frozen=True)
class Sample:
    """One field of each kind."""

    count: int = option(3, "How many.", low=1, high=9)
    rate: float = option(0.5, "How fast.", low=0.1, high=1.0, step=0.05)
    flag: bool = option(False, "Whether.")
    words: str = option("", "What.", multiline=True)
    mode: str = option("a", "Which.", choices=("a", "b"))
    file: str = option("none", "Which file.")
    seed: int = option(0, "Seed.")


@dataclass(frozen=True)
class Twice:
    """A field that Sample has, too."""

    count: int = option(1, "How many.")


def test_every_kind_of_field_becomes_its_input() -> None:
    found = schema.inputs(Sample, combos={"file": ["none", "x"]}, plain=["count", "seed"])
    assert found["count"] == ("INT", {"default": 3, "tooltip": "How many.", "step": 1, "min": 1, "max": 9})
    rate = found["rate"][1]
    assert (rate["min"], rate["max"], rate["step"], rate["round"]) == (0.1, 1.0, 0.05, 0.01)
    assert found["flag"][0] == "BOOLEAN"
    assert found["words"][1]["multiline"] is True
    assert found["mode"][0] == ["a", "b"]
    assert found["file"] == (["none", "x"], {"default": "none", "tooltip": "Which file.", "advanced": True})
    assert found["seed"][1]["control_after_generate"] == "fixed"
    assert [name for name, entry in found.items() if "advanced" not in entry[1]] == ["count", "seed"]


def test_two_settings_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="count"):
        schema.inputs(Sample, Twice)


@pytest.mark.parametrize("config", [Sample, *_PARTS])
def test_defaults_of_the_inputs_are_those_of_the_dataclass(config: type) -> None:
    defaults = {name: entry[1]["default"] for name, entry in schema.inputs(config).items()}
    assert schema.read(config, defaults) == config() == schema.read(config, {})
    assert set(defaults) == {field.name for field in fields(config)}


def test_values_come_back_checked() -> None:
    assert schema.read(Sample, {"rate": 1, "count": 4, "foreign": 1}) == Sample(rate=1.0, count=4)
    assert type(schema.read(Sample, {"rate": 1}).rate) is float
    for bad in ({"rate": math.nan}, {"rate": 2.0}, {"count": 0}, {"count": 1.5}, {"mode": "c"}, {"flag": 1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            schema.read(Sample, bad)


def test_linked_inputs_are_left_out_of_early_checks() -> None:
    schema.check_some(Sample, count=None, rate=0.5)
    with pytest.raises(InputError, match="count"):
        schema.check_some(Sample, count=0, rate=None)
