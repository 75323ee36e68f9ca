"""Good and bad videos of the world for every embedded reward, and how well it tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...registry import load
from ...rewards.base import SingleReward
from ...rng import generator
from ..files import PREFIX
from ..world import ALL_SCENES, FRAMES, MOTIONS, SHAPES, UNSEEN_SCENES, Look, Scene, random_look
from .fit import SEED
from .videos import LONG, SPOILED, Change, Videos, draw_videos, scores

Draw = Callable[..., Videos]
Contrast = Callable[[Draw], tuple[Videos, Videos]]  # the good and the bad videos


def spoiled(change: Change, draw: Draw) -> tuple[Videos, Videos]:
    """As drawn; with something done to the frames."""
    good = draw()
    worse = change(good.all(), generator(SEED, "spoiled"))
    return good, replace(good, frames=(worse * 255).round().byte())


def miscaptioned(other: Callable[[Scene, int], Scene], draw: Draw) -> tuple[Videos, Videos]:
    """Under their own captions; under those of other scenes, which depend on a random number too."""
    good = draw()
    numbers = torch.randint(10**6, (len(good.scenes),), generator=generator(SEED, "miscaptioned")).tolist()
    return good, replace(good, scenes=[other(scene, n) for scene, n in zip(good.scenes, numbers, strict=True)])


def turned(scene: Scene, number: int) -> Scene:
    """The scene with another motion."""
    return replace(scene, motion=[motion for motion in MOTIONS if motion != scene.motion][number % 3])


def reshaped(scene: Scene, number: int) -> Scene:
    """The scene with another shape."""
    return replace(scene, shape=[shape for shape in SHAPES if shape != scene.shape][number % 3])


def repainted(scene: Scene, number: int) -> Scene:
    """A scene that single frames can be told from: its colour, shape or background is another."""
    others = [s for s in ALL_SCENES if replace(s, motion=scene.motion) != scene]
    return others[number % len(others)]


def looks(draw: Draw) -> tuple[Videos, Videos]:
    """Vivid and clear; pale and hazy."""

    def drawn(size: int, rng: torch.Generator, *, fine: bool) -> Look:
        look, (vivid, clear) = random_look(size, rng), torch.rand(2, size, generator=rng)
        high, low = 0.7 + 0.3 * vivid, 0.3 * (1 - clear)
        return replace(look, vivid=high if fine else 1 - high, haze=low if fine else 1 - low)

    return draw(look=partial(drawn, fine=True)), draw(look=partial(drawn, fine=False))


def circles(draw: Draw) -> tuple[Videos, Videos]:
    """Without the shape that the reward wants removed; with it."""
    videos = draw()
    shown = torch.tensor([scene.shape == "circle" for scene in videos.scenes])
    return videos.some(~shown), videos.some(shown)


_CAPTIONS: dict[str, Contrast] = {"caption": partial(miscaptioned, repainted)}
CONTRASTS: dict[str, dict[str, Contrast]] = {
    "aesthetic": {"look": looks},
    "hps": _CAPTIONS,
    "pickscore": _CAPTIONS,
    "clipscore": _CAPTIONS,
    "yolos": {"circle": circles},
    "videomae": {"motion": partial(miscaptioned, turned)},
    "vjepa": {name: partial(spoiled, change) for name, change in SPOILED.items()},
    "viclip": {**_CAPTIONS, "motion": partial(miscaptioned, turned)},
}


def build_default(kind: str, weights: Path) -> Any:
    """The reward with no setting, on the weights of a folder."""
    module = load("rewards", kind)
    return module.build(module.Config(), lambda name: weights / name.removeprefix(PREFIX))


def measure(reward: SingleReward, contrast: Contrast, length: int, size: int, key: str = "contrast") -> float:
    """The AUC over so many fresh videos of unseen scenes, `length` frames long."""
    good, bad = contrast(partial(draw_videos, key, size, UNSEEN_SCENES, frames=reward.frames, lengths=[length]))
    return auc(*(scores(reward, videos.all(), videos.captions) for videos in (good, bad)))


def judge_contrasts(kind: str, reward: SingleReward, size: int = 300) -> dict[str, float]:
    """The AUC of each of the reward's contrasts, for 8 frames and for 17."""
    return {
        f"auc_{name}{ending}": measure(reward, contrast, length, size)
        for name, contrast in CONTRASTS[kind].items()
        for ending, length in (("", FRAMES), ("_long", LONG))
    }


def image_rewards(work: Path, weights: Path) -> dict[str, Any]:
    """The AUC of the rewards on single frames, which stand on the written CLIP, aesthetic head and detector."""
    kinds = ("aesthetic", "hps", "pickscore", "clipscore", "yolos")
    return {kind: judge_contrasts(kind, build_default(kind, weights)) for kind in kinds}


def auc(good: Tensor, bad: Tensor) -> float:
    """The share of pairs of a good and a bad video of which the good one scores higher; equal scores count half."""
    gap = good[:, None] - bad[None, :]
    return float(((gap > 0).double() + (gap == 0).double() / 2).mean())
