"""Estimate Memory: what a training will need, before it runs; and the same for a whole workflow file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ..vader_backend import registry
from ..vader_backend.align import Settings
from ..vader_backend.config import InputError
from ..vader_backend.estimate import ALLOWANCE, PHASES, PREVIEW, Estimate, estimate
from ..vader_backend.generate import VideoConfig
from ..vader_backend.lora import LoraConfig
from ..vader_backend.memory.options import PRESETS, MemoryConfig
from ..vader_backend.mini.files import PREFIX
from ..vader_backend.models.base import VideoModel
from ..vader_backend.objectives.vader import Config
from ..vader_backend.rewards.base import Reward
from ..vader_backend.trainer import TrainOptions
from . import device, graph, host, schema
from .load import VaderLoadVideoModel
from .memory import automatic
from .rewards import RewardNode
from .train import VaderTrainLoRA, settings_of
from .workflow import Node, is_link

GIVEN = "as connected"
CARDS = (12, 16, 24, 48, 80)
_TRAINING = ("batch_size", "optimizer", "ema_decay", "preview_every")  # of TrainOptions: what memory depends on
_PLAIN = ("batch_size", "k", "truncation")


class VaderEstimateMemory:
    DESCRIPTION = (
        "Predicts the device memory of a VADER training with each memory preset, by running a step on tensors without "
        "content: on any machine, in a minute or so."
    )
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("vram estimate", "memory estimator", "will it fit", "out of memory")
    FUNCTION = "estimate"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The table, as text.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "model": schema.link("VADER_MODEL", "The model to align."),
            "reward": schema.link("VADER_REWARD", "What would be maximised."),
        }
        training = schema.inputs(TrainOptions, plain=_PLAIN)
        optional = {
            "memory": schema.link("VADER_MEMORY", "Settings to estimate beside the presets."),
            **{name: training[name] for name in _TRAINING},
            **schema.inputs(Config, LoraConfig, VideoConfig, plain=_PLAIN),
        }
        return {"required": required, "optional": optional, "hidden": {"unique_id": "UNIQUE_ID"}}

    def estimate(
        self,
        model: VideoModel,
        reward: Reward,
        memory: MemoryConfig | None = None,
        unique_id: str | None = None,
        **values: Any,
    ) -> dict[str, Any]:
        settings = settings_of(values)
        with device.training_mode(), host.progress("Estimating", unique_id) as show:
            report = table(model, reward, settings, memory, show)
        return {"ui": {"text": [report]}, "result": (report,)}


def table(
    model: VideoModel,
    reward: Reward,
    settings: Settings,
    memory: MemoryConfig | None,
    show: Callable[..., None] = lambda *_: None,
) -> str:
    """A line per preset: the peak, that of each part of the step, and the smallest card that has the room."""
    rows = {**PRESETS, **({GIVEN: memory} if memory is not None else {})}
    found: dict[str, Estimate] = {}
    for done, (name, config) in enumerate(rows.items()):
        show(done, len(rows), name)
        found[name] = estimate(model, reward, settings, config)
    show(len(rows), len(rows), "")
    video = settings.video.resolve(model)
    head = f"{model.name}, {video.width}x{video.height}, {video.frames} frames: GB on the device, one training step"
    previewed = any(PREVIEW in one.phases for one in found.values())
    phases = [*PHASES, PREVIEW] if previewed else PHASES
    columns = ["preset", "peak", *phases, "main memory", "card"]
    lines = [columns, *(_row(name, one, phases) for name, one in found.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = [f"{name}: {config.chosen()}" for name, config in rows.items()]
    end = f"card: the smallest with {ALLOWANCE - 1:.0%} to spare, for what CUDA takes besides the tensors."
    return "\n".join([head, *text, "", *notes, end])


def _row(name: str, found: Estimate, phases: Sequence[str]) -> list[str]:
    card = next((f"{size} GB" for size in CARDS if found.fits(size)), "none")
    parts = [found.peak, *(found.phases.get(phase, 0) for phase in phases), found.host]
    return [name, *(f"{size / 1e9:.2f}" for size in parts), card]


def estimate_workflow(nodes: Mapping[str, Node], classes: Mapping[str, type[Any]], say: Callable[[str], None]) -> None:
    """Say the table of every Train node of a workflow. Checkpoints that are known by name need not be there.

    Raises:
        InputError: there is no Train node, or a checkpoint is neither known nor there.
    """
    trains = [node for node in nodes.values() if node.class_type == VaderTrainLoRA.__name__]
    if not trains:
        raise InputError("The workflow has no VADER Train LoRA, so there is nothing to estimate; name another file.")
    for node in graph.order(nodes, classes):
        if node in trains:
            say(f"{node.label}")
            values = {key: _made(value, nodes, classes) for key, value in node.inputs.items() if key != "prompts"}
            model, reward, memory = (values.pop(key, None) for key in ("model", "reward", "memory"))
            say(table(model, reward, settings_of(values), memory or automatic()) + "\n")


def _made(value: Any, nodes: Mapping[str, Node], classes: Mapping[str, type[Any]]) -> Any:
    """What an input stands for, its links followed."""
    if not is_link(value):
        return value
    node = nodes[value[0]]
    values = {key: _made(given, nodes, classes) for key, given in node.inputs.items()}
    cls = classes[node.class_type]
    if cls is VaderLoadVideoModel:
        return _model(values)
    if issubclass(cls, RewardNode):
        return _reward(registry.load("rewards", cls.key), cls, values)
    outcome = getattr(cls(), cls.FUNCTION)(**values)
    return (outcome["result"] if isinstance(outcome, dict) else outcome)[value[1]]


def _model(values: Mapping[str, Any]) -> VideoModel:
    """The published network that the checkpoint's name tells, without weights; else the checkpoint itself."""
    name = str(values.get("hub_id") or values["checkpoint"])
    known = None if name.startswith(PREFIX) else full_size(name)
    if known is None:
        return VaderLoadVideoModel().load(**values)[0]
    module, size = known
    return module.full_size(size, schema.read(module.Config, {**values, "folder": ""}))


def full_size(name: str) -> tuple[ModuleType, str] | None:
    """The family, and the name there, of the published checkpoint that a name tells: by the longest fragment."""
    found = [
        (len(fragment), family, size)
        for family in registry.names("models")
        for size, fragments in registry.load("models", family).FULL_SIZE.items()
        for fragment in fragments
        if fragment in name.lower()
    ]
    if not found:
        return None
    _, family, size = max(found)
    return registry.load("models", family), size


def _reward(module: ModuleType, cls: type[RewardNode], values: dict[str, Any]) -> Reward:
    """The reward itself where its weights are there; else its published networks without weights."""
    try:
        return cls().make(**values)[0]
    except InputError:
        if not hasattr(module, "full_size"):
            raise
        return module.full_size(schema.read(module.Config, values))
