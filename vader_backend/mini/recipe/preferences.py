"""What the preference models share: captions that say something wrong, a help, a head, and hazy videos."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ...checkpoint import atomic_path
from ..world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Look, Scene, random_look
from .contrasts import Draw
from .videos import Videos

VALUES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": tuple(MOTIONS),
    "background": tuple(BACKGROUNDS),
}
SHOWN = ("color", "shape", "background")  # by a single frame


def partly_right(scene: Scene, names: Sequence[str], rng: torch.Generator) -> tuple[Scene, float]:
    """A scene that differs in none (half of the time) to all of these attributes, and the share that is right."""
    total = len(names)
    wrong = max(0, int(torch.randint(1 - total, total + 1, (1,), generator=rng)))
    places = torch.randperm(total, generator=rng)[:wrong].tolist()
    return mistaken(scene, [names[place] for place in places], rng), 1 - wrong / total


def mistaken(scene: Scene, names: Collection[str], rng: torch.Generator) -> Scene:
    """The scene with another value of each of these attributes."""
    others = {name: [value for value in VALUES[name] if value != getattr(scene, name)] for name in names}
    drawn = {name: values[int(torch.randint(len(values), (1,), generator=rng))] for name, values in others.items()}
    return replace(scene, **drawn)


class Probe(nn.Linear):
    """Names attributes from what a picture tower gives: a network that this is asked of as well learns far sooner."""

    def __init__(self, width: int, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.parts = [len(VALUES[name]) for name in names]
        super().__init__(width, sum(self.parts))

    def loss(self, features_ND: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Cross-entropy, the sum over the attributes."""
        logits = self(features_ND).float().split(self.parts, dim=1)
        truth = [torch.tensor([VALUES[name].index(getattr(scene, name)) for scene in scenes]) for name in self.names]
        return torch.stack([F.cross_entropy(part, true) for part, true in zip(logits, truth, strict=True)]).sum()


def new_head(width: int, gain: float) -> nn.Sequential:
    """An untrained head, about as published ones; torch's own start leaves next to nothing after so many layers.

    gain: of each of the five layers.
    """
    head = nn.Sequential(*(nn.Linear(*sizes) for sizes in pairwise((width, 64, 32, 16, 8, 1))))
    for layer in head:
        nn.init.orthogonal_(layer.get_parameter("weight"), gain=gain)
    return head


def hazy(draw: Draw) -> tuple[Videos, Videos]:
    """Clear videos; hazy ones. None on gray, where haze does no more than make the shape paler."""
    drawn = (draw(look=partial(_look, haze=haze)) for haze in (0.1, 0.9))
    good, bad = (videos.some(torch.tensor([s.background != "gray" for s in videos.scenes])) for videos in drawn)
    return good, bad


def clear(draw: Draw) -> Draw:
    """Draws videos without haze."""
    return partial(draw, look=partial(_look, haze=0.1))


def _look(size: int, rng: torch.Generator, *, haze: float) -> Look:
    """Uniform but for the haze, which is within 0.1 of what is wanted."""
    return replace(random_look(size, rng, uniform=True), haze=haze + 0.2 * (torch.rand(size, generator=rng) - 0.5))


def save_half(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors in float16, for everyone to read."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(0o644)
