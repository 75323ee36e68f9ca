"""Start a network from the weights of a narrower one.

Source: Net2WiderNet (Chen et al. 2016), but with fresh channels beside the old ones instead of copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def in_front(name: str, count: int) -> Tensor:
    """The old inputs are the first of the new ones."""
    return torch.arange(count)


def widen(module: nn.Module, known: Mapping[str, Tensor], places: Callable[[str, int], Tensor] = in_front) -> None:
    """Put known weights into the first rows of the module's; those that are not known or too large stay as they are.

    The first rows read what they read before, and nothing else; further rows are fresh channels.

    Args:
        places: from a weight's name and its old number of inputs, where these lie among the new ones.
    """
    fresh = module.state_dict()
    module.load_state_dict(
        {
            name: _widened(new, known[name], name, places) if name in known and _fits(known[name], new) else new
            for name, new in fresh.items()
        }
    )


def _fits(old: Tensor, new: Tensor) -> bool:
    return all(size <= space for size, space in zip(old.shape, new.shape, strict=True))


def _widened(new: Tensor, old: Tensor, name: str, places: Callable[[str, int], Tensor]) -> Tensor:
    result = new.clone()
    inputs = places(name, old.shape[min(1, old.ndim - 1)])
    if old.ndim == 1:
        result[inputs] = old
    else:
        result[: len(old)] = 0
        result[: len(old), inputs] = old
    return result
