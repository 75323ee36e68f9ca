"""The one training loop of the recipe: warm-up and cosine, an average of the weights, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    muon: bool = True,
    log_every: int = 50,
) -> None:
    """Train `module` in place; afterwards it holds the averaged weights and is frozen.

    Args:
        loss: gives the loss of a step; all its draws come from the generator it is handed, which
            depends on (name, step) alone, so that an interrupted training resumes to the same result.
        work: folder of the checkpoints.
        muon: whether linear layers are left to Muon, which needs fewer steps than AdamW (Jordan et al. 2024).
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizers = _optimizers(module, learning_rate, muon=muon)
    checkpoints = CheckpointFolder(work / name)
    start = _restore(checkpoints, module, average, optimizers)
    module.eval()  # no dropout: networks of this size never learn too much by heart
    recent, clock = [], time.time()
    for step in range(start, steps):
        warm = min(1.0, (step + 1) / _WARMUP)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        # On CPUs the fused attention kernel is several times slower for sequences of 8 to 70 tokens.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(step, generator(SEED, name, step))
            value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(_EMA, (1 + step) / (10 + step)))
        recent.append(float(value.detach()))
        if (step + 1) % log_every == 0:
            mean = sum(recent) / len(recent)
            print(f"{name}: step {step + 1}/{steps} loss {mean:.4f} ({time.time() - clock:.0f} s)", flush=True)
            recent.clear()
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"module": module.state_dict(), "average": average, "optimizers": states}
            checkpoints.save(step + 1, state)
    with torch.no_grad():
        for parameter, mean_parameter in zip(parameters, average, strict=True):
            parameter.copy_(mean_parameter)
    module.requires_grad_(False)


def _optimizers(module: nn.Module, learning_rate: float, *, muon: bool) -> list[torch.optim.Optimizer]:
    matrices = [m.weight for m in module.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    matrices = matrices if muon else []
    taken = {id(matrix) for matrix in matrices}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    if not matrices:
        return [adamw]
    return [adamw, torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def _restore(
    checkpoints: CheckpointFolder, module: nn.Module, average: list[Tensor], optimizers: list[torch.optim.Optimizer]
) -> int:
    found = checkpoints.load_newest()
    if found is None:
        return 0
    step, state = found
    module.load_state_dict(state["module"])
    for mean, saved in zip(average, state["average"], strict=True):
        mean.copy_(saved)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return step
