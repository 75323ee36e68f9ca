"""Prompts that take seconds, and what is looked at after a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_graph import SMALL, node
from vader_nodes.tools.comfyui import Server
from vader_nodes.tools.comfyui_client import Prompt, Run

TRAIN, LORA, SAMPLE, VIDEO = "5", "6", "7", "8"  # ids of nodes


def training(name: str, **settings: Any) -> Prompt:
    """Train on the tiny checkpoint and save the LoRA; `name` is the run folder's and the file's."""
    usual = {"steps": 2, "sampling_steps": 2, "rank": 2, "learning_rate": 0.01, "name": name, **SMALL}
    return {
        **_model_and_prompts(),
        "3": node("VaderRewardAesthetic"),
        TRAIN: node(
            "VaderTrainLoRA", model=["1", 0], prompts=["2", 0], reward=["3", 0], **{**usual, **settings}
        ),
        LORA: node("VaderSaveLoRA", lora=[TRAIN, 0], filename_prefix=f"loras/{name}"),
    }  # fmt: skip


def sampling(name: str, **settings: Any) -> Prompt:
    """Sample one video of the tiny checkpoint and save it."""
    usual = {"steps": 2, "limit": 1, "which": "train", **SMALL}
    return {
        **_model_and_prompts(),
        SAMPLE: node("VaderApplyLoRASample", model=["1", 0], prompts=["2", 0], **{**usual, **settings}),
        VIDEO: node("VaderSaveVideo", images=[SAMPLE, 0], prompts=[SAMPLE, 1], filename_prefix=f"videos/{name}"),
    }


def core(name: str) -> Prompt:
    """An ordinary workflow of ComfyUI's own nodes."""
    return {
        "1": node("EmptyImage", width=16, height=16, batch_size=1, color=255),
        "2": node("ImageScale", image=["1", 0], upscale_method="nearest-exact", width=32, height=32, crop="disabled"),
        "3": node("SaveImage", images=["2", 0], filename_prefix=f"core/{name}"),
    }


def checked(run: Run) -> Run:
    """The run, which must have ended well."""
    assert run.end is not None
    assert run.end.kind == "execution_success", run.error
    return run


def files(server: Server, run: Run) -> list[Path]:
    """The files that the nodes of a run show, or say that they wrote."""
    shown = [entry for output in run.outputs.values() for entry in output.get("images", ())]
    told = [text for output in run.outputs.values() for text in output.get("text", ())]
    return [
        *(server.base / entry["type"] / entry["subfolder"] / entry["filename"] for entry in shown),
        *(server.base / text.removeprefix("wrote ") for text in told if text.startswith("wrote ")),
    ]


def run_folder(server: Server, name: str) -> Path:
    """The folder of the only training run of that name."""
    (found,) = (server.output / "vader_runs").glob(f"{name}_*")
    return found


def steps(folder: Path) -> list[int]:
    """The optimizer steps in a run folder's metrics, in the order in which they were written."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["step"] for line in lines if "loss" in line]


def _model_and_prompts() -> Prompt:
    return {
        "1": node("VaderLoadVideoModel", checkpoint="tiny"),
        "2": node("VaderPrompts", source="mini", limit=4),
    }
