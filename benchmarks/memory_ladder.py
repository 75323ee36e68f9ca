"""The paper's Table 7, and what lies below it: device memory of one VADER step at full size, trick by trick.

Predicted by `estimate`, so on any machine; with --measure and a CUDA device each row is also run with random weights.
Writes results/memory_ladder.json, .md and .png; rows that are there already are kept, so that an interrupted run
goes on. Rows: VADER (Prabhudesai et al. 2024), Table 7: LoRA and mixed precision, one frame, truncation, gradient
checkpointing; then this pack's own.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from ..vader_backend import registry
from ..vader_backend.align import Settings
from ..vader_backend.checkpoint import write_text
from ..vader_backend.estimate import Estimate, estimate, measure
from ..vader_backend.generate import VideoConfig
from ..vader_backend.memory.options import PRESETS, MemoryConfig
from ..vader_backend.models.base import VideoModel
from ..vader_backend.objectives.vader import Config
from ..vader_backend.rewards.base import Combined, Reward

RESULTS = Path(__file__).parent / "results"
PAPER = (("LoRA + mixed precision", 276.3), ("+ one frame", 228.9), ("+ K = 1", 69.4), ("+ checkpointing", 32.5))


@dataclass(frozen=True)
class Subject:
    """A published model at the size that it is trained at here, and the rewards.

    bar: GB that the preset of the last row must keep to, where one is set.
    settings: the rewards' own, beside their defaults.
    """

    family: str
    checkpoint: str
    dtype: str
    video: VideoConfig
    rewards: tuple[str, ...]
    bar: int | None
    preset: str
    whole_ladder: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)


_HPS = ("hps",)
SUBJECTS = {
    "ModelScope, 384x384x16": Subject(
        "modelscope", "ModelScope 1.7B", "float16", VideoConfig(16, 384, 384), _HPS, 12, "12 GB", True
    ),
    "VideoCrafter2, 512x320x12": Subject(
        "videocrafter2", "VideoCrafter2", "float16", VideoConfig(12, 320, 512), ("hps", "aesthetic"), 12, "12 GB"
    ),
    "Open-Sora 1.2, 368x276x51": Subject(
        "opensora", "Open-Sora 1.2", "bfloat16", VideoConfig(51, 276, 368), _HPS, 16, "16 GB"
    ),
    "SVD, 1024x576x14": Subject(
        "svd", "Stable Video Diffusion, 14 frames", "float16", VideoConfig(14, 576, 1024), _HPS, 16, "16 GB"
    ),
    "SVD with V-JEPA, 1024x576x14": Subject(
        "svd", "Stable Video Diffusion, 14 frames", "float16", VideoConfig(14, 576, 1024), ("vjepa",), None, "16 GB",
        settings={"frames": 14},
    ),
    "Wan 2.1 1.3B, 832x480x81": Subject(
        "wan", "Wan 2.1 T2V 1.3B", "bfloat16", VideoConfig(81, 480, 832), _HPS, 16, "16 GB"
    ),
    "Wan 2.1 14B, 832x480x81": Subject(
        "wan", "Wan 2.1 T2V 14B", "bfloat16", VideoConfig(81, 480, 832), _HPS, 24, "24 GB"
    ),
}  # fmt: skip


def rows(subject: Subject) -> dict[str, tuple[Config, MemoryConfig]]:
    """The rungs, from the paper's first to the preset."""
    none, one = MemoryConfig(), Config(k=1)
    every = registry.load("models", subject.family).PUBLISHED.steps if subject.whole_ladder else 0
    paper = {
        "LoRA + mixed precision": (Config(k=every, reward_frames="all"), none),
        "+ one frame": (Config(k=every), none),
    }
    return {
        **(paper if subject.whole_ladder else {}),
        "+ K = 1": (one, none),
        "+ checkpointing": (one, replace(none, gradient_checkpointing=True)),
        f"preset {subject.preset}": (one, PRESETS[subject.preset]),
    }


def main() -> None:
    """Entry point of the first part of `make bench`."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.benchmarks.memory_ladder", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the subjects' names")
    parser.add_argument("--measure", action="store_true", help="run each row on this machine's CUDA device, too")
    options = parser.parse_args()
    path = RESULTS / "memory_ladder.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
    for name, subject in SUBJECTS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        for rung, (config, memory) in rows(subject).items():
            found = known["rows"].setdefault(name, {}).setdefault(rung, {})
            if "estimated" not in found:
                print(name, rung, flush=True)
                model, reward = made(subject)
                found["estimated"] = _told(estimate(model, reward, Settings(config, video=subject.video), memory))
            if options.measure and "measured" not in found:
                found["measured"] = _told(_measured(subject, config, memory))
            known["versions"] = {"torch": torch.__version__, "machine": platform.machine()}
            known["rows"] = {name: known["rows"][name] for name in SUBJECTS if name in known["rows"]}
            write_text(path, json.dumps(known, indent=1) + "\n")
    write_text(RESULTS / "memory_ladder.md", page(known["rows"]))
    picture(known["rows"], RESULTS / "memory_ladder.png")


def made(subject: Subject) -> tuple[VideoModel, Reward]:
    """Model and reward at full size, without weights."""
    family = registry.load("models", subject.family)
    rewards = []
    for name in subject.rewards:
        module = registry.load("rewards", name)
        dtype = {"dtype": "bfloat16"} if "dtype" in module.Config.__dataclass_fields__ else {}
        rewards.append(module.full_size(module.Config(**dtype, **subject.settings)))
    reward = rewards[0] if len(rewards) == 1 else Combined(rewards, [1.0] * len(rewards))
    return family.full_size(subject.checkpoint, family.Config(dtype=subject.dtype)), reward


def _measured(subject: Subject, config: Config, memory: MemoryConfig) -> Estimate:
    """The row on this machine's CUDA device, with small random weights."""
    model, reward = made(subject)
    for network in (*model.parts().values(), *reward.networks()):
        network.to_empty(device="cpu")
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.normal_(tensor, std=0.01)
            else:
                tensor.zero_()
    return measure(model, reward, Settings(config, video=subject.video), memory, torch.device("cuda"))


def _told(found: Estimate) -> dict[str, Any]:
    return asdict(found)


def page(rows: Mapping[str, Any]) -> str:
    """The table in markdown."""
    lines = [
        "# Memory of one VADER step at full size", "",
        "GB (10^9 bytes). device: the peak of live tensors on the accelerator, predicted by running the real step on "
        "tensors without content; main memory: offloaded graph and networks that wait there. Batch 1, guidance on, "
        "K = 1 and one frame unless the row says otherwise; V-JEPA (ViT-L) sees all frames. The paper's Table 7 counts "
        "device and main memory as one; main memory holds the networks before they are placed. A row that is not "
        "measured on a GPU is a prediction.",
        "",
        "| model | row | device | main memory | bar | paper, in all | measured on a GPU |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, rungs in rows.items():
        for rung, found in rungs.items():
            told = found["estimated"]
            bar = f"{SUBJECTS[name].bar or ''}" if rung.startswith("preset") else ""
            paper = dict(PAPER).get(rung, "") if name.startswith("ModelScope") else ""
            measured = f"{found['measured']['peak'] / 1e9:.1f}" if "measured" in found else ""
            figures = [f"{told['peak'] / 1e9:.1f}", f"{told['host'] / 1e9:.1f}", bar, str(paper), measured]
            lines.append(f"| {name} | {rung} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def picture(rows: Mapping[str, Any], path: Path) -> None:
    """Peaks as bars on a logarithmic scale, with the card that each model is meant for."""
    figure, axes = plt.subplots(1, len(rows), figsize=(3 * len(rows), 4), sharey=True, layout="constrained")
    for axis, (name, rungs) in zip(axes if len(rows) > 1 else [axes], rows.items(), strict=True):
        peaks = [found["estimated"]["peak"] / 1e9 for found in rungs.values()]
        bars = axis.bar(range(len(peaks)), peaks, color="#4878a8")
        axis.bar_label(bars, [f"{peak:.0f}" if peak >= 100 else f"{peak:.1f}" for peak in peaks])
        if (limit := SUBJECTS[name].bar) is not None:
            axis.axhline(limit, color="#c44", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(peaks)), list(rungs), rotation=40, ha="right", fontsize=8)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
    figure.supylabel("GB on the device")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
