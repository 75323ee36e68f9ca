"""The words that all parts share: a video's size, conditioning, frame choice, a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoSpec:
    """Size of a video in pixels and frames; fps is used by families that are conditioned on it."""

    frames: int
    height: int
    width: int
    fps: float = 8.0


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told besides latents and time, for both branches of guidance.

    Each mapping holds batch-first tensors under the names that the model's `predict` reads.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]

    def select(self, rows: Sequence[int]) -> Conditioning:
        """The given samples, in the given order."""
        index = torch.as_tensor(rows)

        def pick(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[index.to(tensor.device)] for name, tensor in part.items()}

        return Conditioning(pick(self.positive), pick(self.negative))

    def to(self, device: torch.device | str) -> Conditioning:
        """A copy whose tensors lie on `device`."""
        return Conditioning(
            {name: tensor.to(device) for name, tensor in self.positive.items()},
            {name: tensor.to(device) for name, tensor in self.negative.items()},
        )

    def both(self) -> dict[str, Tensor]:
        """Negative then positive samples as one batch of twice the size."""
        return {name: torch.cat([self.negative[name], tensor]) for name, tensor in self.positive.items()}


@dataclass(frozen=True)
class FrameSpec:
    """Which frames of a video a reward looks at.

    mode: "random" (distinct, sorted), "first" (the first `count`), "even" (evenly spaced, ends included),
    "strided" (every n-th from the first, n as large as it can be; so did VADER and ViCLIP) or "all".
    exact: whether the reward takes `count` frames and no other number.
    """

    mode: Literal["random", "first", "even", "strided", "all"] = "all"
    count: int = 1
    exact: bool = False

    def report(self, total: int) -> Sequence[int]:
        """The frames by which a whole video of `total` frames is scored in reports: all that the reward can take."""
        return self.pick(total, torch.Generator().manual_seed(0)) if self.exact else range(total)

    def pick(self, total: int, rng: torch.Generator | None = None) -> list[int]:
        """Sorted frame indices out of `total`; never more than there are."""
        count = min(self.count, total)
        if self.mode == "all":
            return list(range(total))
        if self.mode == "first":
            return list(range(count))
        if self.mode == "strided":
            return [i * (total // count) for i in range(count)]
        if self.mode == "even":
            if count == 1:
                return [total // 2]
            return [round(i * (total - 1) / (count - 1)) for i in range(count)]
        return sorted(torch.randperm(total, generator=rng)[:count].tolist())


@dataclass(frozen=True)
class Rollout:
    """The end of a sampling chain.

    latents: [B, C, T, H, W]; carries the graph of the differentiated steps.
    history: the clean latent of the last step, from which a solver of second order goes on; None before any step.
    """

    latents: Tensor
    history: Tensor | None = None
