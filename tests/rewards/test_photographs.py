"""Pixels and scores of real photographs against each model's own processor and transformers' own forward pass.

Tolerances. Pixels: 1.5 of 255 levels, since Pillow rounds to whole levels after each of its two passes; divided by
the smallest deviation of the normalisation. Scores: equal on the same pixels; on the processor's own, that rounding
moves them by less than SCORE of what they vary by over the photographs (seen: 0.021, on YOLOS).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from skimage import data
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipVisionModel, VideoMAEForVideoClassification, YolosConfig
from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer
from vader_nodes.vader_backend.rewards import aesthetic, clipscore, hps, pickscore, yolos
from vader_nodes.vader_backend.rewards._clip import Clip
from vader_nodes.vader_backend.rewards._images import CLIP_NORM, IMAGENET_NORM
from vader_nodes.vader_backend.rewards._linear_head import build_head

from . import every
from .conftest import HEIGHT_FIRST, WIDTH, _spread, draw_head
from .tiny_beyond import MARKS

SCORE = 0.05
LEVELS = 1.5 / 255
TEXT = "a red circle moving left on a black background"
FRAMES = 4


def _small(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def photographs() -> dict[str, np.ndarray]:
    """[H, W, 3] of several shapes, larger and smaller than what networks take."""
    wide = np.concatenate([data.coffee()] * 3, axis=1)
    tall = {"very tall": np.rot90(wide).copy()} if HEIGHT_FIRST else {}
    return {
        **tall,
        "square": data.astronaut(),
        "landscape": data.coffee(),
        "portrait": np.rot90(data.coffee()).copy(),
        "odd": data.chelsea(),
        "odd portrait": np.rot90(data.rocket()).copy(),
        "narrow": data.rocket()[:, 200:320].copy(),
        "very wide": data.coffee()[150:190].copy(),
        "wide": wide,
        "tiny": _small(data.coffee(), 9, 14),
        "small": _small(data.coffee(), 90, 135),
        "small portrait": _small(data.astronaut(), 101, 75),
    }


def shots(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """A camera that moves over the picture."""
    return [np.roll(picture, 5 * i, axis=1) for i in range(count)]


def as_video(frames: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None].float() / 255


def processor(name: str, **settings: Any) -> Callable[[Any], Any]:
    """Transformers' own that stands on Pillow, whatever its version calls it."""
    cls = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    own = cls(**settings)
    return lambda pictures: own(pictures, return_tensors="pt")


@dataclass(frozen=True)
class Case:
    """A reward, its network's input from a video [1, T, 3, H, W], and what others make of the same pictures."""

    reward: Any
    pixels: Callable[[Tensor], Tensor]
    theirs: Callable[[list[np.ndarray]], Tensor]
    score: Callable[[Tensor], Tensor]
    std: float
    frames: int = 1


# --- networks that take single frames --------------------------------------------------------


def _clip(folder: Path, fit: str) -> Clip:
    tokenizer = save_tokenizer(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**tower, "image_size": 224, "patch_size": 32}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).eval()
    _spread(model)
    return Clip(model, tokenizer, fit)


def _clip_case(reward: Any, theirs: Callable[[list[np.ndarray]], Tensor], read: Callable[[Any], Tensor]) -> Case:
    clip = reward.clip

    def score(pixels: Tensor) -> Tensor:
        return read(clip.model(**clip.tokenizer([TEXT], return_tensors="pt"), pixel_values=pixels))

    return Case(reward, lambda video: clip.pixels(video[:, 0]), theirs, score, min(CLIP_NORM[1]))


def _of_clip(folder: Path, kind: str) -> Case:
    own = processor("CLIP")
    reward = {
        "pickscore": lambda: pickscore.PickScore("pickscore", pickscore.Config(), _clip(folder, "crop")),
        "clipscore": lambda: clipscore.ClipReward("clipscore", clipscore.Config(), _clip(folder, "crop")),
        "aesthetic": lambda: _aesthetic(folder),
    }[kind]()
    read = {
        "pickscore": lambda output: output.logits_per_image[0],
        "clipscore": lambda output: (output.image_embeds * output.text_embeds).sum(1),
        "aesthetic": lambda output: reward.head(F.normalize(output.image_embeds, dim=-1)),
    }[kind]
    return _clip_case(reward, lambda pictures: own(pictures).pixel_values, read)


def _aesthetic(folder: Path) -> aesthetic.Aesthetic:
    head = aesthetic.build_head(draw_head(), WIDTH, folder / "head.pth")
    return aesthetic.Aesthetic(aesthetic.Config(), _clip(folder, "crop"), head)


def _hps(folder: Path, fit: str) -> Case:
    def fitted(pictures: list[np.ndarray]) -> Tensor:
        (picture,) = (Image.fromarray(array) for array in pictures)
        if fit == "squash":
            return normal(picture.resize((224, 224), Image.Resampling.BILINEAR), CLIP_NORM)
        scale = 224 / max(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        left, top = (224 - width) // 2, (224 - height) // 2
        square = np.zeros((224, 224, 3))
        for i, channel in enumerate(picture.split()):  # as numbers, which may leave the range of pictures
            small = channel.convert("F").resize((width, height), Image.Resampling.BICUBIC)
            square[top : top + height, left : left + width, i] = np.asarray(small)
        return normal(square, CLIP_NORM)

    reward = hps.ClipReward("hps", hps.Config(), _clip(folder, fit))
    return _clip_case(reward, fitted, lambda output: (output.image_embeds * output.text_embeds).sum(1))


def normal(picture: Image.Image | np.ndarray, norm: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (np.array(part, dtype="float32") for part in norm)
    return torch.from_numpy((np.array(picture, dtype="float32") / 255 - mean) / std).permute(2, 0, 1)[None]


def _yolos(folder: Path, size: dict[str, int]) -> Case:
    own = processor("Yolos", size=size, do_pad=False)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = yolos.YolosForObjectDetection(
        YolosConfig(**tower, image_size=[128, 192], patch_size=16, num_detection_tokens=5, num_labels=3,
                    use_mid_position_embeddings=False)
    ).eval()  # fmt: skip
    _spread(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    reward = yolos.build(yolos.Config(target="LABEL_1", mode="keep", antialias=True), lambda _: folder)

    def pixels(video: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = reward.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
        )
        reward(video, [""], [0])
        hook.remove()
        return seen[0]

    def score(images: Tensor) -> Tensor:
        odds = model(pixel_values=images).logits.softmax(-1)[..., 1]
        return 1 - (1 - odds).prod(1)

    return Case(reward, pixels, lambda p: own(p).pixel_values, score, min(IMAGENET_NORM[1]))


def _siglip(root: Path) -> Case:
    reward = every.build("aesthetic_v25", root)
    own = processor("Siglip", size={"height": 16, "width": 16})
    model = SiglipVisionModel.from_pretrained(root / "siglip" / "siglip").eval()
    found = torch.load(root / "siglip" / "head.pth", weights_only=True)
    head = build_head({k.removeprefix("scoring_head."): v for k, v in found.items()}, 16, "head", root)

    def score(images: Tensor) -> Tensor:
        return head(F.normalize(model(pixel_values=images).pooler_output, dim=-1))[:, 0]

    return Case(reward, lambda video: reward.pixels(video[:, 0]), lambda p: own(p).pixel_values, score, 0.5)


def _imagereward(root: Path) -> Case:
    """The published pixels are torchvision's of a Pillow picture: Resize of the short side, and CenterCrop."""
    reward = every.build("imagereward", root)
    goal = reward.network.vision.config.image_size

    def cut(pictures: list[np.ndarray]) -> Tensor:
        (picture,) = (Image.fromarray(array) for array in pictures)
        width, height = (int(goal * side / min(picture.size)) for side in picture.size)
        left, top = round((width - goal) / 2.0), round((height - goal) / 2.0)
        small = picture.resize((width, height), Image.Resampling.BICUBIC)
        return normal(small.crop((left, top, left + goal, top + goal)), CLIP_NORM)

    def score(images: Tensor) -> Tensor:
        tokens = reward.tokenizer([TEXT], return_tensors="pt")
        return reward.network(images, tokens.input_ids, tokens.attention_mask)

    return Case(reward, lambda video: reward.pixels(video[:, 0]), cut, score, min(CLIP_NORM[1]))


# --- networks that take whole videos ---------------------------------------------------------


def _videomae(root: Path) -> Case:
    reward = every.build("videomae", root)
    side = reward.view.size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    mean, std = IMAGENET_NORM  # as the published configuration says, unlike the class
    own = processor("VideoMAE", **sizes, image_mean=list(mean), image_std=list(std))
    model = VideoMAEForVideoClassification.from_pretrained(root / "videomae").eval()

    def score(images: Tensor) -> Tensor:
        return model(pixel_values=images).logits.log_softmax(-1)[:, every.MOTIONS.index("moving left")]

    return Case(reward, reward.view, lambda p: own(p).pixel_values, score, min(IMAGENET_NORM[1]), FRAMES)


def _vjepa2(folder: Path) -> Case:
    """Its processor needs torchvision; without it Pillow does the same: short side times 256 / 224, bilinear."""
    from .video_networks import SIZE, build, save_vjepa2

    torch.manual_seed(0)
    save_vjepa2(folder)
    reward = build("vjepa2", folder)
    try:
        own = transformers.VJEPA2VideoProcessor(crop_size=SIZE)
    except (ImportError, RuntimeError):
        own = None

    def cut(pictures: list[np.ndarray]) -> Tensor:
        if own is not None:
            return own(np.stack(pictures), return_tensors="pt").pixel_values_videos
        images = []
        for picture in map(Image.fromarray, pictures):
            width, height = (side * (SIZE * 256 // 224) // min(picture.size) for side in picture.size)
            left, top = (width - SIZE) // 2, (height - SIZE) // 2
            small = picture.resize((width, height), Image.Resampling.BILINEAR)
            images.append(normal(small.crop((left, top, left + SIZE, top + SIZE)), IMAGENET_NORM))
        return torch.stack(images, dim=1)

    def score(images: Tensor) -> Tensor:
        return reward.scores(images, [TEXT])["vjepa"]

    return Case(reward, reward.view, cut, score, min(IMAGENET_NORM[1]), FRAMES)


def _videoreward(root: Path) -> Case:
    reward = every.build("videoreward", root)
    low, high = 128 * 4 * 4, reward.most_pixels
    own = processor("Qwen2VL", patch_size=2, merge_size=2, size={"shortest_edge": low, "longest_edge": high})
    grid = SimpleNamespace(of=torch.empty(0))

    def theirs(pictures: list[np.ndarray]) -> Tensor:
        told = own(pictures[0])  # of one picture it makes two frames
        grid.of = told.image_grid_thw
        return told.pixel_values

    def score(images: Tensor) -> Tensor:
        ids = reward.tokenizer.convert_tokens_to_ids(["<|video_pad|>", *MARKS])
        tokens = reward.tokens([TEXT], int(grid.of[0].prod()) // 4)
        raw = reward.network(images, grid.of, tokens, ids[0], ids[1:])
        return ((raw - torch.tensor(reward.mean)) / torch.tensor(reward.std)).sum(1)

    return Case(reward, lambda video: reward.pixels(video)[0], theirs, score, min(CLIP_NORM[1]), 2)


CASES: dict[str, Callable[[Path, Path], Case]] = {
    "pickscore": lambda root, folder: _of_clip(folder, "pickscore"),
    "clipscore": lambda root, folder: _of_clip(folder, "clipscore"),
    "aesthetic": lambda root, folder: _of_clip(folder, "aesthetic"),
    "hps as published": lambda root, folder: _hps(folder, "pad"),
    "hps of VADER": lambda root, folder: _hps(folder, "squash"),
    "yolos": lambda root, folder: _yolos(folder, {"height": 128, "width": 192}),
    "yolos by its short side": lambda root, folder: _yolos(folder, {"shortest_edge": 160, "longest_edge": 320}),
    "aesthetic_v25": lambda root, folder: _siglip(root),
    "imagereward": lambda root, folder: _imagereward(root),
    "videomae": lambda root, folder: _videomae(root),
    "vjepa 2": lambda root, folder: _vjepa2(folder),
    "videoreward": lambda root, folder: _videoreward(root),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every.save_all(tmp_path_factory.mktemp("every"))


@pytest.mark.parametrize("name", list(CASES))
def test_pixels_and_scores_are_those_of_the_models_own_processor(name: str, root: Path, tmp_path: Path) -> None:
    case = CASES[name](root, tmp_path)
    ours, others = [], []
    for label, picture in photographs().items():
        frames = [picture] * 2 if name == "videoreward" else shots(picture, case.frames)
        video = as_video(frames)
        with torch.no_grad():
            theirs = case.theirs(frames)
            pixels = case.pixels(video)
            assert pixels.shape == theirs.shape, label
            assert float((pixels - theirs).abs().max()) < LEVELS / case.std, label
            ours.append(case.reward(video, [TEXT], range(len(frames))))
            others.append(case.score(theirs))
            torch.testing.assert_close(ours[-1], case.score(pixels), rtol=1e-4, atol=1e-5)
    mine, reference = torch.cat(ours), torch.cat(others)
    assert len(mine) >= 4
    assert float((mine - reference).abs().max()) < SCORE * float(reference.max() - reference.min())
