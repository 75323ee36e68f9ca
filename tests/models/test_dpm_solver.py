"""DPM-Solver++(2M) against diffusers' DPMSolverMultistepScheduler, in float64, and ModelScope's choice of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.files import weights
from vader_nodes.vader_backend.models import modelscope
from vader_nodes.vader_backend.process import VariancePreserving
from vader_nodes.vader_backend.sampling import GradPlan, sample, step
from vader_nodes.vader_backend.types import Conditioning

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers', under numpy 2

# scheduler/scheduler_config.json of damo-vilab/text-to-video-ms-1.7b
PUBLISHED: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "set_alpha_to_one": True},
    {"timestep_spacing": "trailing", **ZERO_SNR},
    ZERO_SNR,
]


class Double(Tensor):
    """diffusers rounds latents to float32 in each step; these stay as they are."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self


def reference(steps: int, **settings: Any) -> DPMSolverMultistepScheduler:
    """diffusers' scheduler from ModelScope's configuration, its tables computed anew in float64."""
    scheduler = DPMSolverMultistepScheduler.from_config({**PUBLISHED, **settings})
    scheduler.set_timesteps(steps)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    zero_snr = settings.get("rescale_betas_zero_snr", False)
    power = torch.cumprod(1 - (rescale_zero_terminal_snr(betas) if zero_snr else betas), dim=0)
    if zero_snr:
        power[-1] = 2**-24
    sigmas = ((1 - power) / power).sqrt()[scheduler.timesteps]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), sigmas, rtol=1e-3, atol=1e-6)
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    return scheduler


def draw(*key: int) -> Tensor:
    rng = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(2, 4, 3, 5, 5, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 8, 25])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_chain_equals_diffusers(settings: dict[str, Any], steps: int) -> None:
    scheduler = reference(steps, **settings)
    process = VariancePreserving.from_config({**PUBLISHED, **settings}, "dpm++2m")
    schedule = process.schedule(steps)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()
    ours, history = draw(0), None
    theirs = ours.as_subclass(Double)
    for i, t in enumerate(scheduler.timesteps):
        output = draw(1, i)
        theirs = scheduler.step(output, t, theirs).prev_sample
        ours, history = step(process, schedule, i, ours, output, 0.0, None, history)
        torch.testing.assert_close(ours, theirs.as_subclass(Tensor), rtol=1e-9, atol=1e-9, msg=f"step {i}")


def test_sampling_through_the_chain_equals_diffusers() -> None:
    class Network:
        process = VariancePreserving.from_config(PUBLISHED, "dpm++2m")

        def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
            return torch.tanh(z) + 0.001 * t

    scheduler, network = reference(25), Network()
    start = draw(0)
    theirs = start.as_subclass(Double)
    for t in scheduler.timesteps:
        theirs = scheduler.step(network.predict(theirs, float(t), {}), t, theirs).prev_sample
    ours = sample(network, start, Conditioning({}, {}), network.process.schedule(25), GradPlan.none(25))
    torch.testing.assert_close(ours.latents, theirs.as_subclass(Tensor), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", [None, "leading", "trailing"])
def test_any_number_of_steps_has_the_times_of_diffusers(spacing: str | None) -> None:
    config = {**PUBLISHED, **({"timestep_spacing": spacing} if spacing else {})}
    process = VariancePreserving.from_config(config, "dpm++2m")
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    for steps in [*range(1, 60), 100, 333, 499]:
        scheduler.set_timesteps(steps)
        # for a few numbers diffusers adds a time of -1
        assert list(process.schedule(steps).timesteps) == scheduler.timesteps.tolist()[:steps]


def test_the_configuration_of_the_ddim_scheduler_object_reads_the_same() -> None:
    process = VariancePreserving.from_config(PUBLISHED, "dpm++2m")
    scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler.from_config(PUBLISHED).config)
    scheduler.set_timesteps(25)
    assert list(process.schedule(25).timesteps) == scheduler.timesteps.tolist()


def test_more_steps_than_training_times_are_refused() -> None:
    process = VariancePreserving.from_config(PUBLISHED, "dpm++2m")
    assert len(set(process.schedule(999).timesteps)) == 999
    with pytest.raises(InputError, match="1 to 999"):
        process.schedule(1000)


@pytest.mark.parametrize(
    "option", [{"use_karras_sigmas": True}, {"solver_order": 3}, {"final_sigmas_type": "sigma_min"}]
)
def test_other_variants_of_the_solver_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(option))):
        VariancePreserving.from_config({**PUBLISHED, **option}, "dpm++2m")


def test_modelscope_takes_it_where_asked_for() -> None:
    folder = str(weights("modelscope"))
    plain = modelscope.build(modelscope.Config(folder))
    chosen = modelscope.build(modelscope.Config(folder, sampler="dpm++2m"))
    video = plain.defaults.video
    assert plain.process.schedule(20, video).solver == "ddim"
    assert plain.process.schedule(20, video).stochastic
    schedule = chosen.process.schedule(20, video)
    assert schedule.solver == "dpm++2m"
    assert not schedule.stochastic
    assert schedule.sigma[-1] == 0
    with pytest.raises(InputError, match="sampler"):
        modelscope.build(modelscope.Config(folder, sampler="heun"))
