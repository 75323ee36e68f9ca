"""Sampling whose gradient is truncated by a plan: pure functions on a VideoModel.

Source: VADER, Algorithm 1 and section 4; AlignProp (Prabhudesai et al. 2023) for random truncation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .config import InputError
from .process import Process, Schedule
from .types import Conditioning, Rollout


class Denoiser(Protocol):
    """The part of a VideoModel that sampling needs."""

    process: Process

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        """The native prediction at native time t, differentiable; same shape as z."""
        ...


@dataclass(frozen=True)
class GradPlan:
    """Which denoising steps are differentiated, noisiest first.

    stop_input: the denoiser's input is detached in every step (DRTune), so that the gradient
    reaches the weights through each step's own prediction only.
    """

    steps: tuple[bool, ...]
    stop_input: bool = False

    @classmethod
    def none(cls, total: int) -> GradPlan:
        """No step: plain sampling."""
        return cls((False,) * total)

    @classmethod
    def last_k(cls, total: int, k: int, *, stop_input: bool = False) -> GradPlan:
        """The last k steps (VADER, Algorithm 1)."""
        _check_k(total, k)
        return cls(tuple(i >= total - k for i in range(total)), stop_input)

    @classmethod
    def random_k(cls, total: int, k: int, rng: torch.Generator, *, stop_input: bool = False) -> GradPlan:
        """k distinct steps, drawn uniformly."""
        _check_k(total, k)
        chosen = set(torch.randperm(total, generator=rng)[:k].tolist())
        return cls(tuple(i in chosen for i in range(total)), stop_input)

    @classmethod
    def random_start(cls, total: int, rng: torch.Generator, *, stop_input: bool = False) -> GradPlan:
        """All steps from a uniformly drawn one on: "rand" of the published code."""
        return cls.from_step(total, int(torch.randint(total, (1,), generator=rng)), stop_input=stop_input)

    @classmethod
    def from_step(cls, total: int, start: int, *, stop_input: bool = False) -> GradPlan:
        """All steps from `start` (0 = noisiest) on: "specific" of the published code."""
        if not 0 <= start < total:
            raise InputError(f"from_step is {start}; with {total} sampling steps it must be between 0 and {total - 1}.")
        return cls(tuple(i >= start for i in range(total)), stop_input)

    @classmethod
    def uniform(cls, total: int, k: int, *, stop_input: bool = False) -> GradPlan:
        """k steps spread evenly over the chain; the last step is one of them."""
        _check_k(total, k)
        chosen = {total - 1 - (i * total) // k for i in range(k)}
        return cls(tuple(i in chosen for i in range(total)), stop_input)


def _check_k(total: int, k: int) -> None:
    if not 1 <= k <= total:
        raise InputError(f"K is {k}; with {total} sampling steps it must be between 1 and {total}.")


def guided_prediction(model: Denoiser, z: Tensor, t: float, cond: Conditioning, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance with one batched forward; gradient flows through both branches.

    guidance: 1 skips the negative branch; a tensor must broadcast against z.
    """
    if not isinstance(guidance, Tensor) and guidance == 1:
        return model.predict(z, t, dict(cond.positive))
    negative, positive = model.predict(torch.cat([z, z]), t, cond.both()).chunk(2)
    return negative + guidance * (positive - negative)


def step(
    process: Process,
    schedule: Schedule,
    i: int,
    z: Tensor,
    prediction: Tensor,
    eta: float,
    noise: Tensor | None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From entry i of the schedule to entry i + 1: the next latent, and the clean latent seen from here.

    Sources: DDIM (Song et al. 2020, eq. 12); DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    Args:
        history: the clean latent of the step before, for a solver of second order.
    """
    x0, direction = process.split(z, prediction, schedule.alpha[i], schedule.sigma[i])
    if schedule.solver == "dpm++2m" and schedule.fresh_noise(i, eta) == 0:
        return _second_order(schedule, i, z, x0, history), x0
    fresh = schedule.fresh_noise(i, eta)
    kept = max(schedule.sigma[i + 1] ** 2 - fresh**2, 0.0) ** 0.5
    z = schedule.alpha[i + 1] * x0 + kept * direction
    if fresh == 0:
        return z, x0
    if noise is None:
        raise ValueError("eta above 0 needs a noise source")
    return z + fresh * noise, x0


def _second_order(schedule: Schedule, i: int, z: Tensor, x0: Tensor, history: Tensor | None) -> Tensor:
    """DPM-Solver++(2M); the first step, and the last one to a latent without noise, are of first order."""
    alpha, sigma = schedule.alpha, schedule.sigma
    if sigma[i + 1] == 0:
        return alpha[i + 1] * x0
    width = _log_snr(schedule, i + 1) - _log_snr(schedule, i)
    data = x0
    if history is not None:
        ratio = (_log_snr(schedule, i) - _log_snr(schedule, i - 1)) / width
        data = x0 + (x0 - history) / (2 * ratio)
    return sigma[i + 1] / sigma[i] * z - alpha[i + 1] * math.expm1(-width) * data


def _log_snr(schedule: Schedule, i: int) -> float:
    return math.log(schedule.alpha[i] / schedule.sigma[i]) if schedule.alpha[i] else -math.inf


def sample(
    model: Denoiser,
    z: Tensor,
    cond: Conditioning,
    schedule: Schedule,
    plan: GradPlan,
    *,
    guidance: float | Tensor = 1.0,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    end: int | None = None,
    after: tuple[int, Rollout] | None = None,
) -> Rollout:
    """Run the chain; only the planned steps are differentiated.

    Steps outside the plan build no graph of the network. A step between two planned ones still
    passes the gradient on through its linear part, as stop_grad(pred) of Algorithm 1 does.

    Args:
        z: [B, C, T, H, W] float32, unit-variance noise.
        noise: gives the fresh noise of step i, shaped like z; needed where eta > 0.
        on_step: called after each step with its number and the latent, graph and all; what it raises ends the chain.
        end: stop before this step; None: run to the end.
        after: go on from the rollout of a chain that ended before this step; `z` is not looked at.
    """
    if len(plan.steps) != len(schedule):
        raise ValueError(f"the plan has {len(plan.steps)} steps, the schedule {len(schedule)}")
    begin, past = after or (0, Rollout(schedule.start * z))
    z, x0 = past.latents, past.history
    for i, differentiate in list(enumerate(plan.steps))[begin:end]:
        seen = z.detach() if plan.stop_input or not differentiate else z
        with torch.set_grad_enabled(differentiate):
            scaled = model.process.scale_input(seen, schedule.alpha[i], schedule.sigma[i])
            prediction = guided_prediction(model, scaled, schedule.timesteps[i], cond, guidance)
        z, x0 = step(model.process, schedule, i, z, prediction, eta, noise(i) if noise and eta else None, x0)
        if on_step is not None:
            on_step(i, z)
    return Rollout(z, x0)
