"""VideoCrafter2: denoiser, autoencoder, text encoder and sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...vader_backend.models._ldm import build_autoencoder, decode_frames, encode_frames
from ...vader_backend.models._videocrafter2_text import build_text_encoder
from ...vader_backend.models._videocrafter2_unet import build_unet
from ...vader_backend.models.videocrafter2 import SCHEDULER, make_process, split
from ...vader_backend.process import Schedule, VariancePreserving
from ...vader_backend.sampling import GradPlan, guided_prediction, sample, step
from ...vader_backend.types import Conditioning
from .fixtures import Fixture

_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}  # original: ours
_UNTOLD_SCALE = 0.3


def unet(fixture: Fixture) -> dict[str, Tensor]:
    """With the frames per second given, left out, and on the first frame alone."""
    source = Path(fixture.name)
    network = build_unet(split(fixture.weights, source)[0], torch.float32, source)
    z, times, text, fps = (fixture.inputs[name] for name in ("x", "timesteps", "context", "fps"))
    return {
        "eps": network(z, times, text, timestep_cond=fps).sample,
        "eps_fps_default": network(z, times, text).sample,
        "eps_t1": network(z[:, :, :1], times, text, timestep_cond=fps).sample,
    }


def autoencoder(fixture: Fixture) -> dict[str, Tensor]:
    """Posterior, a sample of it, and decoding frame by frame and all at once."""
    source, scale = Path(fixture.name), float(fixture.config["scale_factor"])
    vae = build_autoencoder(split(fixture.weights, source)[1], torch.float32, source, scaling_factor=scale)
    video, z, noise = (fixture.inputs[name] for name in ("video", "z", "noise"))
    posterior = vae.encode(video.transpose(1, 2).flatten(0, 1)).latent_dist
    mean = encode_frames(vae, video.transpose(1, 2) / 2 + 0.5).transpose(1, 2).flatten(0, 1)
    frames = [decode_frames(vae, z[:, :, i : i + 1]) for i in range(z.shape[2])]
    return {
        "moments": posterior.parameters,
        "mean": mean / scale,
        "logvar": posterior.logvar,
        "z_sampled": mean + scale * posterior.std * noise,
        "decoded": torch.cat(frames, dim=1).transpose(1, 2),
        "decoded_folded": decode_frames(vae, z).transpose(1, 2),
    }


def text(fixture: Fixture) -> dict[str, Tensor]:
    """Token ids to features."""
    source = Path(fixture.name)
    tower = build_text_encoder(
        split(fixture.weights, source)[2], torch.float32, source, heads=fixture.config["text_cfg"]["heads"]
    )
    return {"features": tower(input_ids=fixture.inputs["token_ids"]).last_hidden_state}


class ClosedForm:
    """The fixture's stand-in for a network; keeps the times that it was called with."""

    def __init__(self, process: VariancePreserving) -> None:
        self.process = process
        self.times: list[int] = []

    def predict(self, z: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        self.times.append(int(t))
        told = 0.5 * cond["text"].mean(dim=(1, 2)) + 0.002 * cond["fps"] + 0.25 * torch.sin(torch.tensor(0.01 * t))
        return torch.tanh(0.8 * z + told.view(-1, 1, 1, 1, 1)) + 0.1 * z.roll(1, dims=2)


def sampler(fixture: Fixture) -> dict[str, Tensor]:
    """The schedule's tables and a whole guided chain with fresh noise, at the original's own times."""
    model = ClosedForm(_process(fixture))
    schedule = model.process.through(_uniform(model.process, fixture.config["S"]))
    eta, guidance = fixture.config["eta"], fixture.config["unconditional_guidance_scale"]
    given, fps = fixture.inputs, fixture.inputs["fps"]
    noises = given.get("noises", torch.zeros(len(schedule), 1))  # unused where eta is 0, as uncond without guidance
    cond = Conditioning({"text": given["cond"], "fps": fps}, {"text": given.get("uncond", given["cond"]), "fps": fps})
    states = [given["x_T"]]
    rollout = sample(
        model, states[0], cond, schedule, GradPlan.none(len(schedule)),
        guidance=guidance, eta=eta, noise=lambda i: noises[i], on_step=lambda i, z: states.append(z),
    )  # fmt: skip
    model_times = torch.tensor(model.times)
    clean = []
    for i, z in enumerate(states[:-1]):
        prediction = guided_prediction(model, z, schedule.timesteps[i], cond, guidance)
        clean.append(step(model.process, schedule, i, z, prediction, eta, noises[i])[1])
    x0, noise, t = (given[f"q_{name}"] for name in ("x0", "noise", "t"))
    return {
        "final": rollout.latents,
        "x_inter": torch.stack(states),
        "pred_x0": torch.stack(clean),
        "model_t": model_times,
        "q_sample": model.process.add_noise(x0, noise, t),
        **_tables(model.process, fixture.config["S"], eta),
    }


def _process(fixture: Fixture) -> VariancePreserving:
    config = fixture.config["model"]
    scheduler = {
        **SCHEDULER,
        "beta_schedule": _BETAS[config.get("beta_schedule", "linear")],
        "beta_start": config["linear_start"],
        "beta_end": config["linear_end"],
        "num_train_timesteps": config["timesteps"],
    }
    process = make_process(scheduler, config.get("scale_b", _UNTOLD_SCALE) if config.get("use_scale") else 1.0)
    if config.get("fix_scale_bug") and process.scale is not None:  # the original then has no entries to spare
        process = replace(process, scale=process.scale[: process.train_steps])
    return process


def _uniform(process: VariancePreserving, steps: int) -> list[int]:
    """The original's times, noisiest first: one or more too many where `steps` does not divide the training times."""
    return [t + 1 for t in reversed(range(0, process.train_steps, process.train_steps // steps))]


def _tables(process: VariancePreserving, steps: int, eta: float) -> dict[str, Tensor]:
    power = process.alphas_cumprod
    before = torch.cat([power.new_ones(1), power[:-1]])
    assert process.scale is not None
    return {
        "betas": 1 - power / before,
        "alphas_cumprod": power,
        "scale_arr_1400": process.scale,
        "ddim50_timesteps": torch.tensor(process.schedule(50).timesteps).flip(0),
        **_ascending("ddim_S", process.through(_uniform(process, steps)), eta),
        **_ascending("ddim25", process.schedule(25), eta),
    }


def _ascending(name: str, schedule: Schedule, eta: float) -> dict[str, Tensor]:
    """What the original keeps of a schedule, least noisy first."""
    alpha, sigma = (torch.tensor(v, dtype=torch.float64).flip(0) for v in (schedule.alpha, schedule.sigma))
    power = 1 - sigma**2
    fresh = [schedule.fresh_noise(i, eta) for i in reversed(range(len(schedule)))]
    return {
        f"{name}_timesteps": torch.tensor(schedule.timesteps).flip(0),
        f"{name}_alphas": power[1:],
        f"{name}_alphas_prev": power[:-1],
        f"{name}_sigmas": torch.tensor(fresh, dtype=torch.float64),
        f"{name}_sqrt_one_minus_alphas": sigma[1:],
        f"{name}_scale_arr": (alpha / power.sqrt())[1:],
        f"{name}_scale_arr_prev": (alpha / power.sqrt())[:-1],
    }


RUN = {
    "videocrafter2_unet": unet,
    "videocrafter2_unet_wide": unet,
    "videocrafter2_vae": autoencoder,
    "videocrafter2_text": text,
    "videocrafter2_sampler": sampler,
}
