"""LoRAs that VADER trains on SVD, Wan and LTX-Video act in core ComfyUI as they do here.

Core's own model class, its own LoRA code, every key of the file in use; training starts from another program's LoRA.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from comfyui import core_cases
from comfyui.core_cases import PROMPTS, Case, denoised
from safetensors.torch import load_file, save_file
from tiny import Brightness
from torch import Tensor
from vader_nodes.tools import comfyui_main
from vader_nodes.tools.comfyui import find
from vader_nodes.vader_backend.align import Settings, align
from vader_nodes.vader_backend.generate import VideoConfig
from vader_nodes.vader_backend.lora import LoraWeights, applied, export
from vader_nodes.vader_backend.lora_formats import by_module
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.trainer import TrainOptions

WORKER = Path(__file__).with_name("core_lora_worker.py")
CASES: dict[str, Callable[[Path], Case]] = {
    "svd": core_cases.svd_case,
    "wan t2v": lambda folder: core_cases.wan_case(folder, image=False),
    "wan i2v": lambda folder: core_cases.wan_case(folder, image=True),
    "ltx": core_cases.ltx_case,
}
FOREIGN = "ltx in diffusers' layout"  # which core does not know
SIGMA = 0.6
RANK = 3
TOLERANCE = 1e-5  # of the largest value, both sides in float32


@dataclass(frozen=True)
class Outcome:
    """What both sides made of one LoRA.

    moved: how far training took each of its tensors. patched: the weights that core changed. warnings: core's words.
    """

    lora: LoraWeights
    moved: list[float]
    modules: list[str]
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    patched: list[str]
    warnings: list[str]


def random_lora(case: Case) -> dict[str, Tensor]:
    """A LoRA on every target, under the denoiser's names; no half of it is zero."""
    rng, halves = torch.Generator().manual_seed(2), {}
    for name in case.modules():
        weight = case.model.denoiser.get_parameter(f"{name}.weight")
        halves[f"{name}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=rng) / weight.shape[1] ** 0.5
        halves[f"{name}.lora_B.weight"] = 0.3 * torch.randn(len(weight), RANK, generator=rng)
    return halves


def trained(case: Case, folder: Path) -> tuple[dict[str, Tensor], LoraWeights]:
    """Two steps of VADER on another program's LoRA; its weights by module, and the file's content after training."""
    halves, video = random_lora(case), case.video
    start = LoraWeights({case.spelling(name): tensor for name, tensor in halves.items()})
    settings = Settings(
        vader.Config(sampling_steps=2, guidance=2.0),
        train=TrainOptions(steps=2, learning_rate=0.01, batch_size=2),
        video=VideoConfig(video.frames, video.height, video.width),
    )
    prompts = PromptSet(PROMPTS, (), case.images)
    return halves, align(case.model, Brightness(), prompts, settings, root=folder, start=start).lora


def prepare(case: Case, lora: LoraWeights, job: Path) -> dict[str, Tensor]:
    """Write a folder for the worker; what our denoiser makes of the same inputs, without and with the LoRA."""
    model = case.model
    images = torch.stack(case.images) if case.images else None
    cond = dict(model.encode(PROMPTS, case.video, images=images).positive)
    z = torch.randn(model.latent_shape(case.video, len(PROMPTS)), generator=torch.Generator().manual_seed(3))
    tensors, constants = case.core_inputs(z, cond)
    tensors["t"] = torch.full((len(tensors["x"]),), SIGMA)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, job / "inputs.safetensors")
    save_file(case.weights, job / "weights.safetensors")
    save_file(lora, job / "lora.safetensors")
    (job / "job.json").write_text(json.dumps({"family": case.family, "config": case.config, "constants": constants}))
    with torch.no_grad():
        base = denoised(model, z, SIGMA, cond)
        with applied(model, lora):
            return {"base": base, "lora": denoised(model, z, SIGMA, cond)}


def run_in_core(jobs: list[Path]) -> None:
    installation = find()
    assert installation is not None
    command = [str(installation.python), comfyui_main.__file__, str(WORKER), *map(str, jobs)]
    environment = {**os.environ, "PYTHONPATH": str(installation.folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All cases in one process of ComfyUI: its imports take longest."""
    made: dict[str, tuple[Case, Mapping[str, Tensor], LoraWeights]] = {}
    for name, build in CASES.items():
        case = build(tmp_path_factory.mktemp("model"))
        made[name] = (case, *trained(case, tmp_path_factory.mktemp("runs")))
    case, start, lora = made["ltx"]
    made[FOREIGN] = case, start, export(case.model, by_module(case.model, lora, ""), 1.0, {}, "diffusers")
    jobs = {name: tmp_path_factory.mktemp("job") for name in made}
    ours = {name: prepare(case, lora, jobs[name]) for name, (case, _, lora) in made.items()}
    run_in_core(list(jobs.values()))
    results = {}
    for name, (case, start, lora) in made.items():
        end = by_module(case.model, lora, "")
        moved = [float((end[key] - tensor).abs().max()) for key, tensor in start.items()]
        told = json.loads((jobs[name] / "result.json").read_text(encoding="utf-8"))
        theirs = load_file(jobs[name] / "result.safetensors")
        theirs = {key: _like(tensor, ours[name][key]) for key, tensor in theirs.items()}
        results[name] = Outcome(lora, moved, case.modules(), ours[name], theirs, **told)
    return results


def _like(found: Tensor, video_BCTHW: Tensor) -> Tensor:
    """Core's latents in our layout; its SVD has all frames in one batch."""
    return found if found.ndim == 5 else found.unflatten(0, (len(video_BCTHW), -1)).transpose(1, 2)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_core_uses_every_key(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.warnings == []
    assert len(outcome.modules) >= 16
    assert len(outcome.patched) == len(outcome.modules) == len(outcome.lora) / 2
    assert outcome.patched == sorted({f"{key.partition('.lora_')[0]}.weight" for key in outcome.lora})


@pytest.mark.parametrize("name", CASES)
def test_core_and_we_agree_without_and_with_the_lora(outcomes: dict[str, Outcome], name: str) -> None:
    ours, theirs = outcomes[name].ours, outcomes[name].theirs
    assert error(theirs["base"], ours["base"]) < TOLERANCE
    assert error(theirs["lora"], ours["lora"]) < TOLERANCE
    assert error(ours["lora"], ours["base"]) > 1000 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_training_went_on_from_the_other_programs_lora(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert all(tensor.any() for tensor in outcome.lora.values())
    assert all(distance < 0.1 for distance in outcome.moved)
    assert sum(distance > 1e-3 for distance in outcome.moved) > len(outcome.moved) / 2


def test_a_layout_that_core_does_not_know_would_be_seen(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[FOREIGN]
    assert outcome.patched == []
    assert {line.partition(": ")[2] for line in outcome.warnings} == set(outcome.lora)
    assert error(outcome.theirs["lora"], outcome.ours["lora"]) > 1000 * TOLERANCE
    assert error(outcome.ours["lora"], outcomes["ltx"].ours["lora"]) == 0
