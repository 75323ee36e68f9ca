"""Key layouts of LoRA files: ours, diffusers', peft's, ComfyUI's and kohya's are read; the first and ComfyUI's written.

Sources: the loaders of diffusers, peft, kohya-ss/sd-scripts and ComfyUI (comfy/lora.py, comfy/lora_convert.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .config import InputError, suggest
from .models.base import VideoModel

Layout = Literal["comfyui", "diffusers"]

_ENTRY = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))"
    r"(?:\.default)?\.weight|(?P<scaled>.+)\.alpha"
)
_PREFIXES = (
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
)
_TEXT_ENCODER = ("lora_te", "text_encoder", "te1.", "te2.")
_CONFIGURATIONS = ("lora_adapter_metadata", "lora_config")  # metadata of diffusers and of finetrainers
_PUBLISHED = "base_model.model.model.diffusion_model."  # the VADER LoRAs, whose alpha was peft's own
_PUBLISHED_ALPHA = 8.0


def file_key(model: VideoModel, name: str, layout: Layout) -> str:
    """The key in a file for `<module>.lora_A.weight` or `.lora_B.weight`.

    Args:
        layout: "comfyui", which families that core ComfyUI does not have write as "diffusers".
    """
    if layout not in get_args(Layout):
        raise InputError(f"layout is {layout!r}; {suggest(layout, get_args(Layout))}")
    rename = model.lora_names.comfy
    if layout == "diffusers" or rename is None:
        return model.lora_prefix + name
    module, _, side = name.rpartition(".lora_")
    return f"diffusion_model.{rename(module)}.lora_{side}"


def holds_lora(keys: Iterable[str]) -> bool:
    """Whether any key of a file is a LoRA's."""
    return any((found := _ENTRY.fullmatch(key)) is not None and found["module"] for key in keys)


def with_alphas(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """A file's tensors, with `<module>.alpha` for every module where only the metadata tell alpha, or nothing does.

    diffusers and finetrainers write peft's configuration into the metadata. The published VADER LoRAs tell nothing.
    """
    config = _configuration(metadata)
    if not config and all(key.startswith(_PUBLISHED) for key in tensors):
        config = {"lora_alpha": _PUBLISHED_ALPHA}
    if "lora_alpha" not in config or any(key.endswith(".alpha") for key in tensors):
        return dict(tensors)
    patterns, alphas = config.get("alpha_pattern") or {}, {}
    for key, tensor in tensors.items():
        found = _ENTRY.fullmatch(key)
        if found is not None and found["down"]:
            own = (value for name, value in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", found["module"]))
            alpha = next(own, config["lora_alpha"])
            root = len(tensor) ** 0.5 if config.get("use_rslora") else 1.0
            alphas[f"{found['module']}.alpha"] = torch.tensor(float(alpha) * root)
    return {**tensors, **alphas}


def _configuration(metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration in a file's metadata, without the name of the network before each setting; else empty."""
    for name in _CONFIGURATIONS:
        try:
            found = json.loads(metadata.get(name, "null"))
        except ValueError:
            continue
        if isinstance(found, dict):
            return {k.rpartition(".")[2]: v for k, v in found.items() if not k.startswith(_TEXT_ENCODER)}
    return {}


def by_module(model: VideoModel, tensors: Mapping[str, Tensor], made_for: str) -> dict[str, Tensor]:
    """The content of a LoRA file under the denoiser's own module names, with alpha / rank multiplied into B.

    Args:
        made_for: the base model that the file names, for the message.

    Returns:
        `<module>.lora_A.weight` [rank, in, ...] and `<module>.lora_B.weight` [out, rank, ...].

    Raises:
        InputError: a key is no LoRA's, belongs to no module of the denoiser, or has the wrong shape.
    """
    shapes = {name: shape for name, module in model.denoiser.named_modules() if (shape := _shape(module))}
    names = _names(model, shapes)
    result: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        name, side = _entry(key)
        module = _module(model, name, names)
        if module is not None and side == "alpha" and tensor.numel() == 1:
            alphas[module] = float(tensor)
        elif module is not None and side != "alpha" and _fits(shapes[module], side, tensor):
            result[f"{module}.lora_{side}.weight"] = tensor
        else:
            raise InputError(
                f"This LoRA does not fit {model.name}: it has {key} of shape {list(tensor.shape)}. It was made for "
                f"{made_for}; load that model, or choose another LoRA."
            )
    return _scaled(result, alphas)


def _entry(key: str) -> tuple[str, str]:
    """A key's module name, as the file has it, and "A", "B" or "alpha"."""
    if key.startswith(_TEXT_ENCODER):
        raise InputError(f"This LoRA also changes a text encoder ({key}), which is not supported; choose another LoRA.")
    found = _ENTRY.fullmatch(key)
    if found is None:
        raise InputError(
            f"{key} is not part of a plain LoRA (LoHa, LoKr, DoRA and the like are not read); choose another."
        )
    if found["scaled"]:
        return found["scaled"], "alpha"
    return found["module"], "A" if found["down"] else "B"


def _names(model: VideoModel, modules: Iterable[str]) -> dict[str, str]:
    """Module by every name that a file may have for it: ours, ComfyUI's, and both with underscores for dots."""
    rename = model.lora_names.comfy
    names = {name: name for name in modules}
    others = {rename(name): name for name in names} if rename is not None else {}
    names = {**others, **names}
    return {**{name.replace(".", "_"): module for name, module in names.items()}, **names}


def _module(model: VideoModel, name: str, names: Mapping[str, str]) -> str | None:
    original = model.lora_names.original
    while name not in names:
        if original is not None and (found := original(name)) in names:
            return names[found]
        prefix = next((p for p in (*_PREFIXES, model.lora_prefix) if p and name.startswith(p)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return names[name]


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """[out, in, ...] of a linear layer or convolution, also while its weight is held in few bits; else empty."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return ()


def _fits(base: tuple[int, ...], side: str, tensor: Tensor) -> bool:
    """Whether a half belongs to a layer of that shape: the first has its kernel, the second is of width 1."""
    if tensor.ndim != len(base) or not tensor.numel():
        return False
    if side == "A":
        return tensor.shape[1:] == base[1:]
    return len(tensor) == base[0] and set(tensor.shape[2:]) <= {1}


@torch.no_grad()
def _scaled(tensors: dict[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Both halves of every module there, of one rank, with alpha / rank in the second."""
    for module in {key.rpartition(".lora_")[0] for key in tensors} | set(alphas):
        down, up = tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")
        if down is None or up is None or len(down) != up.shape[1]:
            raise InputError(
                f"This LoRA is not whole: the two halves for {module} do not belong together; get it again."
            )
        if module in alphas:
            tensors[f"{module}.lora_B.weight"] = up.float() * (alphas[module] / len(down))
    return tensors
