"""Memory: what is traded for memory when a LoRA is trained or videos are sampled."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..vader_backend.memory.options import PRESETS, MemoryConfig, preset_for
from . import host, schema

AUTO, CUSTOM = "auto", "custom"


class VaderMemory:
    DESCRIPTION = (
        "Makes training and sampling fit a card. A preset fills in the settings below; change one and the preset is "
        "custom. No preset touches K, stop_input or the frames."
    )
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("vram", "low memory", "out of memory", "offload", "block swap", "gradient checkpointing")
    FUNCTION = "choose"
    RETURN_TYPES = ("VADER_MEMORY",)
    RETURN_NAMES = ("memory",)
    OUTPUT_TOOLTIPS = ("For VADER Train LoRA, Apply LoRA Sample and Estimate Memory.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kind, options = schema.combo(
            [AUTO, *PRESETS, CUSTOM],
            "auto: by this machine's card; otherwise the preset for a card of that size. custom: the settings below.",
        )
        filled = {name: asdict(config) for name, config in (*PRESETS.items(), (AUTO, automatic()))}
        preset = (kind, {**options, "vader_presets": filled})  # for the front end, which shows what a preset sets
        return {"required": {"preset": preset}, "optional": schema.inputs(MemoryConfig)}

    @classmethod
    def VALIDATE_INPUTS(cls, weight_storage: str | None = None) -> bool | str:
        return schema.verdict(lambda: schema.check_some(MemoryConfig, weight_storage=weight_storage))

    def choose(self, preset: str = AUTO, **values: Any) -> dict[str, Any]:
        own = schema.read(MemoryConfig, values)
        config = {**PRESETS, AUTO: automatic(), CUSTOM: own}[preset]
        return {"ui": {"text": [f"{preset}: {config.chosen()}"]}, "result": (config,)}


def automatic() -> MemoryConfig:
    """What the preset "auto" stands for on this machine."""
    return PRESETS[preset_for(host.current().device())]
