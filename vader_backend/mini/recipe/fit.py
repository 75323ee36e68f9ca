"""The one training loop of the recipe: AdamW, warm-up and cosine, an average of the weights, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import CheckpointFolder
from ...rng import generator

SEED = 0
_SAVE_EVERY = 250
_WARMUP = 100
_EMA = 0.998


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    work: Path,
    log_every: int = 50,
) -> None:
    """Train `module` in place; afterwards it holds the averaged weights and is frozen.

    Args:
        loss: gives the loss of a step; all its draws come from the generator it is handed, which
            depends on (name, step) alone, so that an interrupted training resumes to the same result.
        work: folder of the checkpoints.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoints = CheckpointFolder(work / name)
    start = _restore(checkpoints, module, average, optimizer)
    module.train()
    recent, clock = [], time.time()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / _WARMUP)
            group["lr"] = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step, generator(SEED, name, step))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(_EMA, (1 + step) / (10 + step)))
        recent.append(float(value.detach()))
        if (step + 1) % log_every == 0:
            mean = sum(recent) / len(recent)
            print(f"{name}: step {step + 1}/{steps} loss {mean:.4f} ({time.time() - clock:.0f} s)", flush=True)
            recent.clear()
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            state = {"module": module.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            checkpoints.save(step + 1, state)
    with torch.no_grad():
        for parameter, mean_parameter in zip(parameters, average, strict=True):
            parameter.copy_(mean_parameter)
    module.eval().requires_grad_(False)


def _restore(
    checkpoints: CheckpointFolder, module: nn.Module, average: list[Tensor], optimizer: torch.optim.Optimizer
) -> int:
    found = checkpoints.load_newest()
    if found is None:
        return 0
    step, state = found
    module.load_state_dict(state["module"])
    for mean, saved in zip(average, state["average"], strict=True):
        mean.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return step
