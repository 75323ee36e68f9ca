"""A decoder's attention sees the whole picture: its outputs for the whole, kept and lent to the decode of a tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from torch import Tensor, nn

from ..wrapping import Depth, wrapped

Call = tuple[nn.Module, int]  # an attention, and which of its calls in a decode it is


@dataclass
class Pass:
    """A decode under way.

    lent: outputs for a tile; None: this is the whole picture's decode, and they are kept in `mixed`.
    """

    lent: Mapping[Call, Tensor] | None = None
    mixed: dict[Call, Tensor] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)


_PASS: ContextVar[Pass | None] = ContextVar("_PASS", default=None)


@contextmanager
def passing(now: Pass) -> Iterator[None]:
    """Decodes inside are part of this pass."""
    token = _PASS.set(now)
    try:
        yield
    finally:
        _PASS.reset(token)


@contextmanager
def watched(vae: nn.Module) -> Iterator[bool]:
    """For the duration, the decoder's attention heeds the pass that it is in; gives whether there is one."""
    found = [module for module in vae.modules() if isinstance(module, WanAttentionBlock)]
    with ExitStack() as stack:
        for module in found:
            stack.enter_context(wrapped(module, "forward", Depth.DIVIDE, partial(_heeding, module)))
        yield bool(found)


def _heeding(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        now = _PASS.get()
        if now is None:
            return forward(*args, **kwargs)
        call = module, now.calls.get(module, 0)
        now.calls[module] = call[1] + 1
        if now.lent is not None:
            return now.lent[call]
        now.mixed[call] = forward(*args, **kwargs)
        return now.mixed[call].detach()  # the graph of the whole picture ends here

    return wrapper
