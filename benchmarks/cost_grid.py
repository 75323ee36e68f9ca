"""The sizes of a step that cost_growth compares: a base point, and what stands in its place along each axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..vader_backend.align import Settings
from ..vader_backend.generate import VideoConfig
from ..vader_backend.memory.options import PRESETS, MemoryConfig
from ..vader_backend.objectives.vader import Config
from ..vader_backend.trainer import TrainOptions

PRESET = "12 GB"
TRICKS: Mapping[str, MemoryConfig] = {
    "no tricks": MemoryConfig(),
    "checkpointing": MemoryConfig(gradient_checkpointing=True),
    "stepwise": MemoryConfig(stepwise=True),
    "checkpointing + stepwise": MemoryConfig(gradient_checkpointing=True, stepwise=True),
    PRESET: PRESETS[PRESET],
}
AXES = {"frames": "frames", "side": "height and width, pixels", "k": "K", "batch": "batch"}


@dataclass(frozen=True)
class Point:
    """A step's size."""

    frames: int
    side: int
    k: int = 1
    batch: int = 1

    def settings(self, sampling_steps: int) -> Settings:
        """Of a run at this size."""
        video = VideoConfig(self.frames, self.side, self.side)
        return Settings(Config(sampling_steps, k=self.k), train=TrainOptions(batch_size=self.batch), video=video)

    def __str__(self) -> str:
        return f"{self.frames} frames, side {self.side}, K {self.k}, batch {self.batch}"


@dataclass(frozen=True)
class Grid:
    """A base point, and along each axis the values in its place.

    tricks: names in TRICKS, the first one for the base; more_for_k: those that only the axis K tells apart.
    sampling_steps: 0 for the published number.
    """

    base: Point
    values: Mapping[str, tuple[int, ...]]
    tricks: tuple[str, ...]
    more_for_k: tuple[str, ...] = ()
    sampling_steps: int = 0

    def along(self, axis: str) -> Iterator[tuple[str, int, Point]]:
        """(tricks, value, point) of one axis."""
        for names in (*self.tricks, *(self.more_for_k if axis == "k" else ())):
            for value in self.values[axis]:
                yield names, value, replace(self.base, **{axis: value})

    def cases(self) -> dict[str, tuple[str, Point]]:
        """Every tricks and point once, by name."""
        return {case(names, point): (names, point) for axis in self.values for names, _, point in self.along(axis)}

    @property
    def reference(self) -> str:
        """The case to which all others are compared."""
        return case(self.tricks[0], self.base)


GRIDS = {
    "embedded": Grid(
        Point(8, 64), {"frames": (4, 8, 16), "side": (32, 64, 96), "k": (1, 2, 4, 8), "batch": (1, 2, 4)},
        ("no tricks", "checkpointing"), ("stepwise", "checkpointing + stepwise"), 10,
    ),
    "full size": Grid(
        Point(16, 384), {"frames": (8, 16, 24), "side": (256, 384, 512), "k": (1, 2, 4), "batch": (1, 2, 4)},
        (PRESET,),
    ),
}  # fmt: skip


def case(names: str, point: Point) -> str:
    """How a row is named."""
    return f"{point}, {names}"
