"""Counts the bytes of live tensors on devices, real or fake, while code runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Count:
    """Bytes now, and at most so far."""

    live: int = 0
    peak: int = 0


class MemoryTracker(TorchDispatchMode):
    """While active, every storage that an operation makes on one of `devices` counts until it is freed.

    counts: by the type of the device. phases: the peak on the first device while each phase lasted (see `phase`).
    Memory that kernels and allocators take for themselves is not seen.
    """

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.counts = {device: Count() for device in devices}
        self.main = self.counts[devices[0]]
        self.phases: dict[str, int] = {}
        self._phase, self._whole = "", False
        self._known: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    @contextmanager
    def swapped(self, out: Sequence[Tensor], into: Sequence[Tensor]) -> Iterator[None]:
        """Within, tensors of the first device that are counted do not count, and others, which were not, do."""
        away = sum(size for key, size in _storages(out).items() if key in self._known)
        self.main.live -= away
        self.add(into)
        yield
        self.main.live += away
        for key, size in _storages(into).items():
            if self._known.pop(key, None) is not None:
                self.main.live -= size

    @contextmanager
    def phase(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """Within, the peak is kept under this name, too; afterwards the phase before goes on.

        Args:
            whole: phases inside this one do not count as their own.
        """
        before = self._phase, self._whole
        if not self._whole:
            self._phase, self._whole = name, whole
        self._note()
        try:
            yield
        finally:
            self._phase, self._whole = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result)
        elif result is not None:
            self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _see(self, tensor: Tensor) -> None:
        count = self.counts.get(tensor.device.type)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if count is None or key in self._known:
            return
        size = storage.nbytes()

        def free(gone: object) -> None:
            del self._known[key]
            count.live -= size

        self._known[key] = weakref.ref(storage, free)
        count.live += size
        count.peak = max(count.peak, count.live)
        self._note()

    def _note(self) -> None:
        if self._phase:
            self.phases[self._phase] = max(self.phases.get(self._phase, 0), self.main.live)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage, of which tensors may share one."""
    return {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


def tensors_of(networks: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Every weight and buffer."""
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()
