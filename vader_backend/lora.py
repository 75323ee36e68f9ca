"""LoRA on the denoiser: attach, take out, save, load, apply.

A LoRA file holds `<prefix><module>.lora_A.weight` and `.lora_B.weight`, with alpha / rank already
multiplied into B. Readers that assume alpha = rank, or know no alpha, then all agree. How prefix
and module are spelled, and what else is read, stands in `lora_formats`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import atomic_path
from .config import InputError, option
from .loading import opened, read_tensors, reading
from .lora_formats import Layout, by_module, file_key, holds_lora, with_alphas
from .models.base import VideoModel

_ADAPTER = "vader"


@dataclass(frozen=True)
class LoraConfig:
    """Shape of a LoRA; 0, and a dropout of -1, stand for the model family's published value."""

    rank: int = option(0, "Rank of the LoRA; 0 takes the model's published value.", low=0, high=1024)
    alpha: float = option(
        0.0, "The update is scaled by alpha / rank; 0 takes the model's published ratio.", low=0.0, high=4096.0
    )
    dropout: float = option(
        -1.0,
        "Dropout on the LoRA's input, live only in differentiated steps; -1 takes the model's published value.",
        low=-1.0,
        high=0.9,
        step=0.01,
    )

    def resolve(self, model: VideoModel) -> LoraConfig:
        """The same with the model's own values filled in."""
        own = model.defaults
        rank = self.rank or own.rank
        dropout = own.dropout if self.dropout < 0 else self.dropout
        return LoraConfig(rank, self.alpha or own.lora_scale * rank, dropout)


class LoraWeights(dict[str, Tensor]):
    """The tensors of a LoRA file by key, as ComfyUI's LORA_MODEL, with the file's metadata beside them."""

    metadata: dict[str, str]

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


class GradientDropout(nn.Dropout):
    """Dropout that is live only where gradients are on: a rollout without gradient and a preview never see it."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(input, self.p, training=torch.is_grad_enabled())


class _InputPrecision(nn.Module):
    """A layer that computes in its input's precision, whatever that of its weight."""

    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        if isinstance(self, nn.Linear):
            return nn.functional.linear(input, weight)
        return self._conv_forward(input, weight, None)  # type: ignore[operator]


def _in_input_precision(layer: nn.Module) -> None:
    """For half a LoRA: its float32 weight is rounded for the product, instead of raising its input to float32."""
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (_InputPrecision, kind), {})


def save_lora(path: Path, weights: LoraWeights) -> None:
    """Write a .safetensors file with its metadata, atomically.

    Raises:
        InputError: the file cannot be written, for want of space or permission.
    """
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary, weights.metadata)


def load_lora(path: Path) -> LoraWeights:
    """Read a LoRA file; of a pickle, as the published VADER LoRAs are, nothing but tensors (weights_only=True).

    Raises:
        InputError: it is missing, truncated, of another kind than its name says, or holds no LoRA.
    """
    tensors, metadata = read_tensors(path, "LoRA"), {}
    if path.suffix == ".safetensors":
        with opened(path, "LoRA") as file:
            metadata = dict(file.metadata() or {})
    if not holds_lora(tensors):
        raise InputError(f"{path.name} holds no LoRA weights (such as a key ending in .lora_A.weight); choose another.")
    with reading("LoRA", path):
        return LoraWeights(with_alphas(tensors, metadata), metadata)


@contextmanager
def attached(
    model: VideoModel, config: LoraConfig, *, seed: int, start: LoraWeights | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """A trainable float32 LoRA on the denoiser; taken off again at the end.

    Args:
        start: weights of an earlier LoRA to go on from; their rank and scale replace the configured ones.

    Yields:
        The trainable parameters by `<module>.lora_A.weight` / `<module>.lora_B.weight`.

    Raises:
        InputError: `start` does not fit the model.
    """
    config = config.resolve(model)
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft takes fractions too
        lora_dropout=config.dropout,
        target_modules=list(model.lora_targets),
    )
    if start is not None:
        tensors = _by_module(model, start)
        peft_config = _config_for(tensors, config.dropout)
    with _tuner(model, peft_config, seed):
        if start is not None:
            _fill(model, tensors, 1.0)
        yield _parameters(model.denoiser)


@contextmanager
def applied(model: VideoModel, weights: LoraWeights | None, strength: float = 1.0) -> Iterator[None]:
    """The denoiser with a LoRA of the given strength, without gradient; as before at the end.

    Raises:
        InputError: the LoRA was made for another base model.
    """
    if not weights or strength == 0:
        yield
        return
    tensors = _by_module(model, weights)
    with _tuner(model, _config_for(tensors), seed=0):
        _fill(model, tensors, strength)
        model.denoiser.requires_grad_(False)
        yield


def export(
    model: VideoModel,
    parameters: dict[str, Tensor],
    scale: float,
    metadata: dict[str, str],
    layout: Layout = "comfyui",
) -> LoraWeights:
    """Trained parameters as a LoRA file's content; `scale` = alpha / rank goes into B.

    Args:
        layout: "comfyui" is what core ComfyUI loads, where it has the family; "diffusers" what diffusers loads.
    """
    tensors = {
        file_key(model, name, layout): (value.detach() * scale if ".lora_B." in name else value.detach())
        .float()
        .cpu()
        .clone()
        for name, value in parameters.items()
    }
    return LoraWeights(tensors, metadata)


def in_layout(model: VideoModel, weights: LoraWeights, layout: Layout) -> LoraWeights:
    """A LoRA of any layout that is read, under the keys of the given one; alpha / rank goes into B.

    Raises:
        InputError: the LoRA was made for another base model.
    """
    tensors = {file_key(model, name, layout): tensor for name, tensor in _by_module(model, weights).items()}
    return LoraWeights(tensors, weights.metadata)


@contextmanager
def _tuner(model: VideoModel, config: peft.LoraConfig, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(model.denoiser, config, _ADAPTER)
    try:
        for layer in _layers(model.denoiser).values():
            if isinstance(layer.lora_dropout[_ADAPTER], nn.Dropout):
                layer.lora_dropout[_ADAPTER] = GradientDropout(config.lora_dropout)
            layer.cast_input_dtype_enabled = False
            for half in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
                _in_input_precision(half.float())
        yield
    finally:
        tuner.unload()
        if hasattr(model.denoiser, "peft_config"):
            del model.denoiser.peft_config


def _layers(denoiser: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


def _parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name, layer in _layers(denoiser).items():
        for side in ("lora_A", "lora_B"):
            found[f"{name}.{side}.weight"] = getattr(layer, side)[_ADAPTER].weight
    return found


def _by_module(model: VideoModel, weights: LoraWeights) -> dict[str, Tensor]:
    """The weights under the denoiser's own module names."""
    return by_module(model, weights, weights.metadata.get("base_model", "another base model"))


def _config_for(tensors: dict[str, Tensor], dropout: float = 0.0) -> peft.LoraConfig:
    ranks = {
        name.removesuffix(".lora_A.weight"): len(t) for name, t in tensors.items() if name.endswith(".lora_A.weight")
    }
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != common}
    return peft.LoraConfig(
        r=common, lora_alpha=common, rank_pattern=other, alpha_pattern=other, target_modules=sorted(ranks),
        lora_dropout=dropout,
    )  # fmt: skip


@torch.no_grad()
def _fill(model: VideoModel, tensors: dict[str, Tensor], strength: float) -> None:
    for name, parameter in _parameters(model.denoiser).items():
        scale = strength if ".lora_B." in name else 1.0
        parameter.copy_(tensors[name].to(parameter.device, parameter.dtype) * scale)
