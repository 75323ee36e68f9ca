"""What VADER reaches in a given time, with and without each option that changes the time of a step.

On the embedded ModelScope with the demo's reward. Each arm trains for the same processor seconds on one thread; a
fixed set of held-out prompts and noise is sampled and scored every so often, outside that time. What one update costs
is measured for all arms in turns: a training's own seconds depend on what else the machine did. Writes
results/reward_against_time.json, .md and .png; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch

from ..vader_backend import prompts as prompt_sets
from ..vader_backend import registry
from ..vader_backend.align import Settings, align
from ..vader_backend.checkpoint import write_text
from ..vader_backend.generate import SampleConfig, generate
from ..vader_backend.lora import LoraConfig
from ..vader_backend.memory.options import MemoryConfig
from ..vader_backend.models.base import VideoModel
from ..vader_backend.objectives.vader import Config
from ..vader_backend.prompts import PromptSet
from ..vader_backend.rewards.base import Combined, Reward
from ..vader_backend.trainer import Hooks, TrainOptions, TrainResult
from .common import RESULTS, known, modelscope, told, versions

NAME = "reward_against_time"
BATCH = 4
LEARNING_RATE = 0.00075  # half the demo's: at that, with K = 1 and no decay, the gain is lost within 120 updates
HELD_OUT = 16
LOOKS = 6  # at the held-out reward, besides the base's
GOAL = 0.5  # of the base's standard deviations over held-out prompts
STEPS = 10
COMPILED = "compile_rollout"
# Each arm: fields of vader.Config, TrainOptions or MemoryConfig in place of the base's. On a CPU compiling takes longer
# than the other arms together, so that this arm runs once and is not measured in turns.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "evaluations 2": {"evaluations": 2},
    "evaluations 4": {"evaluations": 4},
    "rollout_interval 2": {"rollout_interval": 2},
    COMPILED: {"compile_rollout": True},
    "one_by_one": {"one_by_one": True},
    "checkpointing": {"gradient_checkpointing": True},
}


@dataclass
class Course:
    """Follows one training and ends it when its time is used up.

    curve: (seconds, updates, videos scored, held-out reward) at the start and at every look.
    """

    model: VideoModel
    reward: Reward
    prompts: Sequence[str]
    seconds: float
    updates_per_step: int
    base: float
    curve: list[tuple[float, int, int, float]] = field(default_factory=list)
    _start: float = 0.0

    def __post_init__(self) -> None:
        self.curve.append((0.0, 0, 0, self.base))
        self._start = _clock()

    @property
    def spent(self) -> float:
        """Processor seconds so far, without those of the looks."""
        return _clock() - self._start

    def over(self) -> bool:
        return self.spent >= self.seconds

    def progress(self, result: TrainResult, total: int, metrics: dict[str, float]) -> None:
        """After each step: look, when it is time to."""
        if self.spent < len(self.curve) * self.seconds / LOOKS:
            return
        updates = result.step * self.updates_per_step
        with self._paused():
            reward = mean(scores(self.model, self.reward, self.prompts))
        self.curve.append((self.spent, updates, updates * BATCH, reward))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        begin = _clock()
        yield
        self._start += _clock() - begin


def _clock() -> float:
    """Processor seconds of this process, and of a compiler that it called."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    """Entry point of the last part of `make bench`."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.benchmarks.reward_against_time", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="processor seconds of training per arm")
    parser.add_argument("--seeds", type=int, default=2, help="trainings per arm")
    parser.add_argument("--rounds", type=int, default=3, help="how often the cost of an update is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, reward = modelscope(), _demo_reward()
    prompts = prompt_sets.build(prompt_sets.Config(source="mini"), lambda name: "")
    held_out = prompt_sets.limited(prompts, HELD_OUT, seed=0).held_out
    found = {"arms": {}, "rounds": [], **known(NAME), "versions": versions()}
    if "base" not in found:
        found["base"] = scores(model, reward, held_out)
    timed = {arm: settings for arm, settings in ARMS.items() if arm != COMPILED}
    for seed in range(options.seeds):
        for arm, settings in (ARMS if seed == 0 else timed).items():
            row = f"{arm}, seed {seed}"
            if found["arms"].get(row, {}).get("budget") != options.seconds:
                print(row, flush=True)
                base = mean(found["base"])
                found["arms"][row] = run(model, reward, prompts, held_out, settings, seed, options.seconds, base)
                write_text(RESULTS / f"{NAME}.json", json.dumps(found, indent=1) + "\n")
    if any(set(costs) != set(timed) for costs in found["rounds"]):
        found["rounds"] = []
    while len(found["rounds"]) < options.rounds:
        found["rounds"].append({arm: cost(model, reward, prompts, settings) for arm, settings in timed.items()})
        write_text(RESULTS / f"{NAME}.json", json.dumps(found, indent=1) + "\n")
    write_text(RESULTS / f"{NAME}.md", page(found))
    picture(found, RESULTS / f"{NAME}.png")


def _demo_reward() -> Reward:
    aesthetic, hps = (registry.load("rewards", name) for name in ("aesthetic", "hps"))
    return Combined([aesthetic.build(aesthetic.Config()), hps.build(hps.Config())], [1.0, 10.0])


@torch.no_grad()
def scores(model: VideoModel, reward: Reward, prompts: Sequence[str]) -> list[float]:
    """The reward of each held-out prompt's video, from noise that is always the same."""
    videos = generate(model, prompts, SampleConfig(seed=0, steps=STEPS))
    frames = reward.frames.report(videos.shape[1])
    return reward(videos[:, list(frames)], prompts, frames).tolist()


def run(
    model: VideoModel,
    reward: Reward,
    prompts: PromptSet,
    held_out: Sequence[str],
    arm: Mapping[str, Any],
    seed: int,
    seconds: float,
    base: float,
) -> dict[str, Any]:
    """Train one arm for so many processor seconds."""
    course = Course(model, reward, held_out, seconds, arm.get("evaluations", 1), base)
    _train(model, reward, prompts, arm, seed, Hooks(progress=course.progress, should_stop=course.over))
    return {"budget": seconds, "curve": course.curve}


def cost(model: VideoModel, reward: Reward, prompts: PromptSet, arm: Mapping[str, Any]) -> tuple[float, float]:
    """Processor seconds of a start, by which a training's first step is longer than its second, and of an update."""
    ends = [_clock()]
    hooks = Hooks(progress=lambda *told: ends.append(_clock()), should_stop=lambda: len(ends) == 2)
    _train(model, reward, prompts, arm, 0, hooks)
    first, second = (end - begin for begin, end in pairwise(ends))
    return max(0.0, first - second), second / arm.get("evaluations", 1)


def _train(
    model: VideoModel, reward: Reward, prompts: PromptSet, arm: Mapping[str, Any], seed: int, hooks: Hooks
) -> None:
    """Train one arm until the hooks stop it."""
    objective = replace(Config(sampling_steps=STEPS, k=1), **_fields_of(Config, arm))
    endless = TrainOptions(100_000, BATCH, learning_rate=LEARNING_RATE, save_every=100_000, seed=seed)
    settings = Settings(objective, lora=LoraConfig(rank=8), train=replace(endless, **_fields_of(TrainOptions, arm)))
    memory = MemoryConfig(**_fields_of(MemoryConfig, arm))
    with TemporaryDirectory() as folder:
        align(model, reward, prompts, settings, root=Path(folder), memory=memory, hooks=hooks)


def start_and_update(found: Mapping[str, Any], row: str) -> tuple[float, float]:
    """The middle one of the rounds of each, see `cost`."""
    starts, updates = zip(*(costs[row.rsplit(", seed ", 1)[0]] for costs in found["rounds"]), strict=True)
    return median(starts), median(updates)


def _fields_of(kind: Any, arm: Mapping[str, Any]) -> dict[str, Any]:
    """What an arm sets of one dataclass."""
    return {part.name: arm[part.name] for part in fields(kind) if part.name in arm}


def gains(found: Mapping[str, Any], row: str) -> list[float]:
    """How far each look is above the base, in its standard deviations over prompts."""
    base = found["base"]
    return [(reward - mean(base)) / stdev(base) for *_, reward in found["arms"][row]["curve"]]


def reached(xs: Sequence[float], ys: Sequence[float], goal: float) -> float | None:
    """Where y first comes to the goal, on straight lines between the points; None where it never does."""
    for (x, y), (next_x, next_y) in pairwise(zip(xs, ys, strict=True)):
        if y < goal <= next_y:
            return x + (goal - y) / (next_y - y) * (next_x - x)
    return None


def page(found: Mapping[str, Any]) -> str:
    """The table in markdown."""
    base = found["base"]
    lines = [
        "# Reward against time and against reward queries", "",
        f"VADER on the embedded ModelScope with the demo's reward (aesthetic + 10 HPS), {STEPS} sampling steps, K = 1, "
        f"batch {BATCH}, learning rate {LEARNING_RATE} throughout, rank 8. Each arm changes one option and trains for "
        "a budget of processor seconds on one thread. Seconds are a start (loading, encoding, compiling) and updates "
        f"times the cost of one, each the middle one of {len(found['rounds'])} rounds in which all arms ran in turns; "
        "a training's own clock, by which the budget ends, also sees what else the machine does, so that the arms end "
        "at different seconds. compile_rollout is on its own clock, most of which is compiling. All videos and both "
        "branches of guidance are one forward, but with one_by_one. "
        f"held-out: {len(base)} prompts that no training sees, always the same noise; without LoRA {mean(base):.2f}, "
        f"with a standard deviation of {stdev(base):.2f} over prompts, the unit of the gains. queries: videos scored "
        f"in training. To +{GOAL}: where the gain first gets there, on straight lines between the {LOOKS} looks.", "",
        "| arm | budget, s | updates | start, s | seconds per update | queries | final gain | best gain | "
        f"seconds to +{GOAL} | queries to +{GOAL} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [_line(found, row) for row in found["arms"]]
    return "\n".join([*lines, "", told(found["versions"])]) + "\n"


def _seconds(found: Mapping[str, Any], row: str) -> list[float]:
    """Of each look; the first is before the start."""
    curve = found["arms"][row]["curve"]
    if row.startswith(COMPILED):
        return [seconds for seconds, *_ in curve]
    start, each = start_and_update(found, row)
    return [start + each * updates if updates else 0.0 for _, updates, *_ in curve]


def _line(found: Mapping[str, Any], row: str) -> str:
    arm = found["arms"][row]
    gain = gains(found, row)
    _, updates, queries, _ = zip(*arm["curve"], strict=True)
    costs = ["", ""] if row.startswith(COMPILED) else [f"{cost:.2f}" for cost in start_and_update(found, row)]
    goals = [reached(xs, gain, GOAL) for xs in (_seconds(found, row), queries)]
    figures = [
        f"{arm['budget']:.0f}", f"{updates[-1]}", *costs, f"{queries[-1]}", f"{gain[-1]:+.2f}",
        f"{max(gain):+.2f}", *("not reached" if x is None else f"{x:.0f}" for x in goals),
    ]  # fmt: skip
    return f"| {row} | {' | '.join(figures)} |"


def picture(found: Mapping[str, Any], path: Path) -> None:
    """The gain over processor seconds, and over videos scored."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    arms = list(ARMS)
    for row, arm in found["arms"].items():
        name, seed = row.rsplit(", seed ", 1)
        queries = [scored for _, _, scored, _ in arm["curve"]]
        for plot, xs in zip(axes, (_seconds(found, row), queries), strict=True):
            color, line = f"C{arms.index(name)}", ("-", "--", ":")[int(seed) % 3]
            plot.plot(xs, gains(found, row), marker="o", markersize=4, color=color, linestyle=line, label=row)
    for plot, title in zip(axes, ("processor seconds of training", "reward queries (videos scored)"), strict=True):
        plot.axhline(0, color="0.6", linewidth=1)
        plot.axhline(GOAL, color="0.6", linewidth=1, linestyle=":")
        plot.set_xlabel(title)
        plot.grid(color="0.93")
    axes[0].set_ylabel("held-out reward: gain in the base's standard deviations")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
