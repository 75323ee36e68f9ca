"""Keep what the backward pass will need in main memory meanwhile, copied beside the computation.

Source: torch.autograd.graph.save_on_cpu, whose copies hold up the computation; here they run on a stream of their
own, through pinned memory, and the backward pass fetches one tensor ahead. Small tensors and weights stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**20  # bytes


@contextmanager
def graph_offload(
    networks: Iterable[nn.Module], host: torch.device | str = "cpu", *, smallest: int | None = None
) -> Iterator[None]:
    """For the duration, tensors that autograd saves outside of `host` are kept on `host`.

    Inside gradient checkpointing these are the blocks' inputs; what a block recomputes stays where it is.

    Args:
        networks: those whose weights stay where they are.
        smallest: bytes below which a tensor stays; None: SMALLEST.
    """
    shelf = _Shelf(torch.device(host), SMALLEST if smallest is None else smallest)
    with ExitStack() as stack:
        for module in (module for network in networks for module in network.modules()):
            if any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(shelf.leave).remove)
        stack.callback(shelf.settle)
        stack.enter_context(saved_tensors_hooks(shelf.put, shelf.take))
        yield


class _Stored:
    """A storage's content on the host, and on its way back where it was asked for ahead."""

    def __init__(self, copy: Tensor, source: Tensor, before: weakref.ref[_Stored] | None) -> None:
        self.copy = copy
        self.device = source.device
        self.source = weakref.ref(source.untyped_storage())
        self.before = before
        self.fetched: Tensor | None = None


class _View(NamedTuple):
    """A tensor as a part of a storage; kernels find the strides that they would have found."""

    stored: _Stored
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Shelf:
    """Copies tensors to the host and back.

    moving: those that a copy under way reads or writes. They belong to the computing stream, and may go once it has
    waited; were they left to the copying stream instead, their memory would be of no use before the computation, which
    the program runs far ahead of, has come so far.
    """

    def __init__(self, host: torch.device, smallest: int) -> None:
        self.host = host
        self.smallest = smallest
        self.weights: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.known: weakref.WeakValueDictionary[tuple[int, torch.dtype], _Stored] = weakref.WeakValueDictionary()
        self.newest: weakref.ref[_Stored] | None = None
        self.stream: torch.cuda.Stream | None = None
        self.moving: list[Tensor] = []

    def leave(self, module: nn.Module, inputs: object) -> None:
        """Before a module runs: its weights, wherever they were fetched to, are not to be put here."""
        if torch.is_grad_enabled():
            for weight in module.parameters():
                storage = weight.untyped_storage()
                self.weights[storage._cdata] = storage

    def put(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device == self.host or storage.nbytes() < self.smallest or key in self.weights:
            return tensor
        stored = self.known.get((key, tensor.dtype))
        if stored is None or stored.source() is not storage:
            stored = self._store(tensor)
            self.known[key, tensor.dtype] = stored
        return _View(stored, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _store(self, tensor: Tensor) -> _Stored:
        whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        self.settle(tensor.device)
        with self._beside(tensor.device):
            copy = torch.empty_like(whole, device=self.host, pin_memory=tensor.is_cuda and self.host.type == "cpu")
            copy.copy_(whole, non_blocking=True)
        if self.stream is not None:
            self.moving = [whole]
        stored = _Stored(copy, tensor, self.newest)
        self.newest = weakref.ref(stored)
        return stored

    def take(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        stored, size, stride, offset = kept
        whole = self._fetch(stored)
        self.settle(stored.device)
        before = stored.before() if stored.before is not None else None
        if self.stream is not None and before is not None:  # autograd asks for the newest first
            before.fetched = self._fetch(before)
            self.moving = [before.fetched]
        stored.fetched = None
        return whole.as_strided(size, stride, offset)

    def settle(self, device: torch.device | None = None) -> None:
        """The computation waits for the copies under way."""
        if self.stream is not None:
            torch.cuda.current_stream(device or self.stream.device).wait_stream(self.stream)
        self.moving.clear()

    def _fetch(self, stored: _Stored) -> Tensor:
        if stored.fetched is not None:
            return stored.fetched
        whole = torch.empty_like(stored.copy, device=stored.device)
        with self._beside(stored.device):
            return whole.copy_(stored.copy, non_blocking=True)

    def _beside(self, device: torch.device) -> Any:
        """A stream that copies while the computation goes on, once what is there has been computed."""
        if device.type != "cuda":
            return nullcontext()
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.stream)
