"""Every memory trick, found by its file: equal gradients to the bit, less kept for backward, gone on exit."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from tiny import VIDEO, tiny_model
from torch import Tensor
from vader_nodes.vader_backend import memory
from vader_nodes.vader_backend.lora import LoraConfig, attached
from vader_nodes.vader_backend.models.modelscope import ModelScope
from vader_nodes.vader_backend.sampling import GradPlan, sample

TRICKS = sorted(p.stem for p in Path(memory.__path__[0]).glob("*.py") if not p.stem.startswith("_"))
Trick = Callable[[ModelScope], AbstractContextManager[None]]


def measure(folder: Path, trick: Trick) -> tuple[dict[str, Tensor], int]:
    """The gradients of a two-step chain, and the bytes that it keeps for backward."""
    model = tiny_model(folder, torch.float32)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with attached(model, LoraConfig(rank=2, dropout=0.2), seed=0) as parameters:
        for parameter in parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        cond = model.encode(["a red circle"], VIDEO)
        start = torch.randn(model.latent_shape(VIDEO, 1), generator=torch.Generator().manual_seed(2))
        torch.manual_seed(3)
        with trick(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            schedule = model.process.schedule(3)
            latents = sample(model, start, cond, schedule, GradPlan.last_k(3, 2), guidance=3.0).latents
            grads = torch.autograd.grad(model.decode(latents, [1]).square().mean(), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True)), kept


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_changes_memory_and_nothing_else(name: str, tmp_path: Path) -> None:
    trick = getattr(importlib.import_module(f"{memory.__name__}.{name}"), name)
    plain, kept_plain = measure(tmp_path, lambda model: nullcontext())
    tricked, kept = measure(tmp_path, trick)
    assert any(g.any() for g in plain.values())
    assert all(torch.equal(plain[key], tricked[key]) for key in plain)
    assert kept < 0.6 * kept_plain


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_is_undone_on_exit(name: str, tmp_path: Path) -> None:
    trick = getattr(importlib.import_module(f"{memory.__name__}.{name}"), name)
    model = tiny_model(tmp_path, torch.float32)
    before = {key: list(vars(module)) for key, module in model.denoiser.named_modules()}
    with pytest.raises(RuntimeError, match="inside"), trick(model):
        raise RuntimeError("inside")
    assert before == {key: list(vars(module)) for key, module in model.denoiser.named_modules()}
