"""One whole alignment: find or start the run folder, train, write the LoRA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import require_space
from .compiled_rollout import compiled_rollout
from .config import InputError, check
from .generate import VideoConfig
from .loading import fingerprint
from .lora import LoraConfig, LoraWeights, attached, export
from .memory.options import AS_LOADED, MemoryConfig, tricks
from .models.base import VideoModel
from .objectives.base import Validation
from .placement import Place, residents
from .prompts import PromptSet
from .registry import load
from .rewards.base import Reward
from .runs import RunFolder
from .trainer import Hooks, TrainOptions, TrainResult, new_accelerator, train


@dataclass(frozen=True)
class Settings:
    """Everything about a run but model, reward and prompts.

    objective: the Config of the method, a file of objectives/.
    """

    objective: Any
    method: str = "vader"
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainOptions = field(default_factory=TrainOptions)
    video: VideoConfig = field(default_factory=VideoConfig)

    def check(self) -> None:
        """Raises InputError where a value is outside its range or not finite."""
        for part in (self.objective, self.lora, self.train, self.video):
            check(part)
        self.train.check()


@dataclass(frozen=True)
class AlignResult:
    """lora: what was trained. reused: whether a finished run of the same configuration was found.

    losses, rewards: one value per step. held_out: (step, mean reward of the previewed prompts). metrics: the lines of
    metrics.jsonl.
    """

    lora: LoraWeights
    losses: list[float]
    rewards: list[float]
    held_out: list[tuple[int, float]]
    skipped: int
    folder: Path
    reused: bool
    metrics: list[dict[str, float]]


def align(
    model: VideoModel,
    reward: Reward,
    prompts: PromptSet,
    settings: Settings,
    *,
    root: Path,
    name: str = "vader",
    start: LoraWeights | None = None,
    hooks: Hooks | None = None,
    memory: MemoryConfig | None = None,
    place: Place | None = None,
) -> AlignResult:
    """Train a LoRA, or return that of a finished run; an interrupted run of the same configuration goes on.

    Args:
        root: folder of all runs; the run's own is `<root>/<name>_<configuration hash>`.
        start: a LoRA to start from.
        memory: what is traded for memory; a run may go on with other tricks, where they leave the result as it is.
        place: where to train; by default where the networks lie.

    Raises:
        InputError: a setting, prompt, reward or LoRA does not fit; nothing has been written then.
        TrainingError: training diverged.
    """
    hooks, memory, place = hooks or Hooks(), memory or MemoryConfig(), place or Place(model.device)
    check_inputs(model, reward, prompts, settings, memory)
    video = settings.video.resolve(model)
    shape = settings.lora.resolve(model)
    with ExitStack() as stack:
        stack.enter_context(compiled_rollout(model) if settings.train.compile_rollout else nullcontext())
        stack.enter_context(tricks(model, reward.networks(), memory, place.device))
        stack.enter_context(place.workspace(residents(model)))
        objective = load("objectives", settings.method).build(
            settings.objective, model, reward, prompts, video,
            seed=settings.train.seed, on_step=hooks.on_sample_step,
        )  # fmt: skip
        stack.enter_context(place.workspace(reward.networks()))  # only now: a large text encoder had the room
        accelerator = new_accelerator(model.device)
        parameters = stack.enter_context(attached(model, settings.lora, seed=settings.train.seed, start=start))
        configuration = _configuration(model, reward, prompts, settings, start, memory, accelerator.num_processes)
        folder = RunFolder(root, name, configuration, write=accelerator.is_main_process)
        found = folder.finished()
        if found is not None:
            return _result(found[0], found[1], folder, reused=True)
        require_space(root, _footprint(parameters))
        accelerator.wait_for_everyone()
        result, tensors = train(
            parameters, objective, settings.train,
            learning_rate=settings.train.learning_rate or model.defaults.learning_rate,
            accelerator=accelerator, hooks=_recording(hooks, folder, video.fps), checkpoints=folder.checkpoints,
            loss_scaling=next(model.denoiser.parameters()).dtype == torch.float16,
        )  # fmt: skip
    scale = shape.alpha / shape.rank if start is None else 1.0
    curves = _curves(result)
    lora = export(model, tensors, scale, _metadata(model, reward, settings, _rank(parameters), folder.hash))
    if not result.stopped:
        folder.finish(lora, curves)
    accelerator.wait_for_everyone()
    return _result(lora, curves, folder, reused=False)


def check_inputs(
    model: VideoModel, reward: Reward, prompts: PromptSet, settings: Settings, memory: MemoryConfig
) -> None:
    """Refuse what cannot be trained, in no time.

    Raises:
        InputError: a setting, prompt or reward does not fit.
    """
    settings.check()
    if settings.train.compile_rollout and (memory.resident_gb or memory.weight_storage != AS_LOADED):
        raise InputError(
            "compile_rollout needs all of the denoiser's weights on the device, as loaded; turn it off, or connect a "
            f"Memory node with preset custom, resident_gb 0 and weight_storage {AS_LOADED}."
        )
    settings.video.resolve(model)
    load("objectives", settings.method).check_inputs(settings.objective, model, reward, prompts)


def _curves(result: TrainResult) -> dict[str, Any]:
    """What is kept of a result beside the LoRA."""
    kept = asdict(result)
    return {"steps": kept.pop("step"), **{name: kept[name] for name in ("losses", "rewards", "held_out", "skipped")}}


def _result(lora: LoraWeights, curves: dict[str, Any], folder: RunFolder, *, reused: bool) -> AlignResult:
    held_out = [(int(step), float(value)) for step, value in curves["held_out"]]
    return AlignResult(
        lora, curves["losses"], curves["rewards"], held_out, curves["skipped"], folder.path, reused, folder.metrics()
    )


def _recording(hooks: Hooks, folder: RunFolder, fps: float) -> Hooks:
    """The hooks, which also write the metrics and previews of the run folder."""
    rewound = False

    def log(step: int, metrics: dict[str, float]) -> None:
        nonlocal rewound
        if not rewound:  # what a killed process wrote after its last checkpoint comes once more
            folder.rewind(step - 1)
            rewound = True
        folder.log(step, metrics)

    def progress(result: TrainResult, total: int, metrics: dict[str, float]) -> None:
        log(result.step, metrics)
        hooks.progress(result, total, metrics)

    def preview(done: int, validation: Validation) -> None:
        file = folder.preview(done, validation.video_BTCHW, fps)
        log(done, {"held_out_reward": float(validation.rewards.mean())})
        hooks.preview(done, replace(validation, file=file))

    return replace(hooks, progress=progress, preview=preview)


def _configuration(
    model: VideoModel,
    reward: Reward,
    prompts: PromptSet,
    settings: Settings,
    start: LoraWeights | None,
    memory: MemoryConfig,
    processes: int,
) -> dict[str, Any]:
    """All that decides the result of a run, as JSON."""
    others = [(name, network) for name, network in model.parts().items() if name != "denoiser"]
    return {
        "model": {
            "name": model.name,
            "settings": dict(model.settings),
            "weights": {"denoiser": model.fingerprint, **{name: fingerprint(network) for name, network in others}},
        },
        "precision": str(next(model.denoiser.parameters()).dtype).removeprefix("torch."),
        "reward": reward.description,
        "prompts": {
            "train": prompts.train,
            "held_out": prompts.held_out,
            "images": _digest(dict(enumerate(prompts.images))),
        },
        "settings": asdict(settings),
        "memory": memory.changes(model),
        "start": _digest(start),
        "processes": processes,
    }


def _rank(parameters: dict[str, nn.Parameter]) -> int:
    return max(len(p) for name, p in parameters.items() if name.endswith(".lora_A.weight"))


def _footprint(parameters: dict[str, nn.Parameter]) -> int:
    """Bytes that a run may come to take: three checkpoints of weights, their average and two moments, and previews."""
    return 3 * 4 * 4 * sum(p.numel() for p in parameters.values()) + 20_000_000


def _digest(tensors: Mapping[Any, Tensor] | None) -> str | None:
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _metadata(model: VideoModel, reward: Reward, settings: Settings, rank: int, run_hash: str) -> dict[str, str]:
    """What a LoRA file says of itself."""
    return {
        "format": "pt",
        "base_model": model.name,
        "base_fingerprint": model.fingerprint,
        "method": settings.method,
        "rewards": json.dumps(reward.description, sort_keys=True),
        "steps": str(settings.train.steps),
        "k": str(getattr(settings.objective, "k", "")),
        "rank": str(rank),
        "configuration_hash": run_hash,
    }
