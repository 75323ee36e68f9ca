"""One node per registered reward, made from its Config, and the two that combine and reshape rewards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ..vader_backend import registry
from ..vader_backend.config import InputError, option
from ..vader_backend.mini.files import PREFIX, weights
from ..vader_backend.rewards.base import Combined, Reward, Towards
from . import device, host, schema
from .load import download

_HUB = "hub: "
_SLOTS = (1, 2, 3, 4)


class RewardNode:
    """Base of the generated nodes: `key` is the reward's file name."""

    key: ClassVar[str]
    CATEGORY = schema.CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("VADER_REWARD",)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = ("The reward: a score per video, higher is better.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        module = registry.load("rewards", cls.key)
        settings = schema.inputs(module.Config, combos=_checkpoints(module))
        return {"required": {}, "optional": settings, "hidden": {"unique_id": "UNIQUE_ID"}}

    def make(self, unique_id: str | None = None, **values: Any) -> tuple[Reward]:
        module = registry.load("rewards", self.key)
        with device.training_mode():
            return (module.build(schema.read(module.Config, values), partial(locate, node_id=unique_id)),)


class MissingReward(RewardNode):
    """Stands in for a reward that cannot be imported for want of a Python package: the other nodes still work."""

    UNAVAILABLE: ClassVar[str]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {}, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def VALIDATE_INPUTS(cls, unique_id: str | None = None) -> bool | str:
        # ComfyUI tells a refusal at each input that is named here, so there has to be one.
        return f"The reward {cls.key} is not available: {cls.UNAVAILABLE}. Install what is missing, and start anew."

    def make(self, unique_id: str | None = None, **values: Any) -> tuple[Reward]:
        raise InputError(str(self.VALIDATE_INPUTS()))


def reward_nodes() -> dict[str, type[RewardNode]]:
    """A node class per registered reward, by class name: VaderRewardAesthetic, ..."""
    return {cls.__name__: cls for cls in map(_node, registry.names("rewards"))}


def title(key: str) -> str:
    """How a reward is called on the canvas: its module's TITLE, else its file name."""
    module = _module(key)
    return getattr(module, "TITLE", key.replace("_", " ").title())


def locate(name: str, node_id: str | None = None) -> Path:
    """The file or folder of a reward's weights: embedded, from the hub, or in models/reward_models.

    Raises:
        InputError: there is none of this name, or it cannot be downloaded.
    """
    if name.startswith(PREFIX):
        return weights(name.removeprefix(PREFIX))
    if name.startswith(_HUB):
        return download(name.removeprefix(_HUB), node_id, host.REWARD_MODELS)
    return host.resolve(host.REWARD_MODELS, name)


@dataclass(frozen=True)
class Weights:
    """Weights of a sum of rewards."""

    weight_1: float = option(1.0, "Weight of reward_1; 0 only reports it.", low=-1000.0, high=1000.0, step=0.1)
    weight_2: float = option(1.0, "Weight of reward_2; 0 only reports it.", low=-1000.0, high=1000.0, step=0.1)
    weight_3: float = option(1.0, "Weight of reward_3; 0 only reports it.", low=-1000.0, high=1000.0, step=0.1)
    weight_4: float = option(1.0, "Weight of reward_4; 0 only reports it.", low=-1000.0, high=1000.0, step=0.1)


class VaderCombineRewards:
    DESCRIPTION = "A weighted sum of up to four rewards. Each sees the frames it asks for; a weight of 0 only reports."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("sum rewards", "weighted reward", "mix rewards")
    FUNCTION = "combine"
    RETURN_TYPES = ("VADER_REWARD",)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = ("The weighted sum; reports show each part unweighted.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        links = {f"reward_{i}": schema.link("VADER_REWARD", f"Reward number {i}.") for i in _SLOTS}
        first = {"reward_1": links.pop("reward_1")}
        return {"required": first, "optional": {**links, **schema.inputs(Weights)}}

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        weight_1: float | None = 1.0, weight_2: float | None = 1.0,
        weight_3: float | None = 1.0, weight_4: float | None = 1.0,
        reward_2: Any = False, reward_3: Any = False, reward_4: Any = False,
    ) -> bool | str:  # fmt: skip
        # During validation a linked reward is None; one that is not linked keeps its default.
        linked = (True, reward_2 is None, reward_3 is None, reward_4 is None)
        given = (weight_1, weight_2, weight_3, weight_4)

        def attempt() -> None:
            schema.check_some(Weights, **{f"weight_{i}": weight for i, weight in zip(_SLOTS, given, strict=True)})
            if all(weight == 0 for weight, used in zip(given, linked, strict=True) if used):
                raise InputError("The weights of all connected rewards are zero; set at least one of them above 0.")

        return schema.verdict(attempt)

    def combine(self, **values: Any) -> tuple[Reward]:
        given = schema.read(Weights, values)
        used = [i for i in _SLOTS if values.get(f"reward_{i}") is not None]
        return (Combined([values[f"reward_{i}"] for i in used], [getattr(given, f"weight_{i}") for i in used]),)


@dataclass(frozen=True)
class Target:
    """How a reward is turned into a distance to a target."""

    target: float = option(10.0, "The score that is aimed at.", low=-10000.0, high=10000.0, step=0.1)
    weight: float = option(0.1, "Factor of the distance; the paper takes 0.1 for aesthetic.", low=0.0, high=1000.0)
    form: str = option(
        "distance",
        "distance: also scores above the target are pulled back to it; hinge: they are left alone.",
        choices=("distance", "hinge"),
    )


class VaderRewardTowards:
    DESCRIPTION = "Turns a reward into minus its weighted distance to a target: the form of the published losses."
    CATEGORY = schema.CATEGORY
    SEARCH_ALIASES = ("target reward", "distance to target", "hinge reward")
    FUNCTION = "wrap"
    RETURN_TYPES = ("VADER_REWARD",)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = ("The reward that grows as the score comes near the target.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        wrapped = schema.link("VADER_REWARD", "The reward whose score is steered to the target.")
        return {"required": {"reward": wrapped}, "optional": schema.inputs(Target)}

    def wrap(self, reward: Reward, **values: Any) -> tuple[Reward]:
        aim = schema.read(Target, values)
        return (Towards(reward, aim.target, aim.weight, aim.form),)  # type: ignore[arg-type]


def _node(key: str) -> type[RewardNode]:
    module = _module(key)
    name = "VaderReward" + "".join(word.capitalize() for word in key.split("_"))
    told = {"key": key, "SEARCH_ALIASES": (f"{key.replace('_', ' ')} reward", "reward model", "score")}
    if isinstance(module, ImportError):
        reason = str(module).strip().rstrip(".")
        return type(name, (MissingReward,), {**told, "DESCRIPTION": f"Not available: {reason}.", "UNAVAILABLE": reason})
    about = (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")
    return type(name, (RewardNode,), {**told, "DESCRIPTION": about})


def _module(key: str) -> ModuleType | ImportError:
    """A reward's module, or why it cannot be imported here: a package of someone else's is missing."""
    try:
        return registry.load("rewards", key)
    except ImportError as error:
        if str(error.name).startswith(str(__package__).split(".")[0]):
            raise
        return error


def _checkpoints(module: ModuleType) -> dict[str, list[str]]:
    """What to offer for fields that name weights: files or folders.

    Such fields have embedded weights as their default, or stand in the module's MARKERS with the file by which
    their folder is known, "" for a single file; several of them where either will do. Its HUB names repositories for
    some fields, which are downloaded once, into models/reward_models.
    """
    found: dict[str, list[str]] = {}
    markers: dict[str, str | tuple[str, ...]] = getattr(module, "MARKERS", {})
    repositories: dict[str, tuple[str, ...]] = getattr(module, "HUB", {})
    for field in dataclasses.fields(module.Config):
        name = str(field.default)
        if field.name in markers or name.startswith(PREFIX):
            marker = markers.get(field.name, "" if Path(name).suffix in host.WEIGHTS else "config.json")
            local = _named([marker] if isinstance(marker, str) else marker)
            remote = [f"{_HUB}{repository}" for repository in repositories.get(field.name, ())]
            found[field.name] = list(dict.fromkeys([name, *local, *remote]))
    return found


def _named(markers: Collection[str]) -> list[str]:
    """Folders known by a marker, and for "" single files outside of these."""
    folders = [name for marker in markers if marker for name in host.checkpoints(host.REWARD_MODELS, marker)]
    single = host.files(host.REWARD_MODELS) if "" in markers else []
    return [*folders, *(name for name in single if name.rpartition("/")[0] not in folders)]
