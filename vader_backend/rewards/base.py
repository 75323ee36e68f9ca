"""What a reward is, and how rewards are combined and reshaped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..config import InputError
from ..types import FrameSpec


class Reward(Protocol):
    """Scores videos; higher is better.

    name: short, for reports. differentiable: whether gradient reaches the pixels.
    frames: which frames it looks at. description: what it is, as JSON, so that runs can be told apart.
    """

    name: str
    differentiable: bool
    frames: FrameSpec | UnionSpec
    description: dict[str, Any]

    def networks(self) -> Sequence[nn.Module]:
        """Its frozen networks, for whoever places them on devices."""
        ...

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        """Score the given frames.

        Args:
            video_BTCHW: [B, T, 3, H, W] in [0, 1], T = len(indices).
            prompts: one text per video.
            indices: which frames of the whole video these are.

        Returns:
            float32 [B].
        """
        ...

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        """The scores [B] to report, by name; for a combination those of its parts, unweighted."""
        ...


class SingleReward(ABC):
    """Base of the concrete rewards: one part, named like the reward."""

    name: str
    differentiable = True
    frames = FrameSpec("random", 1)
    description: dict[str, Any]

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        return {self.name: self(video_BTCHW, prompts, indices)}

    @abstractmethod
    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        """See `Reward`."""


@dataclass(frozen=True)
class Towards:
    """The published losses as a reward: minus the weighted distance of a reward to a target.

    form: "distance" -|r - target|; "hinge" -max(target - r, 0), which stops pushing above the target.
    """

    part: Reward
    target: float
    weight: float = 1.0
    form: Literal["distance", "hinge"] = "distance"

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def differentiable(self) -> bool:
        return self.part.differentiable

    @property
    def frames(self) -> FrameSpec | UnionSpec:
        return self.part.frames

    @property
    def description(self) -> dict[str, Any]:
        return {"towards": self.part.description, "target": self.target, "weight": self.weight, "form": self.form}

    def networks(self) -> Sequence[nn.Module]:
        return self.part.networks()

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        gap = self.target - self.part(video_BTCHW, prompts, indices)
        return -self.weight * (gap.abs() if self.form == "distance" else gap.clamp(min=0))

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        return self.part.parts(video_BTCHW, prompts, indices)


class SharedFrames(tuple[int, ...]):
    """The union of the frames of several rewards; `shares` are each one's own, in their order."""

    shares: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnionSpec:
    """Picks the frames of every part, and their union."""

    specs: tuple[Any, ...]

    def pick(self, total: int, rng: torch.Generator | None = None) -> SharedFrames:
        return _shared([spec.pick(total, rng) for spec in self.specs])

    def report(self, total: int) -> SharedFrames:
        return _shared([spec.report(total) for spec in self.specs])


def _shared(shares: Sequence[Sequence[int]]) -> SharedFrames:
    union = SharedFrames(sorted({index for share in shares for index in share}))
    union.shares = tuple(tuple(share) for share in shares)
    return union


class Combined:
    """A weighted sum of rewards. Frames picked by its own `frames` are shared out: each part sees its own.

    Raises:
        InputError: there is no part, or all weights are zero.
    """

    name = "combined"

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        if not rewards:
            raise InputError("Combine Rewards has no reward; connect at least one.")
        if not any(weights):
            raise InputError("The weights of all rewards are zero, so there is nothing to train on; set one above 0.")
        self.rewards = list(rewards)
        self.weights = list(weights)
        self.frames = UnionSpec(tuple(reward.frames for reward in rewards))

    @property
    def differentiable(self) -> bool:
        """Whether every part that counts is."""
        return all(r.differentiable for r, w in zip(self.rewards, self.weights, strict=True) if w)

    @property
    def description(self) -> dict[str, Any]:
        return {"sum": [reward.description for reward in self.rewards], "weights": self.weights}

    def networks(self) -> Sequence[nn.Module]:
        return [network for reward in self.rewards for network in reward.networks()]

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        total = torch.zeros(len(video_BTCHW), device=video_BTCHW.device)
        for i, weight in enumerate(self.weights):
            if weight:
                total = total + weight * self.rewards[i](*self._share(i, video_BTCHW, prompts, indices))
        return total

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        """Of a sum inside this one, its parts and the sum itself."""
        result: dict[str, Tensor] = {}
        for i, reward in enumerate(self.rewards):
            share = self._share(i, video_BTCHW, prompts, indices)
            result |= reward.parts(*share)
            if isinstance(reward, Combined):
                result[reward.name] = reward(*share)
        return result

    def _share(
        self, part: int, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]
    ) -> tuple[Tensor, Sequence[str], Sequence[int]]:
        if not isinstance(indices, SharedFrames):
            return video_BTCHW, prompts, indices
        own = indices.shares[part]
        return video_BTCHW[:, [indices.index(i) for i in own]], prompts, own
