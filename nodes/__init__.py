"""The nodes, as ComfyUI looks for them."""

from __future__ import annotations

from typing import Any

from . import host, live
from .estimate import VaderEstimateMemory
from .evaluate import VaderScoreVideo
from .load import VaderLoadVideoModel
from .memory import VaderMemory
from .prompts import VaderImagePrompts, VaderPrompts
from .reward_table import VaderRewardTable
from .rewards import VaderCombineRewards, VaderRewardTowards, reward_nodes, title
from .sample import VaderApplyLoRASample
from .save import VaderCompareVideos, VaderSaveLoRA, VaderSaveVideo
from .train import VaderTrainLoRA

host.register({live.ROUTE: live.boards})

_REWARDS = reward_nodes()
_NAMED: dict[str, type[Any]] = {
    "Load Video Model": VaderLoadVideoModel,
    "Prompts": VaderPrompts,
    "Image Prompts": VaderImagePrompts,
    **{f"Reward ({title(node.key)})": node for node in _REWARDS.values()},
    "Combine Rewards": VaderCombineRewards,
    "Reward Towards Target": VaderRewardTowards,
    "Memory": VaderMemory,
    "Estimate Memory": VaderEstimateMemory,
    "VADER Train LoRA": VaderTrainLoRA,
    "Apply LoRA Sample": VaderApplyLoRASample,
    "Score Video": VaderScoreVideo,
    "Reward Table": VaderRewardTable,
    "Compare Videos": VaderCompareVideos,
    "Save LoRA": VaderSaveLoRA,
    "Save Videos": VaderSaveVideo,
}

NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {node.__name__: node for node in _NAMED.values()}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {node.__name__: name for name, node in _NAMED.items()}
