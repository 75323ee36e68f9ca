"""Apply LoRA Sample: videos from prompts, with or without a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..vader_backend.config import InputError, option
from ..vader_backend.generate import SampleConfig, VideoConfig, generate
from ..vader_backend.loading import SUFFIXES
from ..vader_backend.lora import LoraWeights, applied, load_lora
from ..vader_backend.memory.options import MemoryConfig, tricks
from ..vader_backend.models.base import VideoModel
from ..vader_backend.placement import residents
from ..vader_backend.prompts import PromptSet
from . import device, host, schema
from .images import rows, to_images
from .memory import automatic
from .prompts import warn_long

NO_LORA = "none"
_PLAIN = ("strength", "which", "limit", "seed", "steps", "guidance")


@dataclass(frozen=True)
class Choice:
    """Which prompts are sampled, and how strong the LoRA is."""

    strength: float = option(1.0, "Strength of the LoRA; 0 is the base model.", low=-10.0, high=10.0, step=0.05)
    which: str = option(
        "all", "Training prompts, held-out prompts, or all: first the training, then the held-out ones.",
        choices=("all", "train", "held_out"),
    )  # fmt: skip
    limit: int = option(
        4, "At most this many prompts of each part, evenly spread over the list; 0 takes all.", low=0, high=10000
    )


class VaderApplyLoRASample:
    DESCRIPTION = "Samples a video per prompt. Equal seeds give equal noise, so that base and aligned videos compare."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("sample video", "generate video", "apply lora", "ksampler")
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE", "VADER_PROMPTS")
    RETURN_NAMES = ("images", "prompts")
    OUTPUT_TOOLTIPS = ("All frames, video after video.", "The prompts of these videos, in their order.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "model": schema.link("VADER_MODEL", "The model to sample from."),
            "prompts": schema.link("VADER_PROMPTS", "The prompts to sample."),
        }
        own = {
            "lora": schema.link("LORA_MODEL", "A LoRA from the graph, such as that of VADER Train LoRA."),
            "lora_name": schema.combo(
                lora_choices(), "A LoRA in models/loras or output/loras, where none is connected."
            ),
            "memory": schema.link(
                "VADER_MEMORY", "What is traded for memory, from Memory; without it, as its preset auto."
            ),
        }
        optional = {**own, **schema.inputs(Choice, SampleConfig, VideoConfig, plain=_PLAIN)}
        return {"required": required, "optional": optional, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = NO_LORA) -> bool | str:
        return schema.verdict(lambda: check_lora(lora_name))

    @classmethod
    def CHECK(cls, model: VideoModel, prompts: PromptSet, **values: Any) -> None:
        """Raises InputError for inputs that do not fit each other; the headless runner asks before any long work."""
        schema.read(VideoConfig, values).resolve(model)
        _chosen(prompts, schema.read(Choice, values))

    def sample(
        self,
        model: VideoModel,
        prompts: PromptSet,
        lora: dict[str, Tensor] | None = None,
        lora_name: str = NO_LORA,
        memory: MemoryConfig | None = None,
        unique_id: str | None = None,
        **values: Any,
    ) -> tuple[Tensor, PromptSet]:
        choice, config, video = (schema.read(part, values) for part in (Choice, SampleConfig, VideoConfig))
        chosen = _chosen(prompts, choice)
        warn_long(model, chosen.texts)
        with ExitStack() as stack:
            stack.enter_context(device.training_mode())
            weights = lora_file(lora_name) if lora is None else _own(lora)
            stack.enter_context(tricks(model, (), memory or automatic(), host.current().device()))
            stack.enter_context(device.workspace(residents(model)))
            show = stack.enter_context(host.progress("Sampling", unique_id))
            with applied(model, weights, choice.strength):
                videos = generate(model, chosen.texts, config, video, images=chosen.images, on_step=_watch(show))
        return to_images(videos), chosen


def lora_choices() -> list[str]:
    """What to offer where a LoRA file is chosen."""
    return [NO_LORA, *host.files("loras", SUFFIXES)]


def check_lora(name: str | None) -> None:
    """Raises InputError where there is no LoRA of that file name."""
    if name not in (None, NO_LORA):
        host.resolve("loras", str(name))


def lora_file(name: str) -> LoraWeights | None:
    """The LoRA of that file name, or None for "none". Raises InputError where it is missing or unreadable."""
    return None if name == NO_LORA else load_lora(host.resolve("loras", name))


def _own(lora: dict[str, Tensor]) -> LoraWeights:
    """A copy of a LORA_MODEL, ours or another node's, that is free of inference mode."""
    return LoraWeights({name: tensor.clone() for name, tensor in lora.items()}, getattr(lora, "metadata", None))


def _chosen(prompts: PromptSet, choice: Choice) -> PromptSet:
    train = [] if choice.which == "held_out" else rows(len(prompts.train), choice.limit)
    held_out = [] if choice.which == "train" else rows(len(prompts.held_out), choice.limit)
    if not train and not held_out:
        raise InputError(f"The prompts have none for which={choice.which}; choose another part or add prompts.")
    return prompts.select(train, held_out)


def _watch(show: Callable[..., None]) -> Callable[[int, int, Callable[[], Tensor]], None]:
    def on_step(done: int, total: int, picture: Callable[[], Tensor]) -> None:
        show(done, total, picture=picture)

    return on_step
