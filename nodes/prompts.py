"""Prompts: typed, from a file of the input folder, or a built-in set."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

from ..vader_backend.models.base import VideoModel
from ..vader_backend.prompts import Config, PromptSet, build
from . import host, schema

_log = logging.getLogger("vader_nodes")


class VaderPrompts:
    DESCRIPTION = "Prompts to train on, and held-out prompts that no training sees."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("prompt list", "training prompts", "prompt dataset")
    FUNCTION = "read"
    RETURN_TYPES = ("VADER_PROMPTS", "STRING")
    RETURN_NAMES = ("prompts", "text")
    OUTPUT_TOOLTIPS = ("The prompts in their two parts.", "The training prompts, then the held-out ones, one per line.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": schema.inputs(Config)}

    @classmethod
    def VALIDATE_INPUTS(cls, source: str | None = "mini", text: str | None = "", file: str | None = "") -> bool | str:
        if source is None or text is None or file is None:
            return True
        return schema.verdict(lambda: build(Config(source=source, text=text, file=file), host.read_input))

    @classmethod
    def IS_CHANGED(cls, source: str = "mini", file: str = "", **_: Any) -> str:
        return hashlib.sha256(host.read_input(file).encode()).hexdigest() if source == "file" else ""

    def read(self, **values: Any) -> tuple[PromptSet, str]:
        prompts = build(schema.read(Config, values), host.read_input)
        return prompts, "\n".join((*prompts.train, *prompts.held_out))


def warn_long(model: VideoModel, prompts: Iterable[str]) -> None:
    """Warn of prompts that the text encoder does not take whole, and say what it leaves out."""
    for prompt in prompts:
        lost = model.truncated(prompt)
        if lost and host.is_main():
            _log.warning("The prompt %r is too long for %s; its end is not read: %r", prompt, model.name, lost)
