"""What saves time: several updates per rollout, cached predictions, a compiled rollout, an 8-bit optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VIDEO, Brightness, tiny_model
from torch import Tensor
from vader_nodes.vader_backend import trainer
from vader_nodes.vader_backend.align import AlignResult, Settings, align
from vader_nodes.vader_backend.compiled_rollout import compiled_rollout
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.generate import VideoConfig
from vader_nodes.vader_backend.lora import LoraConfig, attached
from vader_nodes.vader_backend.memory.options import MemoryConfig
from vader_nodes.vader_backend.models.modelscope import ModelScope
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.rollout_cache import CachedRollout, relative_error
from vader_nodes.vader_backend.sampling import GradPlan, sample
from vader_nodes.vader_backend.trainer import EIGHT_BIT, Hooks, TrainOptions

PROMPTS = PromptSet(("a red circle", "a blue square"), ())
STEPS = 6


@pytest.fixture
def model(tmp_path: Path) -> ModelScope:
    return tiny_model(tmp_path, torch.float32)


@contextmanager
def counted(model: ModelScope) -> Iterator[list[bool]]:
    """One entry per run of the denoiser: whether it was differentiated."""
    runs: list[bool] = []
    forward = model.denoiser.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        runs.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    model.denoiser.forward = counting
    try:
        yield runs
    finally:
        model.denoiser.forward = forward


def run(
    model: ModelScope, folder: Path, hooks: Hooks | None = None, rank: int = 2, steps: int = 2, **options: object
) -> AlignResult:
    of_training = {name: options.pop(name) for name in list(options) if name in TrainOptions.__dataclass_fields__}
    settings = Settings(
        vader.Config(sampling_steps=STEPS, guidance=2.0, reward_frames="all", **options),  # type: ignore[arg-type]
        lora=LoraConfig(rank=rank, dropout=0.0),
        train=TrainOptions(steps=steps, learning_rate=0.02, **of_training),  # type: ignore[arg-type]
        video=VideoConfig(3, 8, 8),
    )
    return align(model, Brightness(), PROMPTS, settings, root=folder / "runs", hooks=hooks)  # type: ignore[arg-type]


# --- several updates per rollout ---------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_updates_of_one_rollout_share_the_steps_before_the_differentiated_ones(
    model: ModelScope, tmp_path: Path, k: int
) -> None:
    with counted(model) as runs:
        result = run(model, tmp_path, evaluations=3, k=k)
    assert len(result.losses) == 2
    assert runs.count(False) == 2 * (STEPS - k)
    assert runs.count(True) == 2 * 3 * k


def objective(model: ModelScope, **options: object) -> vader.Vader:
    config = vader.Config(sampling_steps=STEPS, guidance=2.0, k=2, reward_frames="random", **options)  # type: ignore[arg-type]
    return vader.build(config, model, Brightness(), PROMPTS, VIDEO, seed=0)  # type: ignore[arg-type]


def test_the_first_update_is_that_of_a_rollout_of_its_own_and_the_next_one_differs(model: ModelScope) -> None:
    with attached(model, LoraConfig(rank=2, dropout=0.0), seed=0):
        alone, several = objective(model, eta=1.0), objective(model, eta=1.0, evaluations=2)
        (wanted,) = (alone.loss(batch)[0] for batch in alone.collect(0, 2))
        first, second = (several.loss(batch)[0] for batch in several.collect(0, 2))
    assert torch.equal(first, wanted)
    assert (second - first).abs() > 1e-6


def test_micro_batches_of_an_update_do_not_share_a_rollout(model: ModelScope) -> None:
    with attached(model, LoraConfig(rank=2, dropout=0.0), seed=0):
        whole, parts = objective(model, evaluations=2), objective(model, evaluations=2)
        wanted = [whole.loss(batch)[1]["reward"] for batch in whole.collect(0, 2)]
        found = [
            torch.cat([parts.loss(micro)[1]["reward"] for micro in batch.divide(0, 1, 1)])
            for batch in parts.collect(0, 2)
        ]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_of_several_updates_resumes_to_the_same_result(model: ModelScope, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"evaluations": 2, "eta": 0.5, "steps": 4, "save_every": 1}
    whole = run(model, tmp_path / "whole", **chosen)

    def stop(result: trainer.TrainResult, total: int, metrics: dict[str, float]) -> None:
        if result.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", Hooks(progress=stop), **chosen)
    resumed = run(model, tmp_path / "parts", **chosen)
    assert whole.losses == resumed.losses
    assert all(torch.equal(tensor, resumed.lora[name]) for name, tensor in whole.lora.items())


# --- cached predictions ------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "expected"), [(2, 4), (3, 3), (100, 2)])
def test_the_denoiser_rests_between(model: ModelScope, tmp_path: Path, interval: int, expected: int) -> None:
    """Of the five steps without gradient, number 0 and 1 and every n-th; the first rollout is also run in full."""
    with counted(model) as runs:
        run(model, tmp_path, rollout_interval=interval)
    assert runs.count(True) == 2
    assert runs.count(False) == 2 * expected + STEPS


def chain(model: ModelScope, denoiser: Any, plan: GradPlan) -> Tensor:
    cond = model.encode(["a red circle"], VIDEO)
    schedule = model.process.schedule(STEPS, VIDEO)
    z = torch.randn(model.latent_shape(VIDEO, 1), generator=torch.Generator().manual_seed(0))
    return sample(denoiser, z, cond, schedule, plan, guidance=2.0).latents


def test_an_interval_of_one_changes_nothing_and_longer_ones_tell_their_error(model: ModelScope) -> None:
    full = chain(model, model, GradPlan.none(STEPS))
    assert torch.equal(chain(model, CachedRollout(model, 1), GradPlan.none(STEPS)), full)
    errors = [
        float(relative_error(chain(model, CachedRollout(model, n), GradPlan.none(STEPS)), full)) for n in (2, 100)
    ]
    assert 0 < errors[0] < errors[1]


def test_differentiated_steps_are_run_in_any_case(model: ModelScope) -> None:
    plan = GradPlan((False, False, False, True, False, True))
    with counted(model) as runs, attached(model, LoraConfig(rank=2, dropout=0.0), seed=0):
        assert chain(model, CachedRollout(model, 100), plan).requires_grad
    assert runs == [False, False, True, True]


def test_the_error_is_measured_now_and_then_and_kept(model: ModelScope, tmp_path: Path) -> None:
    result = run(model, tmp_path, steps=27, rollout_interval=3)
    found = {int(line["step"]): line["rollout_error"] for line in result.metrics if "rollout_error" in line}
    assert list(found) == [1, 26]
    assert all(0 < error < 1 for error in found.values())


# --- compiled rollout --------------------------------------------------------------------------


def linear() -> Any:
    """What `compiled_rollout` needs of a model."""
    return SimpleNamespace(denoiser=torch.nn.Linear(3, 3))


def test_only_steps_without_gradient_are_compiled() -> None:
    model, x, seen = linear(), torch.randn(2, 3), []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(torch.is_grad_enabled())
        return lambda *given: [2 * tensor for tensor in module.forward(*given)]

    wanted = model.denoiser(x)
    with compiled_rollout(model, backend):  # type: ignore[arg-type]
        assert torch.equal(model.denoiser(x), wanted)
        assert not seen
        with torch.no_grad():
            assert torch.equal(model.denoiser(x), 2 * wanted)
    with torch.no_grad():
        assert torch.equal(model.denoiser(x), wanted)
    assert seen == [False]


def test_a_machine_that_cannot_compile_says_so() -> None:
    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no compiler")

    model = linear()
    refused = pytest.raises(InputError, match=r"no compiler.*turn compile_rollout off")
    with refused, compiled_rollout(model, backend), torch.no_grad():  # type: ignore[arg-type]
        model.denoiser(torch.randn(2, 3))


@pytest.mark.parametrize("memory", [MemoryConfig(resident_gb=1), MemoryConfig(weight_storage="nf4")])
def test_weights_that_come_and_go_are_not_compiled(model: ModelScope, tmp_path: Path, memory: MemoryConfig) -> None:
    settings = Settings(vader.Config(), train=TrainOptions(compile_rollout=True))
    with pytest.raises(InputError, match="compile_rollout needs all of the denoiser's weights"):
        align(model, Brightness(), PROMPTS, settings, root=tmp_path, memory=memory)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("vader*"))


@pytest.mark.slow
def test_a_whole_training_with_a_compiled_rollout_is_nearly_the_same(model: ModelScope, tmp_path: Path) -> None:
    plain, compiled = (run(model, tmp_path, compile_rollout=chosen) for chosen in (False, True))
    assert not compiled.reused
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


# --- 8-bit optimizer ---------------------------------------------------------------------------


def test_without_its_package_the_8_bit_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        Settings(vader.Config(), train=TrainOptions(optimizer=EIGHT_BIT)).check()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_8_bit_optimizer_holds_bytes_resumes_and_stays_near(model: ModelScope, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"rank": 512, "steps": 4, "save_every": 1}  # moments of fewer than 4096 values stay whole
    plain = run(model, tmp_path / "plain", **chosen)
    whole = run(model, tmp_path / "whole", optimizer=EIGHT_BIT, **chosen)
    assert plain.losses[1:] != whole.losses[1:]
    assert whole.losses == pytest.approx(plain.losses, rel=0.05)

    def stop(result: trainer.TrainResult, total: int, metrics: dict[str, float]) -> None:
        if result.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", Hooks(progress=stop), optimizer=EIGHT_BIT, **chosen)
    assert run(model, tmp_path / "parts", optimizer=EIGHT_BIT, **chosen).losses == whole.losses


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_moments_are_bytes() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = replace(TrainOptions(), optimizer=EIGHT_BIT).new_optimizer([weight], 1e-3)
    weight.grad = torch.randn(64, 128)
    optimizer.step()
    moments = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.shape == weight.shape]
    assert [m.dtype for m in moments] == [torch.uint8] * 2
