"""Single files as ComfyUI users keep them: their headers, their prefixes, and their scaled 8-bit weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import InputError
from ..loading import build_frozen, read_tensors
from ..precision import give_back, kept_in_float32

Shapes = Mapping[str, tuple[int, ...]]
_DENOISER = ("model.diffusion_model.", "diffusion_model.")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale", "scale_weight")
_QUANTISATION = (*_SCALES, "scaled_fp8", "comfy_quant", "scale_input", "input_scale", "weight_scale_2")


@dataclass(frozen=True)
class Part:
    """A network or tokenizer that a checkpoint needs, and that lies elsewhere.

    field: of the family's Config. what: how its users know it. fits: whether a path holds it, judged without loading.
    """

    field: str
    what: str
    fits: Callable[[Path], bool]


def shapes(path: Path) -> Shapes:
    """Shape of every tensor of a .safetensors file, read from its header alone; empty for anything else.

    A header is opened for NumPy: PyTorch would ask for as much memory as the file is large.
    """
    try:
        state = path.stat()
    except OSError:
        return {}
    return _shapes(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _shapes(path: Path, _mtime: int, _size: int) -> Shapes:
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def file_config(path: Path, part: str) -> dict[str, Any]:
    """What a file's metadata says under "config" about one of its networks; empty where it says nothing."""
    try:
        with safe_open(path, "np") as file:
            return dict(json.loads((file.metadata() or {}).get("config", "{}")).get(part, {}))
    except (OSError, SafetensorError, ValueError, AttributeError, TypeError):
        return {}


def without_prefix(entries: Mapping[str, Any], prefixes: Iterable[str] = _DENOISER) -> dict[str, Any]:
    """The entries under the first prefix that any key has, without it; all of them where none has one."""
    for prefix in prefixes:
        found = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
        if found:
            return found
    return dict(entries)


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix such as "blocks."."""
    return len({key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)})


def read_weights(path: Path, dtype: torch.dtype, what: str) -> dict[str, Tensor]:
    """The tensors of a single file, with scaled 8-bit weights multiplied by their scales.

    Raises:
        InputError: as `loading.read_tensors`, or the file is quantised in a way that is not read.
    """
    tensors = read_tensors(path, what)
    marked = any(key.rpartition(".")[2] in ("scaled_fp8", "comfy_quant") for key in tensors)
    result = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if kind in _QUANTISATION:
            continue
        scale = next((tensors[f"{layer}.{name}"] for name in _SCALES if f"{layer}.{name}" in tensors), None)
        result[key] = tensor
        if kind == "weight" and (scale is not None or not tensor.is_floating_point() or (marked and _is_8_bit(tensor))):
            result[key] = _unscaled(tensor, scale, f"{layer}.weight_scale_2" in tensors, dtype, what, path)
    return result


def _is_8_bit(tensor: Tensor) -> bool:
    return tensor.dtype in _FLOAT8


def _unscaled(tensor: Tensor, scale: Tensor | None, twice: bool, dtype: torch.dtype, what: str, path: Path) -> Tensor:
    if scale is None or twice or not _is_8_bit(tensor) or scale.numel() not in (1, len(tensor)):
        raise InputError(
            f"The {what} in {path} is quantised in a way that cannot be read (only fp8 with a scale per weight or "
            "per row can); use its fp16 or bf16 version."
        )
    result = (tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))).to(dtype)
    give_back(tensor)
    return result


def build_from(
    cls: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str, source: Path
) -> Any:
    """A frozen network of a diffusers or transformers class; the layers that the class keeps in float32 stay so.

    Args:
        config: keyword arguments of a diffusers class, or a transformers configuration.

    Raises:
        InputError: as `loading.build_frozen`.
    """

    def make() -> nn.Module:
        return cls(**config) if isinstance(config, dict) else cls(config)

    return build_frozen(make, tensors, dtype, what, source, kept=kept_in_float32(cls, dtype))
