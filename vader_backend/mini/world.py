"""Short videos of one coloured shape that moves over a plain background, and their captions.

Everything is drawn anew from a seeded generator; there is no data set. Two properties are never
named in a caption, so that a text-to-video model leaves them to chance and a reward can choose
them: how vivid the shape's colour is, and how much haze lies over the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

SIZE = 64
FRAMES = 8

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "cyan": (0.10, 0.85, 0.90),
    "magenta": (0.90, 0.15, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS: dict[str, tuple[float, float]] = {  # (x, y) of one step; y grows downwards
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
BACKGROUNDS: dict[str, float] = {"black": 0.06, "gray": 0.50, "white": 0.94}


@dataclass(frozen=True)
class Scene:
    """What a caption says of a video."""

    color: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} moving {self.motion} on a {self.background} background"

    @property
    def seen(self) -> bool:
        """False for the 16 of 96 colour-shape-motion combinations that no network is trained on."""
        code = list(COLORS).index(self.color) + 2 * SHAPES.index(self.shape)
        return (code + 3 * list(MOTIONS).index(self.motion)) % 6 != 0


ALL_SCENES: tuple[Scene, ...] = tuple(Scene(*words) for words in product(COLORS, SHAPES, MOTIONS, BACKGROUNDS))
SEEN_SCENES: tuple[Scene, ...] = tuple(s for s in ALL_SCENES if s.seen)
UNSEEN_SCENES: tuple[Scene, ...] = tuple(s for s in ALL_SCENES if not s.seen)
_BY_CAPTION = {scene.caption: scene for scene in ALL_SCENES}


def parse_caption(caption: str) -> Scene:
    """The scene that a caption of this world describes.

    Raises:
        ValueError: the text is not a caption of this world.
    """
    try:
        return _BY_CAPTION[caption.strip()]
    except KeyError:
        raise ValueError(
            f"{caption!r} is not a caption of the mini world; they read like {ALL_SCENES[0].caption!r}."
        ) from None


@dataclass(frozen=True)
class Look:
    """The properties of B videos that captions leave open; every field is a tensor [B] or [B, 2].

    vivid and haze are in [0, 1]; radius, start (centre of the path) and speed are in pixels.
    """

    vivid: Tensor
    haze: Tensor
    radius: Tensor
    start: Tensor
    speed: Tensor

    @property
    def quality(self) -> Tensor:
        """What the aesthetic head learns: 1 (pale, hazy) to 10 (vivid, clear), shape [B]."""
        return 1 + 9 * (0.6 * self.vivid + 0.4 * (1 - self.haze))


def random_look(batch: int, generator: torch.Generator, *, uniform: bool = False) -> Look:
    """Draw looks. By default pale and hazy ones are common, as in a web-scale data set."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    vivid, haze = draw(batch), draw(batch)
    if not uniform:
        vivid, haze = vivid**2, haze**0.6
    return Look(
        vivid=vivid,
        haze=haze,
        radius=8.5 + 3.5 * draw(batch),
        start=SIZE / 2 + 14 * (draw(batch, 2) - 0.5),
        speed=2.6 + 1.0 * draw(batch),
    )


def large_look(batch: int, rng: torch.Generator) -> Look:
    """Larger shapes nearer to the middle than in other pictures of the world: so little data teaches no more."""
    look = random_look(batch, rng)
    return replace(look, radius=look.radius + 2, start=SIZE / 2 + 4 / 7 * (look.start - SIZE / 2))


def shape_mask(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Antialiased coverage in [0, 1] of a shape at offsets (x, y) from its centre, in pixels."""
    if shape == "circle":
        distance = (x.square() + y.square()).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    elif shape == "triangle":
        sides = (1.85 * x.abs() - 1.05 * (y + 1.1 * radius)) / 2.127
        distance = torch.maximum(sides, y - 0.75 * radius)
    else:
        bar, arm = 0.36 * radius, 1.08 * radius
        tall = torch.maximum(x.abs() - bar, y.abs() - arm)
        wide = torch.maximum(x.abs() - arm, y.abs() - bar)
        distance = torch.minimum(tall, wide)
    return (0.5 - distance).clamp(0, 1)


def paint(canvas_BCHW: Tensor, scene: Scene, row: int, center: Tensor, look: Look) -> None:
    """Draw the shape of one scene onto every picture of one video, in place.

    Args:
        canvas_BCHW: the T pictures of the video, [T, 3, H, W].
        row: which entry of `look` holds.
        center: the shape's centre in each picture, [T, 2] pixels.
    """
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    x = grid[None, None, :] - center[:, 0, None, None]
    y = grid[None, :, None] - center[:, 1, None, None]
    cover = shape_mask(scene.shape, x, y, look.radius[row])[:, None]
    pure = torch.tensor(COLORS[scene.color])[None, :, None, None]
    shade = 0.5 + (0.45 + 0.55 * look.vivid[row]) * (pure - 0.5)
    canvas_BCHW.copy_(canvas_BCHW * (1 - cover) + shade * cover)


def render(scenes: Sequence[Scene], look: Look, frames: int = FRAMES) -> Tensor:
    """Draw one video per scene.

    Returns:
        float32 [B, frames, 3, 64, 64] in [0, 1].
    """
    video = torch.empty(len(scenes), frames, 3, SIZE, SIZE)
    # The path is as long for 17 frames as for 8, so that shapes stay in the picture.
    times = torch.linspace(-0.5, 0.5, frames) * (FRAMES - 1)
    for row, scene in enumerate(scenes):
        video[row] = BACKGROUNDS[scene.background]
        step = torch.tensor(MOTIONS[scene.motion]) * look.speed[row]
        paint(video[row], scene, row, look.start[row] + times[:, None] * step, look)
    haze = 0.3 * look.haze[:, None, None, None, None]
    return video + haze * (0.5 - video)


def random_scenes(batch: int, generator: torch.Generator, pool: Sequence[Scene] = SEEN_SCENES) -> list[Scene]:
    """Draw scenes from a pool, with replacement."""
    return [pool[i] for i in torch.randint(len(pool), (batch,), generator=generator).tolist()]
