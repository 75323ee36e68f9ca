"""Processes and the step against diffusers' DDIMScheduler."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.process import Schedule, VariancePreserving
from vader_nodes.vader_backend.sampling import step

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
# With zero terminal SNR and eta 1 the part of the old noise that is kept is a root of 0: rounding alone gives 1e-8.
CLOSE: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-7}


def pair(steps: int, **settings: Any) -> tuple[VariancePreserving, DDIMScheduler]:
    """Our process and diffusers' scheduler on one float64 table, so that formulas can be compared."""
    scheduler = DDIMScheduler(**{**BASE, **settings})
    process = VariancePreserving.from_config(dict(scheduler.config))
    # diffusers builds its table in float32
    torch.testing.assert_close(
        process.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-6, check_dtype=False
    )
    scheduler.alphas_cumprod = process.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(process.final_alpha_cumprod, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return process, scheduler


def draw(*key: int) -> Tensor:
    rng = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(2, 4, 3, 5, 5, generator=rng, dtype=torch.float64)


CASES = [
    (spacing, prediction, zero_snr)
    for spacing, prediction, zero_snr in product(SPACINGS, PREDICTIONS, (False, True))
    if not (prediction == "epsilon" and zero_snr)
]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "prediction", "zero_snr"), [c for c in CASES if c[0] != "linspace"])
def test_chain_equals_ddim(spacing: str, prediction: str, zero_snr: bool, to_one: bool, eta: float) -> None:
    steps = 20
    process, scheduler = pair(
        steps,
        timestep_spacing=spacing,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        set_alpha_to_one=to_one,
        steps_offset=1 if spacing == "leading" else 0,
    )
    schedule = process.schedule(steps)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()
    ours = theirs = draw(0)
    for i, t in enumerate(scheduler.timesteps):
        output, noise = draw(1, i), draw(2, i)
        theirs = scheduler.step(output, t, theirs, eta=eta, variance_noise=noise if eta else None).prev_sample
        ours, _ = step(process, schedule, i, ours, output, eta, noise)
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=f"step {i}")


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("prediction", "zero_snr"), [c[1:] for c in CASES if c[0] == "linspace"])
def test_linspace_step_equals_ddim(prediction: str, zero_snr: bool, eta: float) -> None:
    """diffusers steps to t - 1000 // T, which with linspace is not its own next timestep: compared there."""
    steps = 20
    process, scheduler = pair(
        steps, timestep_spacing="linspace", prediction_type=prediction, rescale_betas_zero_snr=zero_snr
    )
    assert list(process.schedule(steps).timesteps) == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps.tolist()):
        power = [float(process.alphas_cumprod[t]), 1.0]
        if t >= 1000 // steps:
            power[1] = float(process.alphas_cumprod[t - 1000 // steps])
        alpha, sigma = tuple(p**0.5 for p in power), tuple((1 - p) ** 0.5 for p in power)
        single = Schedule((float(t),), alpha, sigma, stochastic=True)
        z, output, noise = draw(0, i), draw(1, i), draw(2, i)
        ours, _ = step(process, single, 0, z, output, eta, noise)
        theirs = scheduler.step(output, t, z, eta=eta, variance_noise=noise if eta else None)
        torch.testing.assert_close(ours, theirs.prev_sample, **CLOSE)
        x0 = process.split(z, output, single.alpha[0], single.sigma[0])[0]
        torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_beta_schedules_equal_diffusers(kind: str) -> None:
    pair(10, beta_schedule=kind)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 33, 50, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_any_number_of_steps_gives_exactly_so_many(spacing: str, steps: int, offset: int) -> None:
    process = VariancePreserving.from_config({**BASE, "timestep_spacing": spacing, "steps_offset": offset})
    schedule = process.schedule(steps)
    assert len(schedule) == steps
    assert len(schedule.alpha) == len(schedule.sigma) == steps + 1
    assert all(a > b for a, b in zip(schedule.timesteps, schedule.timesteps[1:], strict=False))
    assert schedule.timesteps[-1] >= 0
    assert schedule.timesteps[0] <= 999
    assert all(t == int(t) for t in schedule.timesteps)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_the_chain_starts_from_the_noisiest_time(spacing: str) -> None:
    process = VariancePreserving.from_config({**BASE, "timestep_spacing": spacing})
    assert all(process.schedule(steps).timesteps[0] == 999 for steps in (1, 7, 33, 999))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match="steps"):
        VariancePreserving.from_config(BASE).schedule(steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_split_inverts_add_noise_and_target(prediction: str) -> None:
    process = VariancePreserving.from_config({**BASE, "prediction_type": prediction})
    x0, noise, t = draw(3), draw(4), torch.tensor([40, 900])
    z, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    for row in range(2):
        power = float(process.alphas_cumprod[t[row]])
        found = process.split(z[row], target[row], power**0.5, (1 - power) ** 0.5)
        torch.testing.assert_close(found[0], x0[row], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1], noise[row], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "flow"},
        {"timestep_spacing": "karras"},
        {"beta_schedule": "sigmoid"},
        {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
    ],
)
def test_unsupported_configurations_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        VariancePreserving.from_config({**BASE, **settings})


def test_fresh_noise_is_required_when_eta_is_not_zero() -> None:
    process = VariancePreserving.from_config(BASE)
    with pytest.raises(ValueError, match="noise"):
        step(process, process.schedule(10), 0, draw(0), draw(1), 1.0, None)
