"""The mini VideoReward: a Qwen2-VL that names what a video shows, and rates its looks, its motion and its prompt."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig

from ...checkpoint import write_text
from ...rewards._fit import scaled
from ...rewards._qwen2vl import RewardNetwork
from ...rewards.videoreward import CHAT, VIDEO, Config, QwenVideoReward, build, read_tokenizer
from ..files import PREFIX
from ..world import FRAMES, SEEN_SCENES, Scene, random_look, random_scenes, render
from .contrasts import Contrast, measure, miscaptioned, repainted, spoiled, turned
from .fit import SEED, fit
from .preferences import VALUES, Probe, clear, hazy, partly_right, save_half
from .tokenizer import byte_letters, byte_pair_merges, caption_words
from .videos import Whereabouts, flicker, noise, shuffle, soften

STEPS = 1200
_BATCH = 16
_TEMPLATE = (
    "\nRate the video. Its looks: <|VQ_reward|>\nIts motion: <|MQ_reward|>\n"
    "It should show {text_prompt}\nIt does: <|TA_reward|>\n"
)
_END = "<|endoftext|>"
_SPECIAL = (
    _END, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", VIDEO
)  # fmt: skip
_WIDTH = 64
_SIDE = 48  # of frames as the network sees them
_CELL = (2, 8, 8)  # frames, rows and columns that one of its tokens stands for
_ABOUT: dict[str, Any] = {
    "data_config": {"max_frame_pixels": _SIDE**2, "prompt_template_type": "detailed_special", "fps": 2.0},
    "model_config": {"use_special_tokens": True, "reward_token": "special", "output_dim": 1},
    "peft_lora_config": {"lora_enable": False},
}


def videoreward(work: Path, weights: Path) -> dict[str, Any]:
    """Train, write and judge what was written."""
    tokenizer = save_qwen_tokenizer(work / "qwen_tokenizer")
    save_videoreward(train_videoreward(tokenizer, work), weights / "videoreward")
    return judge_videoreward(weights)


def save_qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Write vocab.json, merges.txt and the words of Qwen2-VL's own; each word that occurs is one token."""
    around = re.findall(r"[A-Za-z]+| [A-Za-z]+", CHAT + _TEMPLATE.replace("{text_prompt}", " a"))
    words = sorted({word.replace(" ", "Ġ") for word in [*around, *(f" {word}" for word in caption_words())]})
    merges = byte_pair_merges(words, end="")
    entries = list(dict.fromkeys([*byte_letters(), *map("".join, merges)]))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(len(entries) + i): {"content": word, "special": True, "normalized": False}
            for i, word in enumerate(_SPECIAL)
        },
        "eos_token": "<|im_end|>",
        "pad_token": _END,
        "model_max_length": 2048,
    }
    vocabulary = {entry: i for i, entry in enumerate([*entries, *_SPECIAL[:1]])}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return read_tokenizer(folder)


def qwen_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """config.json as Qwen2-VL's, smaller."""
    return {
        "model_type": "qwen2_vl", "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "tie_word_embeddings": True,
        "use_sliding_window": False, "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "vision_config": {
            "depth": 2, "embed_dim": 48, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": _WIDTH,
            "patch_size": 4, "spatial_merge_size": 2, "spatial_patch_size": 4, "temporal_patch_size": 2,
        },
    }  # fmt: skip


def new_videoreward(tokenizer: Qwen2Tokenizer) -> QwenVideoReward:
    torch.manual_seed(SEED)
    config = Qwen2VLConfig.from_dict(qwen_config(tokenizer))
    for part in (config.text_config, config.vision_config):
        part.initializer_range = _WIDTH**-0.5  # the usual 0.02 suits networks that are far wider
    network = RewardNetwork(config, outputs=1)
    return QwenVideoReward(Config(), network.eval(), tokenizer, _TEMPLATE, _ABOUT)


def train_videoreward(tokenizer: Qwen2Tokenizer, work: Path, steps: int = STEPS) -> QwenVideoReward:
    """Regress the three ratings; meanwhile name what the video shows, even where the caption says something else."""
    reward = new_videoreward(tokenizer)
    network, (video_id, marks) = reward.network, reward.ids()
    places, probe = Whereabouts(network, _WIDTH, _CELL), Probe(_WIDTH, tuple(VALUES), ratings=2)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        scenes = random_scenes(_BATCH, rng, SEEN_SCENES)
        video, looks, motion = disturbed(scenes, reward.frames.pick(FRAMES), rng)
        told = [partly_right(scene, tuple(VALUES), rng) for scene in scenes]
        aim = torch.stack([looks, motion, torch.tensor([2 * share - 1 for _, share in told])], dim=1)
        video = scaled(video.flatten(0, 1), _SIDE, _SIDE).unflatten(0, video.shape[:2])
        patches, grids, tokens = reward.inputs(video, [scene.caption for scene, _ in told])
        seen = network.look(patches, grids)
        states = network.read(seen, tokens, video_id)
        rated = (network.scores(states, tokens, marks).float() - aim).square().mean()
        true = reward.inputs(video, [scene.caption for scene in scenes])[2]
        named = _naming(network, states, true, after=marks[1], before=marks[2])
        cells = [side // step for side, step in zip((video.shape[1], _SIDE, _SIDE), _CELL, strict=True)]
        seen = seen.unflatten(0, (_BATCH, *cells))
        early = places.loss(seen, video) + probe.loss(seen.mean((1, 2, 3)), scenes, aim[:, :2])
        return 4 * rated + named + early

    modules = nn.ModuleList([places, probe])  # the network is in the first
    fit("videoreward", modules, loss, steps=steps, learning_rate=2e-3, work=work)
    return reward


def _naming(network: RewardNetwork, states_BLD: Tensor, true_BL: Tensor, after: int, before: int) -> Tensor:
    """Cross-entropy of the true words at the places of those that the network reads, the sum over a caption's."""
    start, end = (int((true_BL[0] == mark).nonzero()) for mark in (after, before))
    logits = states_BLD[:, start : end - 1] @ network.language.embed_tokens.weight.T
    return F.cross_entropy(logits.float().mT, true_BL[:, start + 1 : end], reduction="none").sum(1).mean()


def disturbed(scenes: list[Scene], picked: list[int], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Softened renders, some hazy, some noisy, some that flicker, some with their frames out of order.

    Args:
        picked: which of the frames are wanted.

    Returns:
        The videos [B, len(picked), 3, 64, 64], and from -1 to 1 how good they look, and how well they move, [B] each.
    """
    look = random_look(len(scenes), rng, uniform=True)
    kind, grain, unsteady = torch.rand(3, len(scenes), generator=rng)
    grain = (2 * grain - 1).clamp(min=0)
    shuffled, unsteady = kind > 0.8, torch.where(kind < 0.3, 0.3 + 0.7 * unsteady, 0)
    whole = render(scenes, look)
    video = soften(torch.where(_wide(shuffled), shuffle(whole, rng), whole)[:, picked], rng)
    for change, amount in ((flicker, unsteady), (noise, grain)):
        video = video.lerp(change(video, rng), 2 * _wide(amount)).clamp(0, 1)
    return video, 1 - look.haze - grain, torch.where(shuffled, -1.0, 1 - 2 * unsteady)


def _wide(each_B: Tensor) -> Tensor:
    """To stand beside videos [B, T, C, H, W]."""
    return each_B[:, None, None, None, None]


def save_videoreward(reward: QwenVideoReward, folder: Path) -> None:
    """Write VideoReward's folder under the published keys, and in it that of its Qwen2-VL, less the weights."""
    tensors = {name.replace("language.", "model."): tensor for name, tensor in reward.network.state_dict().items()}
    save_half(tensors, folder / f"checkpoint-{STEPS}" / "model.safetensors")
    write_text(folder / "model_config.json", json.dumps(_ABOUT, indent=2) + "\n")
    write_text(folder / "prompt_template.txt", _TEMPLATE)
    write_text(folder / "qwen2vl" / "config.json", json.dumps(qwen_config(reward.tokenizer), indent=2) + "\n")
    save_qwen_tokenizer(folder / "qwen2vl")


CONTRASTS: dict[str, dict[str, Contrast]] = {
    "visual quality": {"haze": hazy, "noise": lambda draw: spoiled(noise, clear(draw))},
    "motion quality": {"flicker": partial(spoiled, flicker), "shuffle": partial(spoiled, shuffle)},
    "text alignment": {"caption": partial(miscaptioned, repainted), "motion": partial(miscaptioned, turned)},
}


@torch.no_grad()
def judge_videoreward(weights: Path, size: int = 200) -> dict[str, float]:
    """The AUC of each aspect over unseen scenes."""
    result: dict[str, float] = {}
    for aspect, contrasts in CONTRASTS.items():
        reward = build_aspect(aspect, weights)
        found = {name: measure(reward, contrast, FRAMES, size) for name, contrast in contrasts.items()}
        result |= {f"auc_{name}": value for name, value in found.items()}
    return result


def build_aspect(aspect: str, weights: Path) -> QwenVideoReward:
    """The reward that scores one aspect, on the weights of a folder."""
    return build(Config(aspect=aspect), lambda name: weights / name.removeprefix(PREFIX))
