"""VADER Train LoRA: model, reward and prompts in; an aligned LoRA out."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from ..vader_backend.align import AlignResult, Settings, align, check_inputs
from ..vader_backend.evaluation.pictures import reward_curve
from ..vader_backend.generate import VideoConfig
from ..vader_backend.lora import LoraConfig
from ..vader_backend.memory.options import MemoryConfig
from ..vader_backend.models.base import VideoModel
from ..vader_backend.objectives.base import Validation
from ..vader_backend.objectives.vader import Config
from ..vader_backend.placement import Place
from ..vader_backend.prompts import PromptSet
from ..vader_backend.rewards.base import Reward
from ..vader_backend.runs import check_name
from ..vader_backend.trainer import Hooks, TrainOptions, TrainResult
from . import device, host, schema
from .live import Board
from .memory import automatic
from .prompts import warn_long
from .sample import NO_LORA, check_lora, lora_choices, lora_file

_PARTS = (TrainOptions, LoraConfig, Config, VideoConfig)
_PLAIN = (
    "steps", "batch_size", "grad_accumulation_steps", "learning_rate", "seed",
    "preview_every", "rank", "sampling_steps", "guidance", "truncation", "k",
)  # fmt: skip


class VaderTrainLoRA:
    DESCRIPTION = (
        "Trains a LoRA by the reward's gradient through the last K denoising steps (VADER). An interrupted run goes on "
        "where it stopped; a finished run of the same settings is reused."
    )
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("train lora", "reward gradient", "alignment", "vader", "fine-tune video model")
    FUNCTION = "train"
    HAS_INTERMEDIATE_OUTPUT = True  # a fresh page is told what the node showed, also when the result is cached
    RETURN_TYPES = ("LORA_MODEL", "LOSS_MAP", "STRING")
    RETURN_NAMES = ("lora", "loss_map", "report")
    OUTPUT_TOOLTIPS = (
        "The trained LoRA.",
        "The loss of every step, for Plot Loss Graph.",
        "What was reached, as text.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "model": schema.link("VADER_MODEL", "The model to align."),
            "reward": schema.link("VADER_REWARD", "What is maximised; it must be differentiable."),
            "prompts": schema.link("VADER_PROMPTS", "Training prompts; held-out ones are only previewed."),
        }
        own = {
            "name": schema.text(
                "vader", "Name of the run's folder in output/vader_runs; a hash of the settings follows."
            ),
            "existing_lora": schema.combo(lora_choices(), "A LoRA in models/loras to go on from; its rank is kept."),
        }
        memory = schema.link("VADER_MEMORY", "What is traded for memory, from Memory; without it, as its preset auto.")
        optional = {"memory": memory, **schema.inputs(*_PARTS, plain=_PLAIN), **own}
        hidden = {"unique_id": "UNIQUE_ID", "extra_pnginfo": "EXTRA_PNGINFO"}
        return {"required": required, "optional": optional, "hidden": hidden}

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        k: int | None = 1,
        sampling_steps: int | None = 0,
        truncation: str | None = "last_k",
        from_step: int | None = 0,
        name: str | None = "vader",
        existing_lora: str | None = NO_LORA,
    ) -> bool | str:
        def attempt() -> None:
            given = {"k": k, "sampling_steps": sampling_steps, "truncation": truncation, "from_step": from_step}
            schema.check_some(Config, **given)
            if sampling_steps and None not in given.values():
                schema.read(Config, given).check(sampling_steps)
            if name is not None:
                check_name(name, "name")
            check_lora(existing_lora)

        return schema.verdict(attempt)

    @classmethod
    def CHECK(
        cls, model: VideoModel, reward: Reward, prompts: PromptSet, memory: MemoryConfig | None = None, **values: Any
    ) -> None:
        """Raises InputError for inputs that do not fit each other; the headless runner asks before any long work."""
        check_inputs(model, reward, prompts, settings_of(values), memory or automatic())

    def train(
        self,
        model: VideoModel,
        reward: Reward,
        prompts: PromptSet,
        name: str = "vader",
        existing_lora: str = NO_LORA,
        memory: MemoryConfig | None = None,
        unique_id: str | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        **values: Any,
    ) -> dict[str, Any]:
        settings = settings_of(values)
        start = lora_file(existing_lora)
        warn_long(model, prompts.train)
        place = Place(host.current().device(), device.workspace)
        board = Board(unique_id, _workflow_id(extra_pnginfo), settings.train.steps)
        with board.open(), device.training_mode(), host.progress("Training", unique_id, plain=True) as show:
            result = align(
                model, reward, prompts, settings,
                root=host.runs(), name=name, start=start, hooks=_hooks(show, board),
                memory=memory or automatic(), place=place,
            )  # fmt: skip
        report = _report(result)
        board.end(report, result.rewards, result.held_out, result.folder)
        loss_map = {"loss": result.losses}
        return {"ui": {"images": _curve(result), "text": [report]}, "result": (result.lora, loss_map, report)}


def settings_of(values: dict[str, Any]) -> Settings:
    """The settings among a node's inputs. Raises InputError where one is out of range."""
    train, lora, objective, video = (schema.read(part, values) for part in _PARTS)
    return Settings(objective, "vader", lora, train, video)


def _workflow_id(extra_pnginfo: dict[str, Any] | None) -> str | None:
    """The id that the front end gives each workflow; a posted prompt may have none."""
    return ((extra_pnginfo or {}).get("workflow") or {}).get("id")


def _hooks(show: Callable[..., None], board: Board) -> Hooks:
    """Progress and previews on the node."""

    def progress(result: TrainResult, total: int, metrics: dict[str, float]) -> None:
        board.progress(result, total)
        show(result.step, total, board.text)

    def preview(done: int, validation: Validation) -> None:
        board.preview(done, validation)
        show(done, board.total, board.text)

    return Hooks(progress=progress, preview=preview, on_sample_step=host.cancel)


def _report(result: AlignResult) -> str:
    rewards = result.rewards
    share = max(1, len(rewards) // 10)
    first, last = (fmean(part) if part else float("nan") for part in (rewards[:share], rewards[-share:]))
    lines = [
        f"{len(result.losses)} steps{' of a finished run, reused' if result.reused else ''}",
        f"reward {first:.4g} -> {last:.4g} (means of the first and last {share} steps)",
        f"run folder {result.folder.name}",
    ]
    if result.skipped:
        lines.insert(1, f"{result.skipped} steps skipped for a gradient that was not finite")
    errors = [line["rollout_error"] for line in result.metrics if line.get("rollout_error") is not None]
    if errors:
        lines.insert(2, f"videos off by {fmean(errors):.1%} for cached predictions (root mean square, of latents)")
    return "\n".join(lines)


def _curve(result: AlignResult) -> list[dict[str, str]]:
    """The reward curve in the run folder, as ComfyUI shows it; one that is there is kept."""
    path = result.folder / "reward_curve.png"
    if host.is_main() and result.rewards and not (result.reused and path.exists()):
        reward_curve(path, range(1, len(result.rewards) + 1), result.rewards, result.held_out)
    return [host.shown(path)] if path.exists() else []
