"""The graph runner: every mistake gives a sentence before anything runs; a sound graph runs in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_graph import Workflow, node
from vader_nodes.nodes import graph, validate, workflow
from vader_nodes.vader_backend.config import InputError


class Number:
    """Gives a number, and remembers that it ran."""

    ran: list[str] = []
    RETURN_TYPES = ("NUMBER",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"value": ("INT", {"min": 0, "max": 9})},
            "optional": {
                "rate": ("FLOAT", {"default": 1.0, "min": 0.0}),
                "mode": (["plus", "minus"], {"default": "plus"}),
                "flag": ("BOOLEAN", {"default": False}),
                "word": ("STRING", {"default": ""}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, word: str | None = "") -> bool | str:
        return "word is bad; choose another." if word == "bad" else True

    def make(self, value: int, unique_id: str, mode: str = "plus", **_: Any) -> tuple[int]:
        self.ran.append(unique_id)
        return (value if mode == "plus" else -value,)


class Show:
    """Adds one or two numbers and tells the sum."""

    RETURN_TYPES = ("NUMBER",)
    FUNCTION = "show"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"a": ("NUMBER", {})}, "optional": {"b": ("NUMBER", {}), "c": ("OTHER", {})}}

    def show(self, a: int, b: int = 0, c: Any = None) -> dict[str, Any]:
        return {"ui": {"text": [f"sum {a + b}"]}, "result": (a + b,)}


CLASSES: dict[str, type[Any]] = {"VaderNumber": Number, "Show": Show}


def sound() -> Workflow:
    return {
        "1": node("VaderNumber", value=2),
        "2": node("VaderNumber", value=3, mode="minus"),
        "3": node("Show", a=["1", 0], b=["2", 0]),
        "4": node("VaderNumber", value=9),
    }


def run(data: Workflow) -> tuple[dict[str, tuple[Any, ...]], list[str]]:
    Number.ran.clear()
    lines: list[str] = []
    return graph.run(workflow.parse(data), CLASSES, lines.append), lines


def test_only_what_outputs_need_runs_in_order() -> None:
    results, lines = run(sound())
    assert results["3"] == (-1,)
    assert sorted(Number.ran) == ["1", "2"]
    assert "    sum -1" in lines
    assert sum(line.startswith("[") for line in lines) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"5": node("KSampler"), "6": node("SaveImage")}, ["need ComfyUI", "5 KSampler", "6 SaveImage"]),
        ({"1": node("VaderNumbre", value=2)}, ["did you mean 'VaderNumber'"]),
        ({"1": node("VaderNumber")}, ["node 1", "value"]),
        ({"1": node("VaderNumber", valeu=1, value=1)}, ["'valeu'", "did you mean 'value'"]),
        ({"1": node("VaderNumber", value=10)}, ["value", "node 1", "between 0 and 9"]),
        ({"1": node("VaderNumber", value=1.5)}, ["value", "whole number"]),
        ({"1": node("VaderNumber", value=True)}, ["value", "whole number"]),
        ({"1": node("VaderNumber", value="2")}, ["value", "whole number"]),
        ({"1": node("VaderNumber", value=float("nan"))}, ["value", "finite"]),
        ({"1": node("VaderNumber", value=1, rate=float("inf"))}, ["rate", "finite"]),
        ({"1": node("VaderNumber", value=1, rate=-1)}, ["rate", "-1"]),
        ({"1": node("VaderNumber", value=1, mode="pluss")}, ["mode", "did you mean 'plus'"]),
        ({"1": node("VaderNumber", value=1, flag=1)}, ["flag", "true or false"]),
        ({"1": node("VaderNumber", value=1, word="bad")}, ["node 1", "word is bad"]),
        ({"3": node("Show", a=["7", 0])}, ["a of node 3", "node 7", "does not exist"]),
        ({"3": node("Show", a=["1", 1])}, ["output 1 of node 1"]),
        ({"3": node("Show", a=["1", 0], c=["1", 0])}, ["c of node 3", "OTHER", "NUMBER"]),
        ({"3": node("Show", a=["1"])}, ["[node id, output number]"]),
        ({"3": node("Show", a=4)}, ["a of node 3", "linked", "NUMBER"]),
        ({"3": node("Show", a=["5", 0]), "5": node("Show", a=["3", 0])}, ["circle", "node 3", "node 5"]),
    ],
)
def test_mistakes_are_named_before_anything_runs(change: Workflow, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        run({**sound(), **change})
    assert [word for word in words if word not in str(caught.value)] == []
    assert Number.ran == []


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        run({**sound(), "1": node("VaderNumber", value=10), "2": node("VaderNumber", value=-1)})
    assert len(str(caught.value).splitlines()) == 2


def test_a_graph_without_output_is_refused() -> None:
    with pytest.raises(InputError, match="output node"):
        run({"1": node("VaderNumber", value=2)})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("[]", "API format"),
        ("{}", "API format"),
        ('{"nodes": [], "links": []}', "canvas format"),
        ('{"1": {"inputs": {}}}', "class_type"),
        ('{"1": {"class_type": "Show", "inputs": []}}', "inputs"),
    ],
)
def test_files_that_are_no_workflow_are_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        workflow.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        workflow.load(tmp_path / "absent.json")


def set_all(*settings: str) -> dict[str, Any]:
    data = sound()
    data["1"]["_meta"] = {"title": "First one"}
    nodes = workflow.parse(data)
    workflow.override(nodes, settings, CLASSES)
    return {key: entry.inputs for key, entry in nodes.items()}


def test_settings_reach_nodes_by_id_title_and_class() -> None:
    changed = set_all("1.value=7", "First one.rate=2", "2.mode=plus", "2.flag=true", "1.word=a=b.c")
    assert changed["1"] == {"value": 7, "rate": 2.0, "word": "a=b.c"}
    assert changed["2"] == {"value": 3, "mode": "plus", "flag": True}
    data = workflow.parse({"1": node("VaderNumber", value=1)})
    workflow.override(data, ["VaderNumber.value=4"], CLASSES)
    assert data["1"].inputs["value"] == 4


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("value=1", "NODE.INPUT=VALUE"),
        ("1.value", "NODE.INPUT=VALUE"),
        ("8.value=1", "no node '8'"),
        ("Frist one.value=1", "did you mean 'First one'"),
        ("VaderNumber.value=1", "several nodes"),
        ("1.vale=1", "did you mean 'value'"),
        ("1.value=x", "not a whole number"),
        ("1.rate=fast", "not a number"),
        ("1.flag=maybe", "true or false"),
        ("3.a=1", "linked"),
    ],
)
def test_bad_settings_are_named(setting: str, word: str) -> None:
    with pytest.raises(InputError, match="--set") as caught:
        set_all(setting)
    assert word in str(caught.value)


def test_values_from_the_command_line_are_checked_like_the_others() -> None:
    nodes = workflow.parse(sound())
    workflow.override(nodes, ["1.rate=nan"], CLASSES)
    with pytest.raises(InputError, match=r"rate .*finite"):
        validate.check(nodes, CLASSES)


def test_json_numbers_that_are_not_finite_are_found() -> None:
    data = json.loads('{"1": {"class_type": "VaderNumber", "inputs": {"value": NaN}}}')
    with pytest.raises(InputError, match="finite"):
        validate.check(workflow.parse(data), CLASSES)
