"""What a training objective is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one optimizer update.

    numbers: position of each sample in the whole update; with the step it keys the sample's random
    draws, so that they do not depend on how the update is divided. rows: which training prompt each is of.
    turn: which update it is among those of one step.
    """

    step: int
    numbers: tuple[int, ...]
    rows: tuple[int, ...]
    turn: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def key(self) -> tuple[int | str, ...]:
        """What tells its random draws from those of others."""
        return (self.step, *self.numbers, *(("turn", self.turn) if self.turn else ()))

    def divide(self, rank: int, world: int, size: int) -> list[Batch]:
        """The micro-batches of at most `size` samples that process `rank` out of `world` works on."""
        mine = range(rank, len(self), world)
        rows = [mine[i : i + size] for i in range(0, len(mine), size)]
        return [
            Batch(self.step, tuple(self.numbers[r] for r in part), tuple(self.rows[r] for r in part), self.turn)
            for part in rows
        ]


@dataclass(frozen=True)
class Validation:
    """Videos of fixed prompts at one moment of the training: [B, T, 3, H, W] in [0, 1], and their rewards [B].

    file: where the run folder keeps them, once it does.
    """

    video_BTCHW: Tensor
    prompts: tuple[str, ...]
    rewards: Tensor
    file: Path | None = None


class Objective(Protocol):
    """Turns samples into a loss to minimise."""

    def collect(self, step: int, size: int) -> Iterable[Batch]:
        """One optimizer update per batch; `size` samples are asked for over all processes and micro-batches."""
        ...

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a micro-batch, with its graph, and metrics as one value per sample [B], without."""
        ...

    def after_update(self, step: int) -> None:
        """Called after each optimizer update."""
        ...

    def validate(self, size: int) -> Validation:
        """Sample and score the fixed prompts, without gradient, at most `size` at a time."""
        ...
