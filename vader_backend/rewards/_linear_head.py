"""The heads of aesthetic and preference models: linear layers one after another, without activations between them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import InputError
from ..loading import build_empty, build_frozen, reading

_PUBLISHED = (1024, 128, 64, 16, 1)  # what its layers give, whatever the features' width


def empty_head(width: int) -> nn.Sequential:
    """The published head on features of this width, without weights."""
    return build_empty(lambda: _layers((width, *_PUBLISHED)), torch.float32)


def build_head(tensors: Mapping[str, Tensor], width: int, what: str, source: Path) -> nn.Sequential:
    """The layers that a file holds as `<place>.weight` and `<place>.bias`; places between them were dropout's.

    Args:
        tensors: by those names.
        width: of the features that the head will get.

    Returns:
        A frozen network from [N, width] to [N, 1], in float32.

    Raises:
        InputError: the file holds other tensors, or layers that do not fit together or the features.
    """
    with reading(what, source):
        places = sorted({int(name.partition(".")[0]) for name in tensors})
        weights = [tensors[f"{place}.weight"] for place in places]
        widths = [weights[0].shape[1], *map(len, weights)]
    if widths[0] != width or widths[-1] != 1:
        raise InputError(
            f"The {what} in {source} turns features {widths[0]} wide into {widths[-1]} numbers, but the network gives "
            f"features {width} wide and one score is wanted; choose the two that belong together."
        )
    own = {re.sub(r"^\d+", lambda place: str(places.index(int(place[0]))), name): tensors[name] for name in tensors}
    return build_frozen(lambda: _layers(widths), own, torch.float32, what, source)


def _layers(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*sizes) for sizes in pairwise(widths)))
