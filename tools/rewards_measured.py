"""Trains on one reward alone, for each of three, and keeps in docs/ what the oracle then reads from the pixels.

Run as `make rewards`. An interrupted run goes on where it stopped; finished rewards are read from their saved
trainings.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..nodes import NODE_CLASS_MAPPINGS, graph, host, workflow
from ..nodes.images import rows, to_videos
from ..vader_backend.checkpoint import write_text
from ..vader_backend.evaluation.pictures import contact_sheet
from ..vader_backend.mini.oracle import accuracy, flicker, read
from ..vader_backend.mini.world import ALL_SCENES, parse_caption
from ..vader_backend.prompts import PromptSet
from .families import picture, sections, trained_with
from .workflows import ROOT

PAGE = ROOT / "docs" / "rewards_measured.md"
PICTURES = ROOT / "docs" / "images" / "rewards_measured"
_GRAPH = ROOT / "workflows" / "api" / "vader_figure10_action_modelscope_mini.json"
_TARGET = "circle"
_HEAD = """# What training on one reward alone changes

Written by `make rewards`: the graph of `workflows/api/vader_figure10_action_modelscope_mini.json`, on the embedded
ModelScope, with one reward after the other and the settings that are named. Base and aligned videos have the same
noise. What is said of unseen prompts, of *oracle* and of *vividness* is read from the pixels; nothing was trained on
that. The pictures show unseen prompts, base above aligned, four frames of each video. A reward alone also moves what it
does not look at: see what the oracle's other lines lose.
"""
Outcome = Callable[[Tensor, Tensor, Sequence[str]], str]  # of base and aligned videos [B, T, 3, H, W] and their prompts


@dataclass(frozen=True)
class Trial:
    """What is put into the graph, and what is read from the videos of the unseen prompts.

    reward: the node's class. prompts: inputs of the Prompts node. steps: of denoising; the gradient passes through all.
    guidance: 0 is the model's own; at 0.3 its videos often show something else than the prompt says, and flicker.
    training: inputs of the Train node.
    """

    reward: str
    outcome: Outcome
    prompts: Mapping[str, Any] = field(default_factory=lambda: {"source": "mini"})
    steps: int = 3
    guidance: float = 0
    training: Mapping[str, Any] = field(default_factory=dict)


def removed(base_BTCHW: Tensor, aligned_BTCHW: Tensor, prompts: Sequence[str]) -> str:
    """What is seen now in the videos that showed the shape."""
    had = [reading.shape == _TARGET for reading in read(base_BTCHW)]
    now = [reading.shape for reading, counts in zip(read(aligned_BTCHW), had, strict=True) if counts]
    seen = Counter(shape or "no shape that can be told" for shape in now)
    gone = 1 - seen[_TARGET] / len(now)
    shown = ", ".join(f"{shape} {count}" for shape, count in seen.most_common())
    return (
        f"Of {len(had)} unseen prompts the base shows the {_TARGET} in {len(now)}. It is gone in {gone:.0%} of these; "
        f"what they show instead: {shown}."
    )


def moved(base_BTCHW: Tensor, aligned_BTCHW: Tensor, prompts: Sequence[str]) -> str:
    """How many videos move as their prompt says."""
    scenes = [parse_caption(prompt) for prompt in prompts]
    before, after = (accuracy(video, scenes)["motion"] for video in (base_BTCHW, aligned_BTCHW))
    return f"Of {len(prompts)} unseen prompts the motion is right in {before:.0%} before and in {after:.0%} after."


def steadied(base_BTCHW: Tensor, aligned_BTCHW: Tensor, prompts: Sequence[str]) -> str:
    """How much the pixels change that nothing moves over."""
    before, after = (flicker(video) for video in (base_BTCHW, aligned_BTCHW))
    calmer = float((after < before).float().mean())
    return (
        f"Where nothing moves, pixels of {len(prompts)} unseen prompts change from frame to frame by "
        f"{255 * before.mean():.2f} of 255 steps before and by {255 * after.mean():.2f} after; less in {calmer:.0%} of "
        "the videos. The score is minus the loss of the predicted features."
    )


_CIRCLES = {
    "source": "typed",
    "text": "\n".join(scene.caption for scene in ALL_SCENES if scene.shape == _TARGET),
    "held_out_fraction": 0.5,
}
TRIALS: dict[str, Trial] = {
    "yolos": Trial(
        "VaderRewardYolos",
        removed,
        _CIRCLES,
        steps=5,
        training={"steps": 100, "batch_size": 4, "learning_rate": 0.0015},
    ),
    "videomae": Trial(
        "VaderRewardVideomae", moved, guidance=0.3, training={"steps": 80, "batch_size": 8, "learning_rate": 0.004}
    ),
    "vjepa": Trial(
        "VaderRewardVjepa", steadied, guidance=1, training={"steps": 80, "batch_size": 4, "learning_rate": 0.005}
    ),
}


def main() -> None:
    """Entry point of `make rewards`."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.tools.rewards_measured", description=__doc__)
    parser.add_argument("--base-directory", type=Path, default=ROOT / ".work" / "rewards", help="where output/ goes")
    parser.add_argument(
        "--only", choices=tuple(TRIALS), help="train on one reward; the page keeps the others as they are"
    )
    options = parser.parse_args()
    for name, trial in TRIALS.items():
        if options.only in (None, name):
            section = _run(name, trial, options.base_directory / name)
            parts = {**sections(PAGE), name: section}
            write_text(PAGE, _HEAD + "".join(parts[known] for known in TRIALS if known in parts))


def nodes(trial: Trial) -> dict[str, workflow.Node]:
    """The graph of one trial."""
    found = workflow.load(_GRAPH)
    titled = {node.title: node for node in found.values()}
    titled["Prompts"].inputs = dict(trial.prompts)
    reward = titled["Reward (VideoMAE)"]
    reward.class_type, reward.inputs = trial.reward, {}
    for name in ("Base Sample", "Aligned Sample"):
        titled[name].inputs |= {"which": "all", "limit": 36, "steps": trial.steps, "guidance": trial.guidance}
    own = {"sampling_steps": trial.steps, "k": trial.steps, "guidance": trial.guidance}
    titled["VADER Train LoRA"].inputs |= {**own, **trial.training}
    return found


def _run(name: str, trial: Trial, base: Path) -> str:
    """The section of one reward; its picture is written."""
    base.mkdir(parents=True, exist_ok=True)
    host.use_base_directory(base)
    graph_nodes = nodes(trial)
    results = graph.run(graph_nodes, NODE_CLASS_MAPPINGS)
    by_title = {node.title: results[key] for key, node in graph_nodes.items()}
    prompts: PromptSet = by_title["Base Sample"][1]
    before, after = (
        to_videos(by_title[title][0], len(prompts.texts))[len(prompts.train) :]
        for title in ("Base Sample", "Aligned Sample")
    )
    shown = rows(len(prompts.held_out), 3)
    titles = [prompts.held_out[row] for row in shown]
    contact_sheet(base / "unseen.png", {"base": before[shown], "aligned": after[shown]}, titles)
    picture(base / "unseen.png", PICTURES / f"{name}.jpg")
    return (
        f"\n## {name}\n\n{trained_with(graph_nodes)}\n\n{trial.outcome(before, after, prompts.held_out)}\n\n"
        f"![{name}: base above, aligned below](images/{PICTURES.name}/{name}.jpg)\n\n"
        f"```text\n{by_title['Score Video'][0]}\n```\n"
    )


if __name__ == "__main__":
    main()
