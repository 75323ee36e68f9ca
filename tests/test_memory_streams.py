"""Copies beside the computation: who waits for whom, and whose memory they take, without an accelerator."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vader_nodes.vader_backend.memory.block_swap import _Fetcher, block_swap
from vader_nodes.vader_backend.memory.gradient_checkpointing import gradient_checkpointing
from vader_nodes.vader_backend.memory.graph_offload import _Shelf, graph_offload

DEVICE = torch.device("cpu")
HOST = torch.device("cpu:0")  # the same memory under another name, so that copies to it are made


class Queue:
    """A stream of an accelerator that is not there; it notes how much of the others it has waited for."""

    def __init__(self, device: torch.device = DEVICE) -> None:
        self.device, self.issued, self.seen = device, 0, dict[Queue, int]()

    def wait_stream(self, other: Queue) -> None:
        self.seen[other] = other.issued


class Streams(TorchDispatchMode):
    """A computing and a copying stream; every operation goes to the current one, as on CUDA.

    early: what runs before something of the other stream that it must wait for, or frees memory that the other stream
    still works on. foreign: what takes device memory of the copying stream, which others cannot use again in time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.computing = self.current = Queue()
        self.written, self.used = dict[int, tuple[Queue, int]](), dict[int, dict[Queue, int]]()
        self.copied, self.early, self.foreign = 0, list[str](), list[str]()
        self.host: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

        def start(fetcher: Any, *args: Any) -> None:
            plain(fetcher, *args)
            fetcher.stream = Queue()

        def beside(shelf: Any, device: torch.device) -> Any:
            shelf.stream = shelf.stream or Queue()
            shelf.stream.wait_stream(self.current)
            return self.on(shelf.stream)

        plain = _Fetcher.__init__
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(_Fetcher, "__init__", start)
        monkeypatch.setattr(_Shelf, "_beside", beside)

    @contextmanager
    def on(self, queue: Queue) -> Iterator[None]:
        before, self.current = self.current, queue
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.current.issued += 1
        self.copied += self.current is not self.computing and func is torch.ops.aten.copy_.default
        inputs, outputs = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), result))
        if (kwargs or {}).get("device") == HOST:  # main memory has an allocator that looks after itself
            self.host.add(result.untyped_storage())
        for tensor in (*inputs, *outputs):
            if tensor.untyped_storage() not in self.host:
                self._use(tensor.untyped_storage(), str(func), any(tensor is output for output in outputs))
        return result

    def _use(self, storage: torch.UntypedStorage, what: str, write: bool) -> None:
        key, now = storage._cdata, self.current
        if key not in self.used:
            self.foreign += [what] if now is not self.computing else []
            self.written[key], self.used[key] = (now, now.issued), {}
            weakref.finalize(storage, self._gone, key, what)
        others = self.used[key] if write else dict([self.written[key]])
        self.early += [what for other, count in others.items() if self._ahead(now, other, count)]
        self.used[key][now] = now.issued
        if write:
            self.written[key] = now, now.issued

    def _gone(self, key: int, what: str) -> None:
        del self.written[key]
        uses = self.used.pop(key).items()
        self.early += [f"freed: {what}" for other, count in uses if self._ahead(self.computing, other, count)]

    @staticmethod
    def _ahead(stream: Queue, other: Queue, count: int) -> bool:
        return stream is not other and stream.seen.get(other, 0) < count


def test_copies_beside_the_computation_wait_and_take_memory_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    model: Any = SimpleNamespace(blocks=list(network), decoder_blocks=[])
    wanted = torch.autograd.grad(network(x).square().sum(), x)[0]
    streams = Streams(monkeypatch)
    with streams, block_swap(model, DEVICE, HOST), graph_offload([network], HOST, smallest=0):
        left = x.exp()  # fetched in vain, for it is the next in line
        with gradient_checkpointing(model):
            found = torch.autograd.grad(network(x).square().sum(), x)[0]
        del left
        network[2](network[0](x))  # weights that were fetched in vain, and a graph that is left
    assert torch.equal(found, wanted)
    assert streams.copied > 20
    assert not streams.early
    assert not streams.foreign
