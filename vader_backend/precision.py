"""Frozen weights in another precision than their file's, without holding both.

Checkpoints are mapped from disk, so a weight takes memory once it is read. One that is converted is
read piece by piece, and the memory under each piece of the file is given back before the next is read.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

_PAGE_OUT = 21  # MADV_PAGEOUT of Linux 5.4 and later; it never loses what memory holds
_PIECE = 2**20  # numbers
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in `dtype`; any other tensor, and one that has it already, as it is."""
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    result = torch.empty_like(tensor, dtype=dtype)
    for stored, own in zip(_pieces(tensor), _pieces(result), strict=True):
        own.copy_(stored)
        give_back(stored)
    return result


def convert(module: nn.Module, dtype: torch.dtype, kept: Collection[str] = ()) -> None:
    """Convert a network's weights one by one; those under a name of `kept` become float32."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor.data = converted(tensor.data, chosen(name, dtype, kept))


def chosen(name: str, dtype: torch.dtype, kept: Collection[str]) -> torch.dtype:
    """The precision of one weight: float32 where a part of its name is in `kept`."""
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def kept_in_float32(cls: type, dtype: torch.dtype) -> tuple[str, ...]:
    """The layers that a diffusers or transformers class holds in float32 beside weights of `dtype`.

    transformers keeps them where the weights are float16 only.
    """
    is_transformers = cls.__module__.startswith("transformers.")
    if dtype == torch.float32 or (is_transformers and dtype == torch.bfloat16):
        return ()
    return tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())


def stored_dtype(files: Iterable[Path]) -> torch.dtype | None:
    """The one precision of all floating-point tensors in .safetensors files; None where they differ."""
    found = set()
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    stored = {name for name in found if not name.startswith(("I", "U", "BOOL"))}
    return _STORED.get(stored.pop()) if len(stored) == 1 else None


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of as many rows each as fit into so many numbers."""
    return tensor.split(max(1, _PIECE * len(tensor) // tensor.numel())) if tensor.numel() > _PIECE else (tensor,)


def give_back(tensor: Tensor) -> None:
    """Let go of the memory that holds a tensor mapped from a file; it is read again if it is used again.

    Has no effect where the system knows no such advice (any but Linux), and none on the values.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)
