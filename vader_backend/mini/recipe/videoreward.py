"""The mini VideoReward: a Qwen2-VL taught by preferences among videos, for their looks, their motion and their prompt.

As VideoReward itself it learns from pairs which of the two is better (Bradley and Terry 1952).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from ...rewards.videoreward import Config, QwenVideoReward, build
from ...rng import generator
from ..files import PREFIX
from ..world import FRAMES, Look, Scene, random_look
from .contrasts import Contrast, measure, miscaptioned, repainted, reshaped, spoiled, turned
from .faults import FAULTS, Faulty, disturbed, movement
from .fit import SEED, fit
from .preferences import VALUES, Probe, clear, hazy, partly_right
from .videoreward_layout import CELL, WIDTH, new_videoreward, save_qwen_tokenizer, save_videoreward
from .videos import LONG, Videos, blur, draw_videos, flicker, freeze, jump, noise

STEPS = 3000
_BATCH, _CAPTIONS = 20, 3  # videos, and captions of each
_POOL = 3000
_MARGIN = 0.15  # of ratings; what is closer is not compared
_FLOOR = 0.3  # of the patches' variance, below which it counts as little


def videoreward(work: Path, weights: Path) -> dict[str, Any]:
    """Train, write and judge what was written."""
    tokenizer = save_qwen_tokenizer(work / "qwen_tokenizer")
    save_videoreward(train_videoreward(tokenizer, work), weights / "videoreward", STEPS)
    return judge_videoreward(weights)


def train_videoreward(tokenizer: Qwen2Tokenizer, work: Path, steps: int = STEPS) -> QwenVideoReward:
    """Learn from every two videos or captions of a batch which is better, with the helps of `Helps`."""
    reward = new_videoreward(tokenizer)
    network, helps, (video_id, marks) = reward.network, Helps(), reward.ids()
    pool = draw_videos("videoreward pool", _POOL, frames=reward.frames, look=_without_haze)
    some = disturbed(pool.at(torch.arange(200)), generator(SEED, "videoreward some"))
    set_patches(network.visual.patch_embed.proj, reward.pixels(some.video)[0])

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(_POOL, (_BATCH,), generator=rng)
        scenes, faulty = [pool.scenes[row] for row in rows.tolist()], disturbed(pool.at(rows), rng)
        told = [tell(scene, moves, rng) for scene, moves in zip(scenes, faulty.moving, strict=True)
                for _ in range(_CAPTIONS)]  # fmt: skip
        patches, grids, tokens = reward.inputs(faulty.video, [scene.caption for scene, _ in told])
        seen = network.look(patches, grids).unflatten(0, (_BATCH, -1))
        states = network.read(seen.repeat_interleave(_CAPTIONS, 0).flatten(0, 1), tokens, video_id)
        scores = network.scores(states, tokens, marks).float()
        preferred = (
            preference(scores[::_CAPTIONS, 0], faulty.looks)
            + preference(scores[::_CAPTIONS, 1], faulty.motion)
            + preference(scores[:, 2], torch.tensor([share for _, share in told]))
        )
        return 3 * preferred + helps.loss(seen, scenes, faulty)

    fit("videoreward", nn.ModuleList([network, helps]), loss, steps=steps, learning_rate=2e-3, work=work)
    standardise(reward, pool.some(torch.arange(_POOL) < 300))
    return reward


class Helps(nn.Module):
    """Linear layers that tell from a video's tokens what it shows, where, and what is wrong with it.

    From preferences alone a network of this size learns nothing for very long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names = Probe(WIDTH, tuple(VALUES))
        self.places = nn.Linear(WIDTH, CELL[0] + 2)
        self.faults = nn.Linear(WIDTH, len(FAULTS))

    def loss(self, seen_BND: Tensor, scenes: list[Scene], faulty: Faulty) -> Tensor:
        mean_BD = seen_BND.mean(1)
        places = (self.places(seen_BND).float() - movement(faulty.steady, CELL)).square().mean()
        faults = (self.faults(mean_BD).float() - faulty.faults).square().sum(1).mean()
        return self.names.loss(mean_BD, scenes) + 10 * places + 5 * faults


def tell(scene: Scene, moves: bool, rng: torch.Generator) -> tuple[Scene, float]:
    """What a caption says, see `partly_right`, and the share that is right; motion is not, where there is none."""
    said, share = partly_right(scene, tuple(VALUES), rng)
    return said, share - (said.motion == scene.motion and not moves) / len(VALUES)


def preference(scores_N: Tensor, ratings_N: Tensor) -> Tensor:
    """The loss of every two whose ratings differ."""
    better = ratings_N[:, None] - ratings_N > _MARGIN
    return F.softplus(scores_N - scores_N[:, None])[better].mean()


@torch.no_grad()
def set_patches(projection: Any, patches_ND: Tensor) -> None:
    """Let the projection of patches begin with all that differs among these about equally loud, grain as well."""
    variance, components = torch.linalg.eigh(patches_ND.T.cov())
    drawn = torch.empty(len(projection.weight), len(variance))
    random = nn.init.orthogonal_(drawn, generator=generator(SEED, "videoreward patches"))
    weight = random @ (components / (variance + _FLOOR).sqrt()) @ components.T
    weight /= (patches_ND @ weight.T).square().mean().sqrt()
    projection.weight.copy_(weight.view_as(projection.weight))


@torch.no_grad()
def standardise(reward: QwenVideoReward, clean: Videos) -> None:
    """Tell scores from now on by their mean and deviation over videos with faults, under captions with some."""
    rng = generator(SEED, "videoreward scale")
    told = [partly_right(scene, tuple(VALUES), rng)[0].caption for scene in clean.scenes]
    scores = reward.aspects(disturbed(clean.all(), rng).video, told)
    reward.mean, reward.std = scores.mean(0).tolist(), scores.std(0).tolist()


def _without_haze(size: int, rng: torch.Generator) -> Look:
    return replace(random_look(size, rng, uniform=True), haze=torch.zeros(size))


def _clearly(change: Callable[..., Tensor]) -> Contrast:
    """Clear videos; the same with something done to their frames."""
    return lambda draw: spoiled(change, clear(draw))


CONTRASTS: dict[str, dict[str, Contrast]] = {
    "visual quality": {"haze": hazy, "noise": _clearly(noise), "blur": _clearly(blur)},
    "motion quality": {name: partial(spoiled, change) for name, change in
                       (("flicker", flicker), ("jump", jump), ("freeze", freeze))},
    "text alignment": {name: partial(miscaptioned, other) for name, other in
                       (("caption", repainted), ("motion", turned), ("shape", reshaped))},
}  # fmt: skip


@torch.no_grad()
def judge_videoreward(weights: Path, size: int = 300) -> dict[str, float]:
    """The AUC of each aspect over unseen scenes, for 8 frames and for 17."""
    return {
        f"auc_{name}{ending}": measure(build_aspect(aspect, weights), contrast, length, size)
        for aspect, contrasts in CONTRASTS.items()
        for name, contrast in contrasts.items()
        for ending, length in (("", FRAMES), ("_long", LONG))
    }


def build_aspect(aspect: str, weights: Path) -> QwenVideoReward:
    """The reward that scores one aspect, on the weights of a folder."""
    return build(Config(aspect=aspect), lambda name: weights / name.removeprefix(PREFIX))
