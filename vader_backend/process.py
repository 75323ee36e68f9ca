"""Diffusion processes: noise schedules and what a network's native prediction means.

At native time t a latent is z = alpha(t) x0 + sigma(t) noise. Every process is built from the
checkpoint's own scheduler configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .config import InputError
from .types import VideoSpec

Solver = Literal["ddim", "dpm++2m"]


@dataclass(frozen=True)
class Schedule:
    """T denoising steps.

    timesteps: T native times, noisiest first. alpha, sigma: T + 1 values each; entry i belongs to
    the latent that step i starts from, the last one to the finished latent.
    start: standard deviation of the noise that the first step starts from.
    solver: "ddim" (which is Euler's method for flows and EDM) or "dpm++2m".
    stochastic: whether steps may add fresh noise.
    """

    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    start: float = 1.0
    solver: Solver = "ddim"
    stochastic: bool = False

    def __len__(self) -> int:
        return len(self.timesteps)

    def fresh_noise(self, i: int, eta: float) -> float:
        """Standard deviation of the noise that step i adds: eta times DDPM's (Song et al. 2020, eq. 16).

        Raises:
            InputError: eta is above 0 where steps add no noise.
        """
        if eta == 0:
            return 0.0
        if not self.stochastic:
            raise InputError(f"eta is {eta}; the sampler of this model adds no noise: set eta to 0.")
        power, after = 1 - self.sigma[i] ** 2, 1 - self.sigma[i + 1] ** 2
        if self.sigma[i] == 0 or after == 0:
            return 0.0
        return eta * self.sigma[i + 1] / self.sigma[i] * math.sqrt(max(1 - power / after, 0.0))


class Process(Protocol):
    """A noise schedule and the meaning of the network's prediction."""

    def schedule(self, steps: int, video: VideoSpec) -> Schedule:
        """Exactly `steps` steps. Raises InputError where the process cannot take so many."""
        ...

    def scale_input(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        """The latent as the network wants to see it."""
        ...

    def split(self, z: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a native prediction at z stands for."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha(t) x0 + sigma(t) noise; t holds one native time per sample."""
        ...


# What DPMSolverMultistepScheduler puts in place of zero terminal SNR.
_NEARLY_ZERO = 2.0**-24

# Its options that have one value here.
_DPM_OPTIONS = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}


def _check_solver(config: Mapping[str, Any]) -> None:
    for name, value in _DPM_OPTIONS.items():
        if config.get(name, value) != value:
            raise InputError(f"The scheduler's {name} {config[name]!r} is not supported by dpm++2m; choose ddim.")


@dataclass(frozen=True)
class VariancePreserving:
    """DDPM's process: alpha^2 + sigma^2 = 1 over a table of training times.

    Sources: the betas, spacings and zero-terminal-SNR rescaling of diffusers' DDIMScheduler and
    DPMSolverMultistepScheduler (Ho et al. 2020; Song et al. 2020; Lin et al. 2023; Lu et al. 2022);
    VideoCrafter2's dynamic scale (Chen et al. 2024), which makes alpha = scale * sqrt(alphas_cumprod).

    prediction: "epsilon", "v_prediction" or "sample".
    spacing: "leading", "trailing" or "linspace".
    final_alpha_cumprod: signal power of the finished latent, unscaled.
    solver: "dpm++2m" has its own timesteps and ends at a latent without noise.
    scale: factor of the clean latent by training time, [train_steps] or more; epsilon prediction only.
    """

    alphas_cumprod: Tensor
    prediction: str
    spacing: str
    steps_offset: int
    final_alpha_cumprod: float
    solver: Solver = "ddim"
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and self.prediction != "epsilon":
            raise ValueError(f"a dynamic scale needs epsilon prediction, not {self.prediction}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], solver: Solver = "ddim") -> VariancePreserving:
        """Build from a diffusers scheduler_config.json, of whatever scheduler.

        Args:
            solver: "dpm++2m" reads the configuration as DPMSolverMultistepScheduler.from_config does.

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
        spacing = config.get("timestep_spacing", "leading" if solver == "ddim" else "linspace")
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"The scheduler's prediction_type {prediction!r} is not supported.")
        if spacing not in ("leading", "trailing", "linspace"):
            raise InputError(f"The scheduler's timestep_spacing {spacing!r} is not supported.")
        if prediction == "epsilon" and float(alphas_cumprod[-1]) == 0:
            raise InputError("A schedule of zero terminal SNR needs v_prediction or sample prediction, not epsilon.")
        final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
        if solver == "dpm++2m":
            _check_solver(config)
            final = 1.0
            alphas_cumprod[-1] = max(float(alphas_cumprod[-1]), _NEARLY_ZERO)
        return cls(alphas_cumprod, prediction, spacing, int(config.get("steps_offset", 0)), final, solver)

    @property
    def train_steps(self) -> int:
        return len(self.alphas_cumprod)

    def schedule(self, steps: int, video: VideoSpec | None = None) -> Schedule:
        return self.through(self._timesteps(steps))

    def through(self, times: Sequence[int]) -> Schedule:
        """The schedule of the given training times, noisiest first."""
        power = [float(self.alphas_cumprod[t]) for t in times] + [self.final_alpha_cumprod]
        scale = [1.0] * len(power) if self.scale is None else self.scale[[*times, 0]].tolist()
        alpha = tuple(s * math.sqrt(p) for s, p in zip(scale, power, strict=True))
        sigma = tuple(math.sqrt(1 - p) for p in power)
        native = tuple(float(t) for t in times)
        return Schedule(native, alpha, sigma, solver=self.solver, stochastic=self.solver == "ddim")

    def scale_input(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        return z

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
        alpha = power.sqrt()
        if self.scale is not None:
            alpha = alpha * self.scale.to(like.device)[t].view_as(alpha)
        return alpha.to(like.dtype), (1 - power).sqrt().to(like.dtype)

    def _timesteps(self, steps: int) -> list[int]:
        total, skips_last = self.train_steps, self.solver == "dpm++2m" and self.spacing != "trailing"
        if not 1 <= steps <= total - skips_last:
            raise InputError(f"steps is {steps}; this model's schedule takes 1 to {total - skips_last}.")
        return self._spaced(steps + 1)[:-1] if skips_last else self._spaced(steps)

    def _spaced(self, steps: int) -> list[int]:
        total = self.train_steps
        if self.spacing == "trailing":
            stride = total - (total - total / steps)  # rounded as numpy's arange does, which decides ties
            return [round(total - i * stride) - 1 for i in range(steps)]
        if self.spacing == "linspace":
            last = max(steps - 1, 1)
            return [round((total - 1) / last * (last - i)) for i in range(steps)]
        stride = total // steps
        offset = min(self.steps_offset, total - 1 - (steps - 1) * stride)
        return [i * stride + offset for i in reversed(range(steps))]


@dataclass(frozen=True)
class Flow:
    """Rectified flow: z = (1 - t) x0 + t noise for t in [0, 1]; native time is train_steps t (Liu et al. 2022).

    spacing: gives `steps` values of t, the first at most 1, falling towards 0.
    towards_data: whether the network predicts x0 - noise (Open-Sora) or noise - x0 (Wan, LTX).
    """

    spacing: Callable[[int, VideoSpec], Sequence[float]]
    towards_data: bool = False
    train_steps: int = 1000

    def schedule(self, steps: int, video: VideoSpec) -> Schedule:
        if steps < 1:
            raise InputError(f"steps is {steps}; it must be at least 1.")
        times = [float(t) for t in self.spacing(steps, video)]
        sigma = (*times, 0.0)
        return Schedule(tuple(self.train_steps * t for t in times), tuple(1 - t for t in sigma), sigma)

    def scale_input(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        return z

    def split(self, z: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        to_noise = -prediction if self.towards_data else prediction
        x0 = z - sigma * to_noise
        return x0, x0 + to_noise

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = (t / self.train_steps).view(-1, *[1] * (x0.ndim - 1)).to(x0)
        return (1 - t) * x0 + t * noise


@dataclass(frozen=True)
class EDM:
    """z = x0 + sigma noise, with v-prediction and sigma_data 1; native time is log(sigma) / 4.

    Sources: Karras et al. 2022, table 1; Blattmann et al. 2023; diffusers' EulerDiscreteScheduler.

    spacing: gives `steps` values of sigma, noisiest first.
    """

    spacing: Callable[[int], Sequence[float]]

    def schedule(self, steps: int, video: VideoSpec) -> Schedule:
        if steps < 1:
            raise InputError(f"steps is {steps}; it must be at least 1.")
        sigma = tuple(float(s) for s in self.spacing(steps))
        start = math.sqrt(sigma[0] ** 2 + 1)
        return Schedule(tuple(0.25 * math.log(s) for s in sigma), (1.0,) * (steps + 1), (*sigma, 0.0), start)

    def scale_input(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        return z / math.sqrt(sigma**2 + 1)

    def split(self, z: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        power = sigma**2 + 1
        x0 = z / power - sigma / math.sqrt(power) * prediction
        return x0, (z - x0) / sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x0 + torch.exp(4 * t).view(-1, *[1] * (x0.ndim - 1)).to(x0) * noise


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
