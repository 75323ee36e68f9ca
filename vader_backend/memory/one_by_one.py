"""Samples pass the denoiser one after another instead of as one batch: both branches of guidance, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor

from ..models.base import VideoModel
from ..wrapping import Depth, wrapped

Predict = Callable[[Tensor, float, dict[str, Tensor]], Tensor]


@contextmanager
def one_by_one(model: VideoModel) -> Iterator[None]:
    """Each forward sees one video; about half the activations of a guided step, for a little time."""
    with wrapped(model, "predict", Depth.DIVIDE, _divided):
        yield


def _divided(predict: Predict) -> Predict:
    @wraps(predict)
    def wrapper(z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        parts = [
            predict(z[i : i + 1], t, {name: tensor[i : i + 1] for name, tensor in cond.items()}) for i in range(len(z))
        ]
        return torch.cat(parts)

    return wrapper
