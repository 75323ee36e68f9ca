"""The mini CLIP: a CLIPModel trained contrastively on single frames and on what can be said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ...rewards._clip import Clip
from ...rewards._images import CLIP_NORM
from ...rng import generator
from ..world import (
    ALL_SCENES,
    BACKGROUNDS,
    COLORS,
    SEEN_SCENES,
    SHAPES,
    Look,
    Scene,
    random_look,
    random_scenes,
    render,
)
from .fit import SEED, fit
from .tokenizer import MAX_TOKENS, save_tokenizer

STEPS = 3500
WIDTH = 128
_GROUPS, _ALIKE = 16, 4  # a batch: so many kinds of frames, and of each so many that differ in their looks
_POOL = 8000
_NAMED = 0.5  # how often a text names the vividness, and how often the haze


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(SEED)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


@dataclass(frozen=True)
class Frames:
    """Single frames [N, 3, 64, 64] in [0, 1] and what they show.

    facts: [N, 3], the number of what is in sight, then vividness and haze as -1 low, 0 middling or 1 high.
    """

    images: Tensor
    scenes: list[Scene]
    look: Look
    facts: Tensor


def draw_frames(key: str, size: int, pool: tuple[Scene, ...] = SEEN_SCENES) -> Frames:
    """Frames of uniform looks, each from a random moment of a video."""
    rng = generator(SEED, key)
    scenes = random_scenes(size, rng, pool)
    look = random_look(size, rng, uniform=True)
    moment = torch.randint(4, (size,), generator=rng)
    images = render(scenes, look, frames=4)[torch.arange(size), moment]
    facts = torch.stack([_kinds(scenes), _grade(look.vivid), _grade(look.haze)], dim=1)
    return Frames(images, scenes, look, facts)


def _kinds(scenes: Sequence[Scene]) -> Tensor:
    """[N]: a number for colour, shape and background, all that one frame shows of a scene."""
    shown = [(s.color, s.shape, s.background) for s in scenes]
    every = list(product(COLORS, SHAPES, BACKGROUNDS))
    return torch.tensor([every.index(entry) for entry in shown])


def _grade(value: Tensor) -> Tensor:
    """-1 low, 0 middling, 1 high."""
    return (value > 0.6).long() - (value < 0.4).long()


def describe(scene: Scene, facts: Tensor, rng: torch.Generator) -> tuple[str, Tensor]:
    """The caption, sometimes with words on what captions leave open, and the facts that it names (0: left open)."""
    kind, vivid, haze = facts.tolist()
    name_vivid, name_haze, name_motion = torch.rand(3, generator=rng).tolist()
    vivid *= name_vivid < _NAMED
    haze *= name_haze < _NAMED
    words = scene.caption if name_motion < 0.6 else scene.caption.replace(f" moving {scene.motion}", "")
    if vivid:
        words += f" with {'vivid' if vivid > 0 else 'pale'} colors"
    if haze:
        words = f"a {'hazy' if haze > 0 else 'clear'} picture of {words}"
    return words, torch.tensor([kind, vivid, haze])


def roughen(images: Tensor, rng: torch.Generator) -> Tensor:
    """Softness and noise, as generated frames have them, by a random amount per picture."""
    soft = F.interpolate(F.interpolate(images, scale_factor=0.5, mode="area"), scale_factor=2, mode="bilinear")
    mix, level = torch.rand(2, len(images), 1, 1, 1, generator=rng)
    noise = torch.randn(images.shape, generator=rng) * 0.05 * level
    return (images + mix * (soft - images) + noise).clamp(0, 1)


def train_clip(tokenizer: CLIPTokenizer, work: Path, steps: int = STEPS) -> CLIPModel:
    """Train on frames of seen scenes; every text that is true of a frame counts as right for it."""
    model = new_clip(tokenizer)
    clip = Clip(model, tokenizer)
    pool = draw_frames("clip pool", _POOL)
    kinds = [(pool.facts[:, 0] == kind).nonzero().flatten() for kind in pool.facts[:, 0].unique()]

    def loss(step: int, rng: torch.Generator) -> Tensor:
        chosen = [kinds[i] for i in torch.randperm(len(kinds), generator=rng)[:_GROUPS].tolist()]
        rows = torch.cat([kind[torch.randperm(len(kind), generator=rng)[:_ALIKE]] for kind in chosen])
        texts, named = zip(*(describe(pool.scenes[row], pool.facts[row], rng) for row in rows.tolist()), strict=True)
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt").input_ids
        output = model(input_ids=tokens, pixel_values=clip.pixels(roughen(pool.images[rows], rng)))
        true = _true(pool.facts[rows], torch.stack(named)).float()
        logits = output.logits_per_image.float()
        by_image = F.cross_entropy(logits, true / true.sum(1, keepdim=True))
        return (by_image + F.cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True))) / 2

    fit("clip", model, loss, steps=steps, learning_rate=2e-3, work=work)
    return model


def _true(facts: Tensor, named: Tensor) -> Tensor:
    """[images, texts]: whether each text is true of each image."""
    equal = facts[:, None] == named[None, :]
    return equal[..., 0] & (equal[..., 1:] | (named[None, :, 1:] == 0)).all(-1)


@torch.no_grad()
def judge_clip(model: CLIPModel, tokenizer: CLIPTokenizer, trials: int = 600) -> dict[str, float]:
    """How often a fresh frame finds its caption among 8 that differ in what a frame shows; then the words on looks."""
    clip = Clip(model, tokenizer)
    fresh = draw_frames("clip judge", trials, ALL_SCENES)
    features = torch.cat([clip.image_features(part) for part in fresh.images.split(200)])
    scores = features @ clip.text_features([scene.caption for scene in ALL_SCENES]).T
    kinds = _kinds(ALL_SCENES)
    rng = generator(SEED, "clip distractors")
    right = []
    for row, scene in enumerate(fresh.scenes):
        others = (kinds != fresh.facts[row, 0]).nonzero().flatten()
        others = others[torch.randperm(len(others), generator=rng)[:7]]
        right.append(float(scores[row, ALL_SCENES.index(scene)] > scores[row, others].max()))
    hits, seen = torch.tensor(right), torch.tensor([scene.seen for scene in fresh.scenes])
    return {
        "right_of_8": float(hits.mean()),
        "right_of_8_seen": float(hits[seen].mean()),
        "right_of_8_unseen": float(hits[~seen].mean()),
        **_judge_words(clip, features, fresh),
    }


def _judge_words(clip: Clip, features: Tensor, fresh: Frames) -> dict[str, float]:
    """How often the word for vividness and for haze that is true of a frame wins over the opposite one.

    Haze is not asked for on gray, where it does no more than make the shape paler.
    """
    captions = [scene.caption for scene in fresh.scenes]
    gray = torch.tensor([scene.background == "gray" for scene in fresh.scenes])
    result = {}
    for column, texts in {
        1: ([f"{c} with vivid colors" for c in captions], [f"{c} with pale colors" for c in captions]),
        2: ([f"a hazy picture of {c}" for c in captions], [f"a clear picture of {c}" for c in captions]),
    }.items():
        high, low = ((features * clip.text_features(side)).sum(-1) for side in texts)
        grade = fresh.facts[:, column]
        asked = (grade != 0) & ~(gray & (column == 2))
        result[("vivid", "haze")[column - 1]] = float(((high > low) == (grade > 0))[asked].float().mean())
    return result


def save_clip(model: CLIPModel, folder: Path) -> None:
    """Write the transformers folder, weights in float16."""
    save_tokenizer(folder)
    model.half().save_pretrained(folder)
    size = model.config.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_NORM[0],
        "image_std": CLIP_NORM[1],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
