"""The mini ViCLIP: whole videos and their captions, motion included, trained contrastively."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from ...checkpoint import atomic_path
from ...open_clip import tower_weights
from ...rewards._clip import Clip
from ...rewards._images import IMAGENET_NORM, normalise
from ...rewards._viclip import build_viclip
from ...rewards.viclip import ViClip
from ...rng import generator
from ..world import ALL_SCENES, FRAMES, SIZE, UNSEEN_SCENES, Scene
from .contrasts import build_default, judge_contrasts
from .fit import SEED, fit
from .tokenizer import MAX_TOKENS, save_tokenizer
from .videos import Whereabouts, draw_videos, roughen_videos, scores

STEPS = 1200
MOTION_STEPS = 1000
_WIDTH, _PATCH = 64, 16
_LAYERS = {"vision_encoder.": 3, "text_encoder.": 1}
_POOL = 3000
_GROUPS = 10  # of a batch: so many kinds of scenes, each in all of its motions
_TEMPERATURE = 0.07


def viclip(work: Path, weights: Path) -> dict[str, Any]:
    """Train it, write it and judge what was written."""
    tokenizer = save_tokenizer(work / "tokenizer")
    save_viclip(train_viclip(tokenizer, work), len(tokenizer), weights / "viclip" / "model.safetensors")
    return judge_viclip(build_default("viclip", weights))


def new_viclip(words: int) -> CLIPModel:
    """The network around weights drawn in the published layout."""
    rng = generator(SEED, "viclip weights")
    tensors = {name: _drawn(name, shape, rng) for name, shape in shapes(words).items()}
    return build_viclip(tensors, torch.float32, Path("viclip")).requires_grad_(True)


def _drawn(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    if name == "temp":
        return torch.tensor(_TEMPERATURE)
    if len(shape) == 1 and not name.endswith("class_embedding"):
        return torch.full(shape, float(".ln_" in name and name.endswith("weight")))
    fan = math.prod(shape[1:]) if name.endswith("weight") else _WIDTH
    return torch.randn(shape, generator=rng) / math.sqrt(fan)


def shapes(words: int) -> dict[str, tuple[int, ...]]:
    """Every weight of the published layout; `words` is how many tokens there are."""
    wide, narrow = 2 * _WIDTH, _WIDTH
    result: dict[str, tuple[int, ...]] = {
        "temp": (),
        "vision_encoder.class_embedding": (narrow,),
        "vision_encoder.conv1.weight": (narrow, 3, 1, _PATCH, _PATCH),
        "vision_encoder.positional_embedding": ((SIZE // _PATCH) ** 2 + 1, narrow),
        "vision_encoder.temporal_positional_embedding": (1, FRAMES, narrow),
        "vision_encoder.proj": (narrow, narrow),
        "text_encoder.token_embedding.weight": (words, narrow),
        "text_encoder.positional_embedding": (MAX_TOKENS, narrow),
        "text_encoder.text_projection": (narrow, narrow),
    }
    layer = {
        "attn.in_proj_weight": (3 * narrow, narrow), "attn.in_proj_bias": (3 * narrow,),
        "attn.out_proj.weight": (narrow, narrow), "attn.out_proj.bias": (narrow,),
        "mlp.c_fc.weight": (wide, narrow), "mlp.c_fc.bias": (wide,),
        "mlp.c_proj.weight": (narrow, wide), "mlp.c_proj.bias": (narrow,),
    }  # fmt: skip
    norms = ["vision_encoder.ln_pre", "vision_encoder.ln_post", "text_encoder.ln_final"]
    for tower, count in _LAYERS.items():
        for block in (f"{tower}transformer.resblocks.{i}." for i in range(count)):
            result |= {block + name: shape for name, shape in layer.items()}
            norms += [f"{block}ln_1", f"{block}ln_2"]
    return result | {f"{norm}.{part}": (narrow,) for norm in norms for part in ("weight", "bias")}


def train_viclip(
    tokenizer: CLIPTokenizer, work: Path, steps: int = STEPS, motion_steps: int = MOTION_STEPS
) -> CLIPModel:
    """Train on roughened videos of seen scenes, in batches where many differ by their motion alone.

    First all else is learnt that captions say, then, with more help, the direction of motion.
    """
    model = new_viclip(len(tokenizer))
    clip, both = Clip(model, tokenizer), Whereabouts(model, _WIDTH, (1, _PATCH, _PATCH))
    pool = draw_videos("viclip pool", _POOL, change=roughen_videos)
    captions, groups = pool.captions, _grouped(pool.scenes)

    def loss(travel: float, rng: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(groups), generator=rng)[:_GROUPS].tolist()
        sets = [rows for group in chosen for rows in groups[group]]
        rows = [some[int(torch.randint(len(some), (), generator=rng))] for some in sets]
        words = tokenizer([captions[row] for row in rows], padding=True, return_tensors="pt").input_ids
        video = pool.at(torch.tensor(rows))
        output = model.vision_model(normalise(video, IMAGENET_NORM))
        seen, said = model.visual_projection(output.pooler_output).float(), clip.embed_tokens(words)
        logits = model.logit_scale.exp() * F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T
        own = torch.arange(len(rows))
        tokens = output.last_hidden_state[:, 1:].unflatten(1, (SIZE // _PATCH, SIZE // _PATCH, FRAMES))
        apart = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return apart + both.loss(tokens.movedim(3, 1), video, travel)

    fit("viclip", both, lambda _, rng: loss(1, rng), steps=steps, learning_rate=2e-3, work=work)
    both.requires_grad_(True)
    fit("viclip_motion", both, lambda _, rng: loss(10, rng), steps=motion_steps, learning_rate=2e-3, work=work)
    return model


def _grouped(scenes: Sequence[Scene]) -> list[list[list[int]]]:
    """For all kinds of scenes that differ by more than their motion, and each motion: the rows that show it."""
    rows: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, scene in enumerate(scenes):
        rows[scene.color, scene.shape, scene.background][scene.motion].append(row)
    return [list(motions.values()) for motions in rows.values()]


def judge_viclip(reward: ViClip) -> dict[str, float]:
    """On unseen scenes: how often the right caption wins among 8, and the AUC."""
    return {"right_of_8": right_of_8(reward, 300), **judge_contrasts("viclip", reward)}


def right_of_8(reward: ViClip, size: int) -> float:
    """Among so many videos, those whose own caption scores higher than 7 others."""
    videos = draw_videos("viclip judge", size, UNSEEN_SCENES, frames=reward.frames)
    right = scores(reward, videos.all(), videos.captions)
    wrong = torch.stack([scores(reward, videos.all(), captions) for captions in _others(videos.scenes)])
    return float((right > wrong.amax(0)).float().mean())


def _others(scenes: Sequence[Scene], count: int = 7) -> list[list[str]]:
    """So many times a wrong caption for each scene, no two alike for the same."""
    rng = generator(SEED, "viclip distractors")
    rows = []
    for scene in scenes:
        order = torch.randperm(len(ALL_SCENES), generator=rng).tolist()
        rows.append([ALL_SCENES[i].caption for i in order if ALL_SCENES[i] != scene][:count])
    return [list(column) for column in zip(*rows, strict=True)]


def published(model: CLIPModel, words: int) -> dict[str, Tensor]:
    """The weights under the published keys, put together as the loader takes them apart."""
    own = model.state_dict()
    tensors = {
        "temp": (-own["logit_scale"]).exp(),
        "vision_encoder.proj": own["visual_projection.weight"].T,
        "text_encoder.text_projection": own["text_projection.weight"].T,
    }
    for key in shapes(words).keys() - tensors.keys():
        tower, _, name = key.partition("_encoder.")
        parts = tower_weights({name: torch.empty(3)})
        tensors[key] = torch.cat([own[f"{tower}_model.{part}"] for part in parts])
    return tensors


def save_viclip(model: CLIPModel, words: int, path: Path) -> None:
    """Write the file, in float16, and the tokenizer beside it."""
    tensors = {key: tensor.half().contiguous() for key, tensor in published(model, words).items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    save_tokenizer(path.parent)
