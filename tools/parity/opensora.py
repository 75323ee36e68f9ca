"""Open-Sora 1.2: transformer, flow and video autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...vader_backend.loading import build_frozen
from ...vader_backend.models._flow import Spacing, shifted
from ...vader_backend.models._opensora_vae import VideoAutoencoder, per_channel
from ...vader_backend.models._stdit3 import Architecture, STDiT3
from ...vader_backend.models.opensora import PUBLISHED, sampling_times, time_shift
from ...vader_backend.process import Flow, Process
from ...vader_backend.sampling import GradPlan, sample
from ...vader_backend.types import Conditioning, VideoSpec
from .fixtures import Fixture

_PIXELS_PER_LATENT = 8  # the reference's latent_size counts so, whatever the image autoencoder really does


def stdit3(fixture: Fixture) -> dict[str, Tensor]:
    arch = Architecture.of({key: tensor.shape for key, tensor in fixture.weights.items()})
    network = build_frozen(
        lambda: STDiT3(arch, fixture.config["input_sq_size"]), fixture.weights, torch.float32, "denoiser", Path()
    )
    given = fixture.inputs
    x, t, text, mask = given["x"], given["timestep"], given["y"].squeeze(1), given["mask"]
    size = [given[name] for name in ("fps", "height", "width")]
    both = [torch.cat([part, part]) for part in (x, t)]
    texts = torch.cat([text, network.y_embedder.y_embedding.expand_as(text)])
    outputs = {
        "pred": network(x, t, text, mask, *size),
        "pred_cfg": network(*both, texts, torch.cat([mask, mask]), *(torch.cat([part, part]) for part in size)),
        "pred_nomask": network(x, t, text, None, *size),
    }
    if "x_mask" in given:
        outputs["pred_x_mask"] = network(x, t, text, mask, *size, x_mask=given["x_mask"])
    return outputs


@dataclass(frozen=True)
class ClosedForm:
    """The reference's stand-in for a network."""

    process: Process

    def predict(self, z: Tensor, t: float | Tensor, cond: dict[str, Tensor]) -> Tensor:
        shape = -1, *[1] * (z.ndim - 1)
        time = torch.as_tensor(t, dtype=z.dtype).view(shape)
        return 0.6 * torch.sin(z + 0.002 * time) - 0.4 * z + 0.5 * cond["y"].mean((1, 2, 3)).view(shape)


def rflow(fixture: Fixture) -> dict[str, Tensor]:
    """Sampling at the configured size, a training loss, and the times of 30 steps."""
    config, scheduler, given = fixture.config, fixture.config["scheduler"], fixture.inputs
    video = VideoSpec(config["num_frames"], config["height"], config["width"], config["fps"])
    flow = Flow(_times(scheduler), towards_data=True, train_steps=scheduler.get("num_timesteps", 1000))
    schedule = flow.schedule(scheduler["num_sampling_steps"], video)
    trajectory = [given["z"]]
    rollout = sample(
        ClosedForm(flow), given["z"], Conditioning({"y": given["y"]}, {"y": given["y_null"]}), schedule,
        GradPlan.none(len(schedule)), guidance=scheduler["cfg_scale"],
        on_step=lambda _, z: trajectory.append(z),
    )  # fmt: skip
    times = (given["t"] / flow.train_steps).tolist()
    return {
        "final": rollout.latents,
        "traj": torch.stack(trajectory[:-1]),
        "model_t": torch.tensor(schedule.timesteps),
        **_thirty(fixture, flow, video),
        "x_t": flow.add_noise(given["x0"], given["noise"], given["t"]),
        "loss": _loss(flow, fixture),
        "t_transformed": flow.train_steps * torch.tensor(shifted(times, time_shift(video))),
    }


def _thirty(fixture: Fixture, flow: Flow, configured: VideoSpec) -> dict[str, Tensor]:
    """The times of 30 steps, at the published or at the configured size: fixtures do not say which they mean."""

    def at(video: VideoSpec, rounding: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(
            replace(flow, spacing=partial(sampling_times, rounding=rounding)).schedule(30, video).timesteps
        )

    expected = fixture.outputs.get("timesteps30_fp32")
    sizes = (PUBLISHED.video, configured)
    video = sizes[0] if expected is None else min(sizes, key=lambda size: float((at(size) - expected).abs().max()))
    return {
        "timesteps30_fp32": at(video),
        "timesteps30_bf16": at(video, torch.bfloat16),
        "timesteps30_image": at(replace(video, frames=1)),
    }


def _times(scheduler: Mapping[str, Any]) -> Spacing:
    """Ours, unless the reference was told to leave the times where they are or to round them."""
    if scheduler.get("use_timestep_transform") and not scheduler.get("use_discrete_timesteps"):
        return sampling_times

    def times(steps: int, video: VideoSpec) -> list[float]:
        even, total = [1 - i / steps for i in range(steps)], scheduler.get("num_timesteps", 1000)
        if scheduler.get("use_discrete_timesteps"):
            even = [round(total * t) / total for t in even]
        return shifted(even, time_shift(video) if scheduler.get("use_timestep_transform") else 1.0)

    return times


def _loss(flow: Flow, fixture: Fixture) -> Tensor:
    """Mean squared error of the velocity that our process reads from the prediction, per sample."""
    given = fixture.inputs
    noisy = flow.add_noise(given["x0"], given["noise"], given["t"])
    prediction = ClosedForm(flow).predict(noisy, given["t"], {"y": given["y_train"]})
    losses = []
    for row, time in enumerate((given["t"] / flow.train_steps).tolist()):
        x0, noise = flow.split(noisy[row], prediction[row], 1 - time, time)
        losses.append((x0 - noise - (given["x0"] - given["noise"])[row]).square().mean())
    return torch.stack(losses)


def vae(fixture: Fixture) -> dict[str, Tensor]:
    given = fixture.inputs
    window = fixture.config.get("micro_frame_size") or given["video"].shape[2]  # without one: the whole video
    config = {**fixture.config, "micro_frame_size": window}
    network = build_frozen(
        lambda: VideoAutoencoder.from_config(config), per_channel(fixture.weights), torch.float32, "autoencoder", Path()
    )
    frames = given["video"].shape[2]
    size = [n // _PIXELS_PER_LATENT for n in given["video"].shape[3:]]
    moments = network.temporal_vae.encode(given["xz"])
    published = VideoAutoencoder.from_config({**config, "micro_frame_size": 17})
    return {
        "z_mode": network.encode(given["video"]),
        "z_sampled": network.encode(given["video"], (given["noise_spatial"], given["noise_temporal"])),
        "x_z_mode": network.encode_images(given["video"]),
        "t_moments": moments,
        "t_moments_short": network.temporal_vae.encode(given["xz_short"]),
        "t_decoded": network.temporal_vae.decode(moments.chunk(2, dim=1)[0], given["xz"].shape[2]),
        "decoded": network.decode(given["z"], range(frames), frames),
        "latent_size": torch.tensor([network.latent_frames(frames), *size]),
        "latent_size_51": torch.tensor([published.latent_frames(frames) for frames in (51, 102)]),
    }


RUN = {"opensora_stdit3": stdit3, "opensora_rflow": rflow, "opensora_vae": vae}
