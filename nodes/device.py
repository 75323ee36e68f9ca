"""Where nodes compute: outside ComfyUI's inference mode, and with its models out of the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import host


class DeviceFull(torch.cuda.OutOfMemoryError):  # type: ignore[misc]  # torch types it as Any
    """Still torch's error, by which ComfyUI knows that it should unload its models, but says what to try."""


@contextmanager
def training_mode() -> Iterator[None]:
    """Leave ComfyUI's inference mode: what is built or cloned inside may take part in a backward pass.

    Raises:
        DeviceFull: the device's memory does not suffice for what is done inside.
    """
    try:
        with torch.inference_mode(False):
            yield
    except DeviceFull:
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceFull(
            "The memory of the device does not suffice. Connect a Memory node with the preset of a smaller card, or "
            f"lower batch_size, frames or the size; Estimate Memory tells beforehand what fits. ({error})"
        ) from error


@contextmanager
def workspace(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Outside inference mode, with these networks on the device; they lie on the CPU again at the end."""
    program, networks = host.current(), list(networks)
    with training_mode():
        program.make_room()
        try:
            for network in networks:
                network.to(program.device())
            yield
        finally:
            for network in networks:
                network.to("cpu")
            program.release()
            _release_pinned()


def _release_pinned() -> None:
    """Main memory that torch keeps for copies to and from the device, where this torch can give it back."""
    release = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    if release is not None and torch.cuda.is_available():
        release()
