"""Where a rectified flow puts its steps: the shift and spacing of a diffusers scheduler configuration.

Sources: diffusers' FlowMatchEulerDiscreteScheduler and the flow sigmas of its UniPCMultistepScheduler;
Esser et al. 2024, eq. 23, for the shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import InputError
from ..types import VideoSpec

Spacing = Callable[[int, VideoSpec], list[float]]
_STRANGE = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")


def shifted(times: Sequence[float], shift: float) -> list[float]:
    """Times in [0, 1] moved towards noise: s t / (1 + (s - 1) t)."""
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def static_spacing(config: Mapping[str, Any], shift: float = 0.0) -> Spacing:
    """The spacing of a scheduler whose shift is the same for every video size.

    A UniPC configuration gives its times and shift only; the steps are Euler's.

    Args:
        config: scheduler_config.json of a FlowMatchEulerDiscreteScheduler or of a UniPC with flow sigmas.
        shift: takes the place of the configured shift unless 0.

    Raises:
        InputError: the configuration asks for something else.
    """
    _refuse_strange(config)
    if config.get("use_dynamic_shifting", False):
        raise InputError("The scheduler's use_dynamic_shifting is not supported for this family; set it to false.")
    if "UniPC" in str(config.get("_class_name", "")) and not config.get("use_flow_sigmas", False):
        raise InputError(
            "The scheduler is a UniPC without use_flow_sigmas, which is no rectified flow; set it to true."
        )
    total = int(config.get("num_train_timesteps", 1000))
    unipc = bool(config.get("use_flow_sigmas", False))
    factor = shift or float(config.get("flow_shift" if unipc else "shift", 1.0))
    # The Euler scheduler spaces between the ends of its training times, which carry the shift already.
    last = 1 / total if unipc else shifted([1 / total], factor)[0]

    def spacing(steps: int, video: VideoSpec) -> list[float]:
        points = np.linspace(1, last, steps + 1)[:-1] if unipc else np.linspace(1, last, steps)
        return _finished(shifted(points.tolist(), factor), config)

    return spacing


def dynamic_spacing(config: Mapping[str, Any], tokens: Callable[[VideoSpec], int]) -> Spacing:
    """The spacing 1, ..., 1 / steps, shifted by as much as the configuration asks for so many tokens.

    A configuration without dynamic shifting gives its fixed shift.

    Raises:
        InputError: the configuration asks for something that is not supported.
    """
    _refuse_strange(config)

    def spacing(steps: int, video: VideoSpec) -> list[float]:
        return _finished(shifted(np.linspace(1, 1 / steps, steps).tolist(), _shift_for(config, tokens(video))), config)

    return spacing


def _shift_for(config: Mapping[str, Any], tokens: int) -> float:
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def _finished(times: list[float], config: Mapping[str, Any]) -> list[float]:
    """Stretched so that the last time is the configured terminal one."""
    terminal = config.get("shift_terminal")
    if not terminal:
        return times
    if times[-1] == 1:
        raise InputError("This model's schedule needs at least 2 sampling steps.")
    stretch = (1 - terminal) / (1 - times[-1])
    return [1 - (1 - t) * stretch for t in times]


def _refuse_strange(config: Mapping[str, Any]) -> None:
    for name in _STRANGE:
        if config.get(name, False):
            raise InputError(f"The scheduler's {name} is not supported; set it to false.")
