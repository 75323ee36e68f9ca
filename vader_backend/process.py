"""Diffusion processes: noise schedules and what a network's native prediction means.

At native time t a latent is z = alpha(t) x0 + sigma(t) noise. Every process is built from the
checkpoint's own scheduler configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import InputError
from .types import VideoSpec


@dataclass(frozen=True)
class Schedule:
    """T denoising steps.

    timesteps: T native times, noisiest first. alpha, sigma: T + 1 values each; entry i belongs to
    the latent that step i starts from, the last one to the finished latent.
    """

    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def fresh_noise(self, i: int, eta: float) -> float:
        """Standard deviation of the noise that step i adds: eta times DDPM's (Song et al. 2020, eq. 16)."""
        if eta == 0 or self.sigma[i] == 0 or self.alpha[i + 1] == 0:
            return 0.0
        shrink = 1 - (self.alpha[i] / self.alpha[i + 1]) ** 2
        return eta * self.sigma[i + 1] / self.sigma[i] * math.sqrt(max(shrink, 0.0))


class Process(Protocol):
    """A noise schedule and the meaning of the network's prediction."""

    def schedule(self, steps: int, video: VideoSpec) -> Schedule:
        """Exactly `steps` steps. Raises InputError where the process cannot take so many."""
        ...

    def split(self, z: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a native prediction at z stands for."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha(t) x0 + sigma(t) noise; t holds one native time per sample."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """DDPM's process: alpha^2 + sigma^2 = 1 over a table of training times.

    Source: the betas, spacings and zero-terminal-SNR rescaling of diffusers' DDIMScheduler
    (Ho et al. 2020; Song et al. 2020; Lin et al. 2023).

    prediction: "epsilon", "v_prediction" or "sample".
    spacing: "leading", "trailing" or "linspace".
    final_alpha_cumprod: signal power of the finished latent.
    """

    alphas_cumprod: Tensor
    prediction: str
    spacing: str
    steps_offset: int
    final_alpha_cumprod: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VariancePreserving:
        """Build from a diffusers scheduler_config.json.

        Raises:
            InputError: the configuration asks for something that this process does not have.
        """
        betas = _betas(config)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if config.get("rescale_betas_zero_snr", False):
            root = alphas_cumprod.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root.square()
        prediction = config.get("prediction_type", "epsilon")
        spacing = config.get("timestep_spacing", "leading")
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"The scheduler's prediction_type {prediction!r} is not supported.")
        if spacing not in ("leading", "trailing", "linspace"):
            raise InputError(f"The scheduler's timestep_spacing {spacing!r} is not supported.")
        if prediction == "epsilon" and float(alphas_cumprod[-1]) == 0:
            raise InputError("A schedule of zero terminal SNR needs v_prediction or sample prediction, not epsilon.")
        final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
        return cls(alphas_cumprod, prediction, spacing, int(config.get("steps_offset", 0)), final)

    @property
    def train_steps(self) -> int:
        return len(self.alphas_cumprod)

    def schedule(self, steps: int, video: VideoSpec | None = None) -> Schedule:
        times = self._timesteps(steps)
        power = [float(self.alphas_cumprod[t]) for t in times] + [self.final_alpha_cumprod]
        alpha = tuple(math.sqrt(p) for p in power)
        sigma = tuple(math.sqrt(1 - p) for p in power)
        return Schedule(tuple(float(t) for t in times), alpha, sigma)

    def split(self, z: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        if self.prediction == "epsilon":
            return (z - sigma * prediction) / alpha, prediction
        if self.prediction == "v_prediction":
            return alpha * z - sigma * prediction, alpha * prediction + sigma * z
        return prediction, (z - alpha * prediction) / sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._at(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for `add_noise(x0, noise, t)`."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self._at(t, x0)
        return alpha * noise - sigma * x0 if self.prediction == "v_prediction" else x0

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        power = self.alphas_cumprod.to(like.device)[t].view(-1, *[1] * (like.ndim - 1))
        return power.sqrt().to(like.dtype), (1 - power).sqrt().to(like.dtype)

    def _timesteps(self, steps: int) -> list[int]:
        total = self.train_steps
        if not 1 <= steps <= total:
            raise InputError(f"steps is {steps}; this model's schedule takes 1 to {total}.")
        if self.spacing == "trailing":
            return [round(total - i * total / steps) - 1 for i in range(steps)]
        if self.spacing == "linspace":
            return [round((total - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)]
        stride = total // steps
        offset = min(self.steps_offset, total - 1 - (steps - 1) * stride)
        return [i * stride + offset for i in reversed(range(steps))]


def _betas(config: Mapping[str, Any]) -> Tensor:
    total = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(start, end, total, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":
        curve = torch.cos((torch.arange(total + 1, dtype=torch.float64) / total + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    raise InputError(f"The scheduler's beta_schedule {kind!r} is not supported.")
