"""Networks of tensors that have a shape, a type and a device, and no content.

On any machine the fake device "cpu" stands for the accelerator, and HOST, the fake device "meta", for main memory:
autograd refuses fake tensors on an accelerator that is not there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

T = TypeVar("T")
DEVICE, HOST = "cpu", "meta"


def fake_mode() -> FakeTensorMode:
    """A mode that is not entered: real tensors that the code makes beside the fake ones become fake where they meet."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.allow_meta = True
    return mode


def make_fake(network: nn.Module, mode: FakeTensorMode, device: str = HOST) -> None:
    """Every weight and buffer becomes a fake one of the same shape and type."""

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    _replace(network, fake)


def fake_copy(value: T, networks: Iterable[nn.Module], mode: FakeTensorMode) -> T:
    """A deep copy in which these networks have fake weights, so that nothing large is copied.

    Args:
        networks: of `value`, all of them.
    """
    memo: dict[int, Any] = {}
    with mode:
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST)
                is_weight = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake
    return copy.deepcopy(value, memo)


@contextmanager
def moving() -> Iterator[None]:
    """Lets `Module.to` move fake networks, which torch's own cannot."""
    plain = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = kwargs.get("device", args[0] if args else None)
        if kwargs.keys() - {"device"} or len(args) > 1 or not isinstance(device, str | torch.device):
            return plain(module, *args, **kwargs)
        _replace(module, lambda tensor: tensor.detach().to(device))
        return module

    with patch.object(nn.Module, "to", to):
        yield


def _replace(network: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put change(tensor) in the place of each weight and buffer; those that are shared stay shared."""
    done: dict[int, Tensor] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    new = change(tensor)
                    weight = isinstance(tensor, nn.Parameter)
                    done[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if weight else new
                table[name] = done[id(tensor)]  # type: ignore[assignment]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as an accelerator's fused kernels do it: it keeps inputs, output and one number per query."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, **others: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    with patch.object(F, "scaled_dot_product_attention", attention):
        yield


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
