"""The mini ImageReward: a BLIP network taught how much of its caption a frame shows, and how clear it is."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ...checkpoint import write_text
from ...rewards._blip import text_config
from ...rewards.imagereward import BlipReward, Config, ImageRewardNetwork
from ...rng import generator
from ..world import FRAMES, SIZE, UNSEEN_SCENES
from .clip import draw_frames, roughen
from .contrasts import Contrast, build_default, measure, miscaptioned, repainted
from .fit import SEED, fit
from .preferences import SHOWN, Probe, hazy, mistaken, new_head, partly_right, save_half
from .tokenizer import MAX_TOKENS, caption_words

STEPS = 2400
_BATCH, _CAPTIONS = 32, 4  # frames, and captions of each
_POOL = 5000
_WIDTH = 64  # BLIP's picture tower has heads of 64 channels
_PLACES = (0, 2, 4, 6, 7)  # of the linear layers among those of dropout
_MISTAKES = tuple(names for count in (1, 2, 3) for names in combinations(SHOWN, count))  # 7
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
}  # transformers' part of a name in the picture tower: the original's


def imagereward(work: Path, weights: Path) -> dict[str, Any]:
    """Train, write and judge what was written."""
    tokenizer = save_bert_tokenizer(work / "bert_tokenizer")
    save_imagereward(train_imagereward(tokenizer, work), weights / "imagereward")
    return judge_imagereward(build_default("imagereward", weights))


def save_bert_tokenizer(folder: Path) -> BertTokenizer:
    """Write vocab.txt, and load it: each word of a caption is a piece; other text falls apart into letters."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *caption_words()]
    write_text(folder / "vocab.txt", "\n".join(dict.fromkeys(pieces)) + "\n")
    return BertTokenizer.from_pretrained(folder, local_files_only=True)


def med_config(words: int) -> dict[str, Any]:
    """The text tower as the original's med_config.json tells of it."""
    return {
        "hidden_act": "gelu",
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": MAX_TOKENS,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "vocab_size": words,
    }


def new_imagereward(tokenizer: BertTokenizer) -> BlipReward:
    torch.manual_seed(SEED)
    vision = BlipVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=SIZE,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    text = text_config(med_config(len(tokenizer)), _WIDTH)
    vision.initializer_range = text.initializer_range = _WIDTH**-0.5  # 0.02 suits networks that are far wider
    towers = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    return BlipReward(Config(), ImageRewardNetwork(*towers, new_head(_WIDTH, gain=1.0)).eval(), tokenizer)


def train_imagereward(tokenizer: BertTokenizer, work: Path, steps: int = STEPS) -> BlipReward:
    """Regress what several captions of a roughened frame deserve, see `_deserved`; meanwhile name what it shows."""
    reward = new_imagereward(tokenizer)
    network, probe = reward.network, Probe(_WIDTH, SHOWN)
    pool = draw_frames("imagereward pool", _POOL)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(_POOL, (_BATCH,), generator=rng)
        scenes = [pool.scenes[row] for row in rows.tolist()]
        told = [partly_right(scene, SHOWN, rng) for scene in scenes for _ in range(_CAPTIONS)]
        share = torch.tensor([right for _, right in told]).unflatten(0, (_BATCH, _CAPTIONS))
        seen = network.look(reward.pixels(roughen(pool.images[rows], rng)))
        scores = _scores(reward, seen.repeat_interleave(_CAPTIONS, 0), [scene.caption for scene, _ in told])
        aim = _deserved(share, pool.look.haze[rows, None])
        return (scores.float() - aim.flatten()).square().mean() + probe.loss(seen[:, 0], scenes)

    fit("imagereward", nn.ModuleList([network, probe]), loss, steps=steps, learning_rate=2e-3, work=work)
    return reward


def _deserved(share: Tensor, haze: Tensor) -> Tensor:
    """0.5 (hazy) to 1.5 (clear) where the whole caption is right, and 1 less for each of three things that are not."""
    return 3 * share - 2 + (0.5 - haze)


def _scores(reward: BlipReward, seen_NLD: Tensor, captions: Sequence[str]) -> Tensor:
    tokens = reward.tokenizer(list(captions), padding=True, return_tensors="pt")
    return reward.network.read(seen_NLD, tokens.input_ids, tokens.attention_mask)


def save_imagereward(reward: BlipReward, folder: Path) -> None:
    """Write ImageReward.safetensors under the original's keys, med_config.json and the tokenizer."""
    network = reward.network
    layers = {f"mlp.layers.{place}": layer for place, layer in zip(_PLACES, network.head, strict=True)}
    tensors = {
        **{f"blip.visual_encoder.{_original(k)}": v for k, v in network.vision.state_dict().items()},
        **{f"blip.text_encoder.{k}": v for k, v in network.text.state_dict().items() if "position_ids" not in k},
        **{f"{key}.{k}": v for key, layer in layers.items() for k, v in layer.state_dict().items()},
    }
    save_half(tensors, folder / "ImageReward.safetensors")
    config: Mapping[str, Any] = {"model_type": "bert", "encoder_width": _WIDTH, **med_config(len(reward.tokenizer))}
    write_text(folder / "med_config.json", json.dumps(config, indent=2) + "\n")
    save_bert_tokenizer(folder)


def _original(name: str) -> str:
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


CONTRASTS: dict[str, Contrast] = {"caption": partial(miscaptioned, repainted), "haze": hazy}


@torch.no_grad()
def judge_imagereward(reward: BlipReward, trials: int = 400) -> dict[str, float]:
    """On unseen scenes: how often a fresh frame's caption wins among 8, and the AUC of captions and of haze.

    The 7 others are wrong in one, two or all three of the things that a frame shows.
    """
    fresh, rng = draw_frames("imagereward judge", trials, UNSEEN_SCENES), generator(SEED, "imagereward captions")
    seen = reward.network.look(reward.pixels(fresh.images))
    right = _scores(reward, seen, [scene.caption for scene in fresh.scenes])
    told = [[mistaken(scene, names, rng).caption for scene in fresh.scenes] for names in _MISTAKES]
    wrong = torch.stack([_scores(reward, seen, captions) for captions in told])
    return {
        "right_of_8": float((right > wrong.amax(0)).float().mean()),
        **{f"auc_{name}": measure(reward, contrast, FRAMES, trials) for name, contrast in CONTRASTS.items()},
    }
