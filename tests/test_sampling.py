"""Truncated gradients against plain autograd and a hand-written prefix, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import VIDEO, tiny_model
from torch import Tensor
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.lora import LoraConfig, attached
from vader_nodes.vader_backend.models.modelscope import ModelScope
from vader_nodes.vader_backend.rng import generator
from vader_nodes.vader_backend.sampling import GradPlan, guided_prediction, sample, step
from vader_nodes.vader_backend.types import Conditioning

T = 4
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelScope]:
    model = tiny_model(tmp_path_factory.mktemp("tiny"))
    with attached(model, LoraConfig(rank=2), seed=0) as parameters:
        for parameter in parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
        yield model


@pytest.fixture(scope="module")
def cond(model: ModelScope) -> Conditioning:
    found = model.encode(["a red circle", "a blue square moving left"], VIDEO, negative="gray")
    return Conditioning({"text": found.positive["text"].double()}, {"text": found.negative["text"].double()})


def start(model: ModelScope) -> Tensor:
    return torch.randn(model.latent_shape(VIDEO, 2), generator=generator("start"), dtype=torch.float64)


def noise(i: int) -> Tensor:
    return torch.randn((2, 4, 3, 4, 4), generator=generator("noise", i), dtype=torch.float64)


def gradients(model: ModelScope, latents: Tensor) -> dict[str, Tensor]:
    trained = {n: p for n, p in model.denoiser.named_parameters() if p.requires_grad}
    value = (model.decode(latents, [0, 2]) * torch.linspace(0, 1, 8, dtype=torch.float64)).mean()
    grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), grads, strict=True)}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in second.values())
    assert scale > 0
    for name, gradient in second.items():
        assert (first[name] - gradient).abs().max() <= 1e-6 * scale, name


def by_hand(model: ModelScope, cond: Conditioning, eta: float, differentiated: Callable[[int], bool]) -> Tensor:
    """The chain written out with no use of sampling.py: DDIM of diffusers' documentation, two separate forwards."""
    schedule = model.process.schedule(T)
    z = start(model)
    for i in range(T):
        power, power_next = schedule.alpha[i] ** 2, schedule.alpha[i + 1] ** 2
        with torch.set_grad_enabled(differentiated(i)):
            negative = model.predict(z, schedule.timesteps[i], dict(cond.negative))
            positive = model.predict(z, schedule.timesteps[i], dict(cond.positive))
        eps = negative + GUIDANCE * (positive - negative)
        x0 = (z - (1 - power) ** 0.5 * eps) / power**0.5
        deviation = eta * ((1 - power_next) / (1 - power) * (1 - power / power_next)) ** 0.5
        z = power_next**0.5 * x0 + (1 - power_next - deviation**2) ** 0.5 * eps + deviation * noise(i)
    return z


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 2, T])
def test_last_k_equals_a_chain_written_by_hand(model: ModelScope, cond: Conditioning, k: int, eta: float) -> None:
    plan = GradPlan.last_k(T, k)
    chain = sample(model, start(model), cond, model.process.schedule(T), plan, guidance=GUIDANCE, eta=eta, noise=noise)
    expected = by_hand(model, cond, eta, lambda i: i >= T - k)
    assert (chain.latents - expected).abs().max() < 1e-9
    assert_equal(gradients(model, chain.latents), gradients(model, expected))


def test_more_steps_give_another_gradient(model: ModelScope, cond: Conditioning) -> None:
    found = []
    for k in (1, T):
        plan = GradPlan.last_k(T, k)
        found.append(gradients(model, sample(model, start(model), cond, model.process.schedule(T), plan).latents))
    assert any((found[0][n] - found[1][n]).abs().max() > 1e-4 * found[1][n].abs().max() for n in found[0])


def test_a_gap_in_the_plan_passes_the_gradient_on(model: ModelScope, cond: Conditioning) -> None:
    plan = GradPlan((False, True, False, False))
    chain = sample(model, start(model), cond, model.process.schedule(T), plan, guidance=GUIDANCE)
    assert_equal(gradients(model, chain.latents), gradients(model, by_hand(model, cond, 0.0, lambda i: i == 1)))


def test_stop_input_sums_the_steps_own_gradients(model: ModelScope, cond: Conditioning) -> None:
    schedule = model.process.schedule(T)

    def run(plan: GradPlan) -> dict[str, Tensor]:
        return gradients(model, sample(model, start(model), cond, schedule, plan, guidance=GUIDANCE).latents)

    together = run(GradPlan.last_k(T, 2, stop_input=True))
    singles = [run(GradPlan(tuple(i == j for i in range(T)), stop_input=True)) for j in (T - 2, T - 1)]
    assert_equal(together, {name: singles[0][name] + singles[1][name] for name in together})
    plain = run(GradPlan.last_k(T, 2))
    assert any((plain[n] - together[n]).abs().max() > 1e-4 * plain[n].abs().max() for n in plain)


def saved_by_steps(model: ModelScope, cond: Conditioning, plan: GradPlan) -> list[int]:
    """How many tensors each step saves for backward."""
    counts = [0]

    def pack(tensor: Tensor) -> Tensor:
        counts[-1] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sample(
            model, start(model), cond, model.process.schedule(T), plan, guidance=GUIDANCE, eta=1.0, noise=noise,
            on_step=lambda i, z: counts.append(0),
        )  # fmt: skip
    return counts[:-1]


def test_steps_without_gradient_save_nothing(model: ModelScope, cond: Conditioning) -> None:
    counts = saved_by_steps(model, cond, GradPlan.last_k(T, 1))
    assert counts[:-1] == [0, 0, 0]
    assert counts[-1] > 100
    assert saved_by_steps(model, cond, GradPlan.none(T)) == [0, 0, 0, 0]
    gap = saved_by_steps(model, cond, GradPlan((False, True, False, False)))
    assert gap[1] > 100
    assert gap[2:] == [0, 0]


def test_guidance_gradient_flows_through_both_branches(model: ModelScope, cond: Conditioning) -> None:
    positive, negative = (c["text"].clone().requires_grad_() for c in (cond.positive, cond.negative))
    both = Conditioning({"text": positive}, {"text": negative})
    guided_prediction(model, start(model), 500.0, both, GUIDANCE).square().mean().backward()
    assert positive.grad is not None
    assert negative.grad is not None
    assert positive.grad.abs().max() > 0
    assert negative.grad.abs().max() > 0


def test_no_guidance_runs_one_branch(model: ModelScope, cond: Conditioning) -> None:
    z = start(model)
    plain = guided_prediction(model, z, 500.0, Conditioning(cond.positive, {}), 1.0)
    assert torch.equal(plain, model.predict(z, 500.0, dict(cond.positive)))


@pytest.mark.parametrize("k", [0, T + 1])
def test_k_outside_the_chain_is_refused(k: int) -> None:
    rng = torch.Generator()
    for build in (
        lambda: GradPlan.last_k(T, k),
        lambda: GradPlan.random_k(T, k, rng),
        lambda: GradPlan.uniform(T, k),
        lambda: GradPlan.from_step(T, T),
    ):
        with pytest.raises(InputError, match=str(T)):
            build()


def test_plans() -> None:
    assert GradPlan.last_k(5, 2).steps == (False, False, False, True, True)
    assert GradPlan.from_step(5, 3).steps == (False, False, False, True, True)
    assert GradPlan.uniform(6, 3).steps == (False, True, False, True, False, True)
    assert GradPlan.uniform(5, 5).steps == (True,) * 5
    rng = torch.Generator().manual_seed(0)
    drawn = [GradPlan.random_k(6, 2, rng).steps for _ in range(40)]
    assert all(sum(steps) == 2 for steps in drawn)
    assert len(set(drawn)) > 5
    starts = [GradPlan.random_start(6, rng).steps for _ in range(60)]
    assert all(list(steps) == sorted(steps) and any(steps) for steps in starts)
    assert len(set(starts)) == 6


def test_noise_source_is_required_with_eta(model: ModelScope) -> None:
    schedule = model.process.schedule(T)
    with pytest.raises(ValueError, match="noise"):
        step(model.process, schedule, 0, start(model), start(model), 1.0, None)
