"""Counts the bytes of live tensors on a device, real or fake, while code runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """While active, every storage that an operation makes on `device` counts until it is freed.

    live, peak: bytes now, and at most so far. phases: the peak while each phase lasted (see `phase`).
    Memory that kernels and allocators take for themselves is not seen.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.live = 0
        self.peak = 0
        self.phases: dict[str, int] = {}
        self._phase = ""
        self._known: dict[int, Callable[[], None]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, the peak is kept under this name, too; afterwards the phase before goes on."""
        before, self._phase = self._phase, name
        self._note()
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.live += size
        self._known[key] = weakref.finalize(storage, self._free, key, size)  # type: ignore[assignment]
        self._note()

    def _free(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size

    def _note(self) -> None:
        self.peak = max(self.peak, self.live)
        if self._phase:
            self.phases[self._phase] = max(self.phases.get(self._phase, 0), self.live)


def tensors_of(networks: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Every weight and buffer."""
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()
