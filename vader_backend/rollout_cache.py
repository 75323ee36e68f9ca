"""Predictions that serve for several denoising steps where no gradient is wanted.

Neighbouring steps predict nearly the same (Wimbauer et al. 2024, "Cache Me if You Can"; Liu et al. 2024, TeaCache),
except the first two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import Denoiser

_ALWAYS = 2  # without the second step the error is two to ten times as large on the embedded models


class CachedRollout:
    """A denoiser for one chain that runs at the first two steps, at every n-th one and wherever gradient is wanted."""

    def __init__(self, model: Denoiser, interval: int) -> None:
        self.model = model
        self.process = model.process
        self.interval = interval
        self._number = 0
        self._last: Tensor | None = None

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        """See `vader_backend.sampling.Denoiser`."""
        number, last = self._number, self._last
        self._number += 1
        if last is not None and number >= _ALWAYS and number % self.interval and not torch.is_grad_enabled():
            return last
        prediction = self.model.predict(z, t, cond)
        self._last = prediction.detach()
        return prediction


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """[B]: the root mean square of the difference, in that of `wanted`."""
    return (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
