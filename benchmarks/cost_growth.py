"""How time and peak memory of one VADER step grow with frames, resolution, K and batch.

On the embedded ModelScope with the embedded HPS: processor seconds of the real step, all points in turns, and the
bytes of its live tensors. At full size: the device memory that `estimate` predicts. Writes results/cost_growth.json,
.md and .png; an interrupted run goes on, and each run adds rounds of timing until there are enough.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch

from ..vader_backend import registry
from ..vader_backend.align import Settings
from ..vader_backend.checkpoint import write_text
from ..vader_backend.estimate import estimate, measure
from ..vader_backend.lora import attached
from ..vader_backend.memory.options import MemoryConfig, tricks
from ..vader_backend.models.base import VideoModel
from ..vader_backend.objectives.base import Batch
from ..vader_backend.prompts import PromptSet
from ..vader_backend.rewards.base import Reward
from . import memory_ladder
from .common import RESULTS, known, modelscope, told, versions
from .cost_grid import AXES, GRIDS, PRESET, TRICKS, Grid, case

NAME = "cost_growth"
SUBJECT = next(iter(memory_ladder.SUBJECTS.values()))


def main() -> None:
    """Entry point of the third part of `make bench`."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.benchmarks.cost_growth", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed; the middle one counts")
    parser.add_argument("--only", choices=tuple(GRIDS), help="the embedded model, or the estimates at full size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"rounds": [], **{name: {} for name in GRIDS}, **known(NAME), "versions": versions()}
    if options.only in (None, "embedded"):
        model, reward = modelscope(), _hps()
        _memory(found, "embedded", lambda *asked: measure(model, reward, *asked, torch.device("cpu")))
        while len(found["rounds"]) < options.rounds:
            found["rounds"].append(_timed(model, reward, GRIDS["embedded"]))
            _keep(found)
    if options.only in (None, "full size"):
        made = cache(lambda: memory_ladder.made(SUBJECT))
        _memory(found, "full size", lambda *asked: estimate(*made(), *asked))
    _keep(found)
    write_text(RESULTS / f"{NAME}.md", page(found))
    picture(found, RESULTS / f"{NAME}.png")


def _hps() -> Reward:
    hps = registry.load("rewards", "hps")
    return hps.build(hps.Config())


def _keep(found: Mapping[str, Any]) -> None:
    write_text(RESULTS / f"{NAME}.json", json.dumps(found, indent=1) + "\n")


def _memory(found: dict[str, Any], name: str, peak: Callable[[Settings, MemoryConfig], Any]) -> None:
    """Fill in the rows that are missing, and keep each."""
    grid = GRIDS[name]
    for row, (names, point) in grid.cases().items():
        if row not in found[name]:
            print(name, row, flush=True)
            found[name][row] = asdict(peak(point.settings(grid.sampling_steps), TRICKS[names]))
            _keep(found)


def _timed(model: VideoModel, reward: Reward, grid: Grid) -> dict[str, float]:
    """Processor seconds of one step of each case; on one thread, so that other work on the machine counts little."""
    seconds = {}
    for row, (names, point) in grid.cases().items():
        settings = point.settings(grid.sampling_steps)
        with tricks(model, reward.networks(), TRICKS[names], model.device), attached(model, settings.lora, seed=0):
            step = _step(model, reward, settings)
            start = time.process_time()
            step()
            seconds[row] = time.process_time() - start
    return seconds


def _step(model: VideoModel, reward: Reward, settings: Settings) -> Callable[[], None]:
    """One optimizer step; the prompts are encoded already."""
    size = settings.train.batch_size
    prompts = PromptSet(("a video",) * size, ())
    objective = registry.load("objectives", settings.method).build(
        settings.objective, model, reward, prompts, settings.video.resolve(model), seed=0
    )
    optimizer = torch.optim.AdamW([p for p in model.denoiser.parameters() if p.requires_grad])

    def step() -> None:
        loss, _ = objective.loss(Batch(0, tuple(range(size)), tuple(range(size))))
        loss.backward()
        optimizer.step()

    return step


def growth(found: Mapping[str, Any], name: str, row: str) -> tuple[float | None, float]:
    """Time and peak memory of a row over those of the grid's reference; None where time was not measured."""
    reference = GRIDS[name].reference
    memory = found[name][row]["peak"] / found[name][reference]["peak"]
    if name != "embedded":
        return None, memory
    return _seconds(found, row) / _seconds(found, reference), memory


def _seconds(found: Mapping[str, Any], row: str) -> float:
    return median(seconds[row] for seconds in found["rounds"])


def page(found: Mapping[str, Any]) -> str:
    """The tables in markdown."""
    lines = [
        "# How one VADER step grows with frames, resolution, K and batch", "",
        f"Time and memory are relative: embedded to {GRIDS['embedded'].base} without tricks, full size to "
        f"{GRIDS['full size'].base} with the preset {PRESET}. Embedded: ModelScope of the embedded world with HPS on "
        f"one frame, {GRIDS['embedded'].sampling_steps} sampling steps; seconds of processor time on one thread, the "
        f"middle one of {len(found['rounds'])} rounds in which all rows ran in turns; peak: live tensors of the real "
        "step with networks and optimizer. Full size: ModelScope 1.7B with HPSv2.1, peak on the device as predicted "
        "by `estimate`; its time is not predicted. resident: what lies there between steps.",
    ]  # fmt: skip
    for axis, title in AXES.items():
        lines += ["", f"## {title}", ""]
        lines += [f"| model | tricks | {title} | time | memory | seconds | peak, GB | resident, GB |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        lines += [_line(found, *row) for row in _rows(found, axis)]
    return "\n".join([*lines, "", told(found["versions"])]) + "\n"


def _rows(found: Mapping[str, Any], axis: str) -> list[tuple[str, str, int, str]]:
    """(grid, tricks, value, case) of what is there of one axis."""
    every = ((name, *row) for name, grid in GRIDS.items() for row in grid.along(axis))
    return [
        (name, names, value, case(names, point))
        for name, names, value, point in every
        if case(names, point) in found[name]
    ]


def _line(found: Mapping[str, Any], name: str, names: str, value: int, row: str) -> str:
    seconds, memory = growth(found, name, row)
    figures = [
        "" if seconds is None else f"{seconds:.2f}",
        f"{memory:.2f}",
        "" if seconds is None else f"{_seconds(found, row):.2f}",
        *(f"{found[name][row][part] / 1e9:.3g}" for part in ("peak", "resident")),
    ]
    return f"| {name} | {names} | {value} | {' | '.join(figures)} |"


def picture(found: Mapping[str, Any], path: Path) -> None:
    """A column per axis: time above, memory below, over the base's size, with the line of proportional growth."""
    figure, axes = plt.subplots(2, len(AXES), figsize=(14, 7), sharey="row", layout="constrained")
    for (axis, title), (above, below) in zip(AXES.items(), axes.T, strict=True):
        for name, names in dict.fromkeys(row[:2] for row in _rows(found, axis)):
            rows = [(value, row) for *line, value, row in _rows(found, axis) if line == [name, names]]
            sizes = [value / getattr(GRIDS[name].base, axis) for value, _ in rows]
            grown = [growth(found, name, row) for _, row in rows]
            style = f"C{list(TRICKS).index(names)}" + ("o-" if name == "embedded" else "s--")
            if name == "embedded":
                above.plot(sizes, [seconds for seconds, _ in grown], style, markersize=4)
            below.plot(sizes, [memory for _, memory in grown], style, markersize=4, label=f"{name}, {names}")
        _scaled(above, axis)
        _scaled(below, axis)
        above.set_title(title)
        below.set_xlabel(f"{'K' if axis == 'k' else axis}, over the base's")
    axes[0, 0].set_ylabel("processor time of a step, over the base's")
    axes[1, 0].set_ylabel("peak memory, over the base's")
    shown = {name: line for plot in axes[1] for line, name in zip(*plot.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _scaled(plot: Any, axis: str) -> None:
    """Logarithmic axes with plain numbers, and in grey growth in proportion to values or, for the side, to pixels."""
    ends = sorted({value / getattr(grid.base, axis) for grid in GRIDS.values() for value in grid.values[axis]})
    growth = [x ** (2 if axis == "side" else 1) for x in ends]
    plot.plot(ends, growth, color="0.8", zorder=0, label="in proportion (side: to pixels)")
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_xticks(ends, [f"{x:.3g}" for x in ends])
    plot.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    plot.minorticks_off()
    plot.grid(color="0.93")


if __name__ == "__main__":
    main()
