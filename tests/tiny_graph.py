"""A checkpoint of random weights, a reward node and workflows that take seconds."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vader_nodes.vader_backend.types import FrameSpec

Workflow = dict[str, dict[str, Any]]
SMALL = {"frames": 3, "height": 8, "width": 8}
QUICK: dict[str, dict[str, Any]] = {  # with which an embedded workflow takes seconds
    "VaderTrainLoRA": {
        "steps": 2, "batch_size": 1, "grad_accumulation_steps": 1, "sampling_steps": 2, "k": 1, "from_step": 0,
        "preview_every": 1,
    },
    "VaderApplyLoRASample": {"steps": 2, "limit": 1},
    "VaderCompareVideos": {"limit": 1},
}  # fmt: skip


class Redness:
    """A reward without weights."""

    name = "redness"
    differentiable = True
    frames = FrameSpec("all")
    description = {"kind": "redness"}

    def networks(self) -> list[Any]:
        return []

    def __call__(self, video_BTCHW: Tensor, prompts: Any, indices: Any) -> Tensor:
        return video_BTCHW[:, :, 0].mean((1, 2, 3))

    def parts(self, video_BTCHW: Tensor, prompts: Any, indices: Any) -> dict[str, Tensor]:
        return {self.name: self(video_BTCHW, prompts, indices)}


class RednessNode:
    DESCRIPTION = "Redness."
    FUNCTION = "make"
    RETURN_TYPES = ("VADER_REWARD",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Redness]:
        return (Redness(),)


def story() -> Workflow:
    """The whole story on the tiny checkpoint: base, train, aligned, score, compare, save."""
    sample = {"model": ["1", 0], "prompts": ["2", 0], "steps": 2, "limit": 2, **SMALL}
    return {
        "1": node("VaderLoadVideoModel", checkpoint="tiny"),
        "2": node("VaderPrompts", source="mini", limit=4),
        "3": node("Redness"),
        "4": node("VaderApplyLoRASample", **sample),
        "5": node(
            "VaderTrainLoRA", model=["1", 0], reward=["3", 0], prompts=["2", 0],
            steps=2, sampling_steps=2, preview_every=1, rank=2, learning_rate=0.01, **SMALL,
        ),
        "6": node("VaderApplyLoRASample", lora=["5", 0], **sample),
        "7": node("VaderScoreVideo", images=["6", 0], prompts=["6", 1], reward=["3", 0], baseline=["4", 0]),
        "8": node("VaderCompareVideos", before=["4", 0], after=["6", 0], prompts=["6", 1]),
        "9": node("VaderSaveVideo", images=["8", 0]),
        "10": node("VaderSaveLoRA", lora=["5", 0]),
    }  # fmt: skip


def quick(data: Workflow) -> Workflow:
    """A workflow with the settings of QUICK."""
    return {
        key: {**entry, "inputs": entry["inputs"] | QUICK.get(entry["class_type"], {})} for key, entry in data.items()
    }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
