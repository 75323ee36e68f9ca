"""Qwen2-VL as a reward network: its two towers of transformers, and a linear head read at three reward tokens.

Layouts are those of the repository KwaiVGI/VideoAlign: checkpoint-<step>/model.pth, or model.safetensors, holds every
weight under PEFT's names; else adapter_model.safetensors and non_lora_state_dict.pth change Qwen2-VL's own weights.
Either way the low-rank updates are added to the weights once, while these are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

from ..config import InputError
from ..loading import build_empty, build_frozen, read_tensors, reading

WHAT = "VideoReward checkpoint"
ABOUT = "model_config.json"
_BASE = "Qwen2-VL model"
_EMBEDDING = "language.embed_tokens.weight"
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_NAMES = (
    (r"^base_model\.model\.", ""),
    (r"\.base_layer\.", "."),
    (r"^(model\.)?visual\.", "visual."),
    (r"^model\.(language_model\.)?", "language."),
)


# Arguments of Qwen2VLConfig: Qwen2-VL-2B.
_VISION: dict[str, Any] = {"hidden_size": 1536}
_LANGUAGE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151660,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    "rope_theta": 1e6,
}


class RewardNetwork(nn.Module):
    """Scores of videos at the reward tokens of a text that holds the video."""

    def __init__(self, config: Qwen2VLConfig, outputs: int) -> None:
        """Args:
        outputs: of the head; 1 for all tokens alike, or one for each token.
        """
        super().__init__()
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.language = Qwen2VLTextModel(config.text_config)
        self.rm_head = nn.Linear(config.text_config.hidden_size, outputs, bias=False)

    def forward(self, patches_ND: Tensor, grids_B3: Tensor, tokens_BL: Tensor, video: int, marks: list[int]) -> Tensor:
        """Tokens stand at plain positions, one after another, as the published network was trained.

        Args:
            patches_ND: of all videos, in the order in which Qwen2-VL's processor gives them.
            grids_B3: patches along time, height and width of each video.
            tokens_BL: ids, the shorter texts filled up at their end.
            video: the id for which the video's features stand in.
            marks: the ids of the reward tokens; each stands once in every row.

        Returns:
            [B, len(marks)].
        """
        return self.scores(self.read(self.look(patches_ND, grids_B3), tokens_BL, video), tokens_BL, marks)

    def look(self, patches_ND: Tensor, grids_B3: Tensor) -> Tensor:
        """The picture tower's features of all videos, by moment, row and column, [N, width]; see `forward`."""
        seen = self.visual(patches_ND, grid_thw=grids_B3)
        return seen if isinstance(seen, Tensor) else seen.pooler_output  # a tensor before transformers 5

    def read(self, features_ND: Tensor, tokens_BL: Tensor, video: int) -> Tensor:
        """What the language tower makes of every token, [B, L, width]; see `forward`."""
        read_BLD = self.language.embed_tokens(tokens_BL)
        read_BLD = read_BLD.masked_scatter((tokens_BL == video)[..., None], features_ND.to(read_BLD.dtype))
        return self.language(inputs_embeds=read_BLD, use_cache=False).last_hidden_state

    def scores(self, states_BLD: Tensor, tokens_BL: Tensor, marks: list[int]) -> Tensor:
        """The head's word at the reward tokens; see `forward`."""
        places_BM = torch.stack([(tokens_BL == mark).int().argmax(1) for mark in marks], dim=1)
        rows = torch.arange(len(tokens_BL), device=tokens_BL.device)[:, None]
        scores_BMO = self.rm_head(states_BLD[rows, places_BM])
        return scores_BMO.squeeze(-1) if scores_BMO.shape[-1] == 1 else scores_BMO.diagonal(dim1=1, dim2=2)


def empty_network(dtype: torch.dtype) -> RewardNetwork:
    """The published network without weights: one output, and the reward tokens among its words."""
    config = Qwen2VLConfig(vision_config=_VISION, text_config=_LANGUAGE)
    return build_empty(lambda: RewardNetwork(config, 1), dtype)


def about(folder: Path) -> dict[str, Any]:
    """What model_config.json tells of the training.

    Raises:
        InputError: it is missing or cannot be read, or the network is not read at reward tokens.
    """
    with reading(WHAT, folder):
        told = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        special = told["model_config"]["use_special_tokens"] and (
            told["data_config"]["prompt_template_type"] == "detailed_special"
        )
        int(told["data_config"]["max_frame_pixels"]), dict(told["peft_lora_config"])  # both are needed later
    if not special:
        raise InputError(
            f"The VideoReward checkpoint in {folder} is not read at reward tokens; take the published one, KwaiVGI/"
            "VideoReward."
        )
    return told


def newest(folder: Path) -> Path:
    """The checkpoint-<step> of the highest step. Raises InputError where there is none."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    if not steps:
        raise InputError(f"There is no checkpoint-<step> in {folder}; download the whole VideoReward checkpoint.")
    return max(steps, key=lambda path: int(path.name.rpartition("-")[2]))


def load_network(folder: Path, base: Path, words: int, dtype: torch.dtype) -> RewardNetwork:
    """Load the network with the updates merged.

    Args:
        base: the folder of Qwen2-VL, for its configuration and, of an adapter, for its weights.
        words: of the tokenizer, with the reward tokens.

    Raises:
        InputError: a file is missing, truncated or of another kind, or the two folders do not belong together.
    """
    tensors = _tensors(newest(folder), base)
    with reading(_BASE, base):
        config = Qwen2VLConfig.from_pretrained(base, local_files_only=True)
    return build_network(tensors, config, about(folder)["peft_lora_config"], words, dtype, folder)


def build_network(
    tensors: Mapping[str, Tensor],
    config: Qwen2VLConfig,
    lora: Mapping[str, Any],
    words: int,
    dtype: torch.dtype,
    source: Path,
) -> RewardNetwork:
    """The network of a checkpoint's tensors.

    Args:
        lora: the settings of the updates, as in model_config.json.

    Raises:
        InputError: tensors are missing, left over or of another shape.
    """
    own = merged(_renamed(tensors), _scale(lora))
    if _EMBEDDING not in own or "rm_head.weight" not in own:
        raise InputError(f"The {WHAT} in {source} holds no reward head; choose another folder.")
    own[_EMBEDDING] = own[_EMBEDDING][:words]
    config.text_config.vocab_size = words
    return build_frozen(lambda: RewardNetwork(config, len(own["rm_head.weight"])), own, dtype, WHAT, source)


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights with their low-rank updates added: W + scale * B A, in float32 where there is an update.

    Raises:
        InputError: an update lacks one of its two parts, or the weight that it changes.
    """
    plain = {name: tensor for name, tensor in tensors.items() if _LORA.fullmatch(name) is None}
    for name in [name for name in tensors if ".lora_A" in name]:
        target = f"{_LORA.fullmatch(name)[1]}.weight"  # type: ignore[index]
        with reading(WHAT, Path(name)):
            other, weight = tensors[name.replace(".lora_A", ".lora_B")], plain[target]
            plain[target] = weight.float() + scale * other.float() @ tensors[name].float()
    return plain


def _tensors(step: Path, base: Path) -> dict[str, Tensor]:
    """Those of an adapter take the place of the base model's, so both get our names."""
    for whole in (step / "model.safetensors", step / "model.pth"):
        if whole.is_file():
            return read_tensors(whole, WHAT)
    adapter = {
        **read_tensors(step / "adapter_model.safetensors", WHAT),
        **read_tensors(step / "non_lora_state_dict.pth", WHAT),
    }
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise InputError(f"There is no {_BASE} with .safetensors files in {base}; download Qwen2-VL-2B-Instruct.")
    own = {name: tensor for shard in shards for name, tensor in read_tensors(shard, _BASE).items()}
    return {**_renamed(own), **_renamed(adapter)}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        for old, new in _NAMES:
            name = re.sub(old, new, name)  # noqa: PLW2901
        if not name.startswith("lm_head."):  # it makes words, not scores
            result[name] = tensor
    return result


def _scale(lora: Mapping[str, Any]) -> float:
    """By which the product of the two parts of an update is multiplied."""
    if not lora.get("lora_enable"):
        return 0.0
    return float(lora["lora_alpha"]) / float(lora["lora_r"]) ** (0.5 if lora.get("use_rslora") else 1.0)
