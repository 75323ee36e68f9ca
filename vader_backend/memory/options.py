"""The memory tricks as settings, the presets that fill them in, and all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..config import check, option
from ..models.base import VideoModel
from .block_swap import block_swap
from .gradient_checkpointing import gradient_checkpointing
from .graph_offload import graph_offload
from .idle_offload import idle_offload
from .low_bit import STORAGES, low_bit
from .one_by_one import one_by_one
from .sliced_decode import sliced_decode
from .stepwise import stepwise
from .tiled_decode import may_be_tiled, tiled_decode

AS_LOADED = "as loaded"


@dataclass(frozen=True)
class MemoryConfig:
    """What is traded for memory. Only decode_tile and weight_storage change results (see `changes`)."""

    gradient_checkpointing: bool = option(
        False, "Recompute the activations of each block in the backward pass: far less memory, about a third more time."
    )
    stepwise: bool = option(
        False, "Recompute each differentiated denoising step alone: any K needs the memory of one step."
    )
    one_by_one: bool = option(
        False, "Videos, and both branches of guidance, pass the denoiser one after another instead of as one batch."
    )
    graph_offload: bool = option(
        False, "Keep what the backward pass needs in main memory meanwhile; the copies run beside the computation."
    )
    offload_idle: bool = option(False, "Keep the autoencoder and the rewards in main memory while videos are denoised.")
    resident_gb: float = option(
        0.0,
        "Denoiser weights that stay on the device, in GB; the other blocks are fetched when they run. 0 = all stay.",
        low=0.0, high=1000.0, step=0.1,
    )  # fmt: skip
    decode_slices: bool = option(
        False, "Frames pass the decoder's layers one by one, and those that mix frames get some rows at a time."
    )
    decode_tile: int = option(
        0,
        "Wan and LTX-Video: decode without graph, and take the gradient in overlapping tiles of so many pixels a side; "
        "0 = at once. Leaves the pixels, changes gradients a little.",
        low=0, high=4096, step=8,
    )  # fmt: skip
    weight_storage: str = option(
        AS_LOADED,
        "How the denoiser's frozen weights are held: as loaded, or rounded to 8 or 4 bits, which changes results.",
        choices=(AS_LOADED, *STORAGES),
    )

    def changes(self, model: VideoModel) -> dict[str, Any]:
        """The settings that change a model's results, where they are not at rest."""
        rest = MemoryConfig()
        names = ("weight_storage", *(("decode_tile",) if may_be_tiled(model.parts()["vae"]) else ()))
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(rest, name)}

    def chosen(self) -> str:
        """What is on, in one line."""
        found = [f"{name} {value}" if value is not True else name for name, value in asdict(self).items() if value]
        return ", ".join(name for name in found if AS_LOADED not in name) or "nothing"


# None of them touches K, stop_input or frames, nor how weights are held.
PRESETS: Mapping[str, MemoryConfig] = {
    "off": MemoryConfig(),
    "48 GB": MemoryConfig(gradient_checkpointing=True, stepwise=True, resident_gb=32),
    "24 GB": MemoryConfig(
        gradient_checkpointing=True, stepwise=True, one_by_one=True, offload_idle=True, graph_offload=True,
        decode_slices=True, resident_gb=6, decode_tile=512,
    ),
    "16 GB": MemoryConfig(
        gradient_checkpointing=True, stepwise=True, one_by_one=True, offload_idle=True, graph_offload=True,
        decode_slices=True, resident_gb=3, decode_tile=256,
    ),
    "12 GB": MemoryConfig(
        gradient_checkpointing=True, stepwise=True, one_by_one=True, offload_idle=True, graph_offload=True,
        decode_slices=True, resident_gb=1, decode_tile=256,
    ),
}  # fmt: skip


def preset_for(device: torch.device) -> str:
    """The preset for a device's memory; "off" where the device is no accelerator."""
    if device.type != "cuda":
        return "off"
    device_bytes = torch.cuda.get_device_properties(device).total_memory
    sizes = sorted((float(name.split()[0]), name) for name in PRESETS if name != "off")
    fitting = [name for size, name in sizes if size * 0.95e9 <= device_bytes]  # cards report a little less
    return fitting[-1] if fitting else sizes[0][1]


@contextmanager
def tricks(
    model: VideoModel,
    rewards: Sequence[nn.Module],
    config: MemoryConfig,
    device: torch.device,
    host: torch.device | str = "cpu",
    *,
    smallest: int | None = None,
) -> Iterator[None]:
    """Everything that the settings ask for. Enter it while the denoiser lies on `host`; then move it to `device`.

    Args:
        rewards: the rewards' networks.
        smallest: see `graph_offload`.

    Raises:
        InputError: a setting is out of range.
    """
    check(config)
    with ExitStack() as stack:
        if config.weight_storage != AS_LOADED:
            stack.enter_context(low_bit(model, config.weight_storage))
        if config.resident_gb:
            stack.enter_context(block_swap(model, device, host, resident_bytes=int(config.resident_gb * 1e9)))
        if config.gradient_checkpointing:
            stack.enter_context(gradient_checkpointing(model))
        if config.stepwise:
            stack.enter_context(stepwise(model))
        if config.one_by_one:
            stack.enter_context(one_by_one(model))
        if config.decode_slices:
            stack.enter_context(sliced_decode(model))
        if config.decode_tile:
            stack.enter_context(tiled_decode(model, max(1, config.decode_tile // _scale(model))))
        if config.offload_idle:
            stack.enter_context(idle_offload(model, rewards, device, host))
        if config.graph_offload:
            networks = (*model.parts().values(), *rewards)
            stack.enter_context(graph_offload(networks, host, smallest=smallest))
        yield


def _scale(model: VideoModel) -> int:
    """Pixels per latent along a side."""
    video = model.defaults.video
    return max(1, video.height // model.latent_shape(video, 1)[3])
