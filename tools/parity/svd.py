"""Stable Video Diffusion: the UNet from its original keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...vader_backend.models import _svd_keys, _svd_original, svd
from .fixtures import Fixture


def unet(fixture: Fixture) -> dict[str, Tensor]:
    """out, and where the fixture has their inputs out_ctx3 (several context tokens) and out_mixed.

    In out_mixed some frames go through the spatial branch only.
    """
    network = _svd_original.build_unet(
        _svd_keys.section(fixture.weights, _svd_keys.UNET),
        torch.float32,
        Path(fixture.name),
        head_channels=fixture.config["num_head_channels"],
    )
    network.add_time_proj = nn.Identity()  # the inputs hold the embedded fps, motion and noise themselves
    given, frames = dict(fixture.inputs), fixture.config["num_video_frames"]
    image_only = given.pop("image_only_mixed", None)
    by_video = {name: tensor.unflatten(0, (-1, frames)) for name, tensor in given.items()}
    z, image_latents = by_video["x"].transpose(1, 2).tensor_split([network.config.out_channels], dim=1)

    def run(context: str) -> Tensor:
        t, y, image = (_common(by_video[name]) for name in ("timesteps", "y", context))
        cond = {"image": image, "image_latents": image_latents, "time_ids": y}
        return svd.denoise(network, z, t, cond).transpose(1, 2).flatten(0, 1)

    outputs = {"out": run("context")}
    if "context2" in given:
        outputs["out_ctx3"] = run("context2")
    if image_only is not None:
        with _image_only(network, image_only):
            outputs["out_mixed"] = run("context")
    return outputs


def _common(by_frame: Tensor) -> Tensor:
    """What all frames of a video share: [B, T, ...] -> [B, ...]."""
    if not torch.equal(by_frame, by_frame[:, :1].expand_as(by_frame)):
        raise ValueError("the frames of a video have different times or conditions")
    return by_frame[:, 0]


@contextmanager
def _image_only(network: Any, indicator_BT: Tensor) -> Iterator[None]:
    """The network with the given frames kept out of temporal mixing; its own forward mixes all of them."""

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "image_only_indicator": indicator_BT}

    blocks = (*network.down_blocks, network.mid_block, *network.up_blocks)
    hooks = [block.register_forward_pre_hook(replace, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


RUN = {"svd_unet": unet}
