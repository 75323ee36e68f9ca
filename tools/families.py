"""Runs the demo on the embedded checkpoint of every family and keeps what it reached in docs/.

Run as `make families`. An interrupted run goes on where it stopped; finished families are scored from their saved
trainings.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..nodes import NODE_CLASS_MAPPINGS, graph, host, workflow
from ..vader_backend.checkpoint import write_text
from .workflows import ROOT

PAGE = ROOT / "docs" / "families_measured.md"
PICTURES = ROOT / "docs" / "images" / "families"
_DEMO = ROOT / "workflows" / "api" / "demo.json"
_HEAD = """# VADER on every family of the embedded world

Written by `make families`: the graph of `workflows/api/demo.json` on each embedded checkpoint, with the settings that
are named. 32 prompts that were trained on and 32 that were not, same noise for base and aligned videos. Differences are
also given in standard deviations of the base's score over videos. Oracle and vividness are read from the pixels;
nothing was trained on them.
"""
_WIDTH = 1600


@dataclass(frozen=True)
class Family:
    """What differs from the demo.

    settings: NODE.INPUT=VALUE as on the command line. prompts: inputs of an Image Prompts node in place of Prompts.
    """

    settings: tuple[str, ...] = ()
    prompts: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "modelscope": Family(),
    "videocrafter2": Family(
        settings=(
            "VaderTrainLoRA.steps=220",
            "VaderTrainLoRA.k=10",
            "VaderTrainLoRA.rank=32",
            "VaderTrainLoRA.reward_frames=all",
        )
    ),
    "opensora": Family(
        settings=(
            "VaderTrainLoRA.steps=170",
            "VaderTrainLoRA.learning_rate=0.0015",
            "VaderTrainLoRA.k=10",
            "Training Reward.weight_2=15",
        )
    ),
    "svd": Family(
        settings=(
            "VaderTrainLoRA.steps=180",
            "VaderTrainLoRA.learning_rate=0.004",
            "VaderTrainLoRA.rank=32",
            "VaderTrainLoRA.sampling_steps=5",
            "VaderTrainLoRA.k=3",
            "VaderTrainLoRA.reward_frames=all",
            "Training Reward.weight_2=2",
            "Base Sample.steps=5",
            "Aligned Sample.steps=5",
        ),
        prompts={"source": "mini"},
    ),
}


def main() -> None:
    """Entry point of `make families`."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.tools.families", description=__doc__)
    parser.add_argument("--base-directory", type=Path, default=ROOT / ".work" / "families", help="where output/ goes")
    parser.add_argument("--only", choices=tuple(FAMILIES), help="run one family; the page keeps the others as they are")
    options = parser.parse_args()
    for name, family in FAMILIES.items():
        if options.only in (None, name):
            section = _run(name, family, options.base_directory / name)
            parts = {**sections(PAGE), name: section}
            write_text(PAGE, _HEAD + "".join(parts[known] for known in FAMILIES if known in parts))


def nodes(name: str, family: Family) -> dict[str, workflow.Node]:
    """The demo's graph for one family."""
    found = workflow.load(_DEMO)
    if family.prompts:
        (prompts,) = (node for node in found.values() if node.class_type == "VaderPrompts")
        prompts.class_type, prompts.inputs = "VaderImagePrompts", dict(family.prompts)
    settings = [f"VaderLoadVideoModel.checkpoint=mini/{name}", "VaderCompareVideos.limit=3", *family.settings]
    workflow.override(found, settings, NODE_CLASS_MAPPINGS)
    return found


def _run(name: str, family: Family, base: Path) -> str:
    """The section of one family; its picture is written."""
    base.mkdir(parents=True, exist_ok=True)
    host.use_base_directory(base)
    graph_nodes = nodes(name, family)
    results = graph.run(graph_nodes, NODE_CLASS_MAPPINGS)
    (score,) = (key for key, node in graph_nodes.items() if node.class_type == "VaderScoreVideo")
    others = "".join(f" {setting}." for setting in family.settings if not setting.startswith("VaderTrainLoRA."))
    picture(sorted((base / "output" / "demo").glob("side_by_side_*.png"))[-1], PICTURES / f"{name}.jpg")
    return (
        f"\n## {name}\n\n{trained_with(graph_nodes)}{others}\n\n"
        f"![{name}: base above, aligned below](images/families/{name}.jpg)\n\n"
        f"```text\n{results[score][0]}\n```\n"
    )


def trained_with(found: Mapping[str, workflow.Node]) -> str:
    """A line with the settings of the graph's training."""
    (train,) = (node for node in found.values() if node.class_type == "VaderTrainLoRA")
    shown = ("steps", "batch_size", "learning_rate", "rank", "sampling_steps", "k", "guidance", "seed")
    settings = ", ".join(f"{key} {train.inputs[key]}" for key in shown if key in train.inputs)
    return f"VADER Train LoRA: {settings}."


def picture(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as picture:
        height = round(picture.height * _WIDTH / picture.width)
        picture.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS).save(target, quality=85)


def sections(page: Path) -> dict[str, str]:
    """The sections of a page as it is."""
    if not page.exists():
        return {}
    found = page.read_text(encoding="utf-8").split("\n## ")[1:]
    return {section.splitlines()[0]: f"\n## {section}" for section in found}


if __name__ == "__main__":
    main()
