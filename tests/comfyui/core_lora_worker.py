"""Run by test_core_lora.py within ComfyUI: core's own model classes, with LoRAs that core's own code applies.

comfyui_main.py core_lora_worker.py JOB...    each JOB is a folder that holds
    job.json               family: class in comfy.supported_models; config: what core cannot read off small weights;
                           constants: arguments of apply_model that are no tensors
    weights.safetensors    the denoiser under core's keys
    inputs.safetensors     the arguments of apply_model
    lora.safetensors       the LoRA
and is given result.safetensors (clean latents without and with the LoRA) and result.json (the weights that the LoRA
changed, and what core warned of).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.cli_args

comfy.cli_args.args.cpu = True  # before anything asks which device there is

import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

_CPU = torch.device("cpu")


def core_model(family: str, config: Mapping[str, Any], weights: dict[str, Tensor]) -> Any:
    """Core's model of the given weights; every one of them must have its place, and every place its weight."""
    found = comfy.model_detection.detect_unet_config(weights, "")
    settings = getattr(comfy.supported_models, family)({**found, **config})
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model(weights)
    model.diffusion_model.load_state_dict(weights)
    return model


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning or worse."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger().addHandler(listener)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(listener)


@torch.no_grad()
def denoised(model: Any, inputs: Mapping[str, Tensor], constants: Mapping[str, Any]) -> Tensor:
    return model.apply_model(**inputs, **constants).contiguous()


def run(job: Path) -> None:
    """Work on one folder."""
    given = json.loads((job / "job.json").read_text(encoding="utf-8"))
    inputs, lora = load_file(job / "inputs.safetensors"), load_file(job / "lora.safetensors")
    model = core_model(given["family"], given["config"], load_file(job / "weights.safetensors"))
    base = denoised(model, inputs, given["constants"])
    with warnings() as told:
        patcher = comfy.model_patcher.ModelPatcher(model, _CPU, _CPU)
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
        patched.patch_model(device_to=_CPU)
    save_file({"base": base, "lora": denoised(model, inputs, given["constants"])}, job / "result.safetensors")
    (job / "result.json").write_text(json.dumps({"patched": sorted(patched.patches), "warnings": told}))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
