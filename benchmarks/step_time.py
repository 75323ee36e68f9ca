"""The time of one VADER step against its floor: the forwards, backward, decode and reward that no step can avoid.

On the embedded ModelScope on CPU. Step and parts are timed in
turns in one run and the middle of each is kept, so that the ratio depends little on the machine. Writes
results/step_time.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from ..nodes.rewards import locate
from ..vader_backend import registry
from ..vader_backend.checkpoint import write_text
from ..vader_backend.lora import LoraConfig, attached
from ..vader_backend.mini.files import ROOT
from ..vader_backend.models.base import VideoModel
from ..vader_backend.objectives import vader
from ..vader_backend.objectives.base import Batch
from ..vader_backend.prompts import PromptSet
from ..vader_backend.rewards.base import Reward
from ..vader_backend.sampling import guided_prediction

RESULTS = Path(__file__).parent / "results"
STEPS = 10


def main() -> None:
    """Entry point of the second part of `make bench`."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.benchmarks.step_time", description=__doc__)
    parser.add_argument("--repeats", type=int, default=8, help="rounds; the middle one of each part counts")
    options = parser.parse_args()
    family = registry.load("models", "modelscope")
    model = family.build(family.Config(folder=str(ROOT / "modelscope")))
    hps = registry.load("rewards", "hps")
    found = ratio(model, hps.build(hps.Config(checkpoint="mini/clip"), locate), options.repeats)
    found |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_text(RESULTS / "step_time.json", json.dumps(found, indent=1) + "\n")
    lines = ["# Time of one step against its floor", "", "| part | seconds |", "|---|---:|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in found.items() if isinstance(value, float)]
    write_text(RESULTS / "step_time.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def ratio(model: VideoModel, reward: Reward, repeats: int) -> dict[str, object]:
    """Seconds of a step and of each part of its floor, and their ratio."""
    config = vader.Config(sampling_steps=STEPS, reward_frames="first")
    video = model.defaults.video
    with attached(model, LoraConfig(dropout=0.0), seed=0):
        objective = vader.build(config, model, reward, PromptSet(("a red circle",), ()), video, seed=0)
        trained = [p for p in model.denoiser.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        cond = model.encode(["a red circle"], video)
        z = torch.randn(model.latent_shape(video, 1))
        t = objective.schedule.timesteps[-1]

        def step() -> None:
            loss, _ = objective.loss(Batch(0, (0,), (0,)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        @torch.no_grad()
        def forward() -> None:
            guided_prediction(model, z, t, cond, objective.guidance)

        def differentiated() -> None:
            guided_prediction(model, z, t, cond, objective.guidance).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        def decode() -> None:
            model.decode(z.clone().requires_grad_(), [0]).sum().backward()

        frame = torch.rand(1, 1, 3, video.height, video.width)

        def score() -> None:
            reward(frame.clone().requires_grad_(), ["a red circle"], [0]).sum().backward()

        parts = {"step": step, "forwards": forward, "differentiated": differentiated, "decode": decode, "reward": score}
        seconds = medians(parts, {"forwards": STEPS - 1}, repeats)
    floor = sum(value for name, value in seconds.items() if name != "step")
    return {**seconds, "floor": floor, "step / floor": seconds["step"] / floor}


def medians(parts: dict[str, Callable[[], None]], times: dict[str, int], repeats: int) -> dict[str, float]:
    """The middle of each part's seconds over rounds in which all run in turns; `times`: how often a part is run."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.perf_counter()
            for _ in range(times.get(name, 1)):
                part()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
