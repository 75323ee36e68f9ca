"""The mini detector: YolosForObjectDetection on stills with none to three shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import YolosConfig, YolosForObjectDetection

from ...rewards._images import IMAGENET_NORM, normalise
from ...rng import generator
from ..world import BACKGROUNDS, SHAPES, SIZE, paint, random_look, random_scenes, shape_mask
from .clip import roughen
from .fit import SEED, fit

STEPS = 6000
PATCH = 8
_WIDTH = 128
_BATCH = 32
_POOL = 10000
_QUERIES = 6
_NO_OBJECT = 0.2  # weight of the class «no object» in the loss

Stills = tuple[Tensor, list[Tensor], list[Tensor]]  # images [N, 3, 64, 64]; per image boxes [n, 4], classes [n]


def new_detector() -> YolosForObjectDetection:
    torch.manual_seed(SEED)
    config = YolosConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=[SIZE, SIZE],
        patch_size=PATCH,
        num_detection_tokens=_QUERIES,
        use_mid_position_embeddings=False,
        id2label=dict(enumerate(SHAPES)),
        label2id={shape: i for i, shape in enumerate(SHAPES)},
    )
    detector = YolosForObjectDetection(config)
    embeddings = detector.vit.embeddings
    # transformers leaves both at zero, which would make all queries alike.
    nn.init.normal_(embeddings.position_embeddings, std=0.1)
    nn.init.normal_(embeddings.detection_tokens, std=0.1)
    return detector


def draw_stills(key: str, count: int) -> Stills:
    """Stills with none to three shapes that hardly overlap; boxes are (centre x, centre y, width, height) in [0, 1]."""
    rng = generator(SEED, key)
    images = torch.empty(count, 3, SIZE, SIZE)
    numbers = torch.randint(4, (count,), generator=rng).tolist()
    found = [_draw(images[i : i + 1], number, rng) for i, number in enumerate(numbers)]
    return images, [boxes for boxes, _ in found], [classes for _, classes in found]


def _draw(picture: Tensor, number: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Fill one picture [1, 3, 64, 64] in place; the boxes [n, 4] and classes [n] of its shapes."""
    look = random_look(3, rng, uniform=True)
    scenes = random_scenes(3, rng)
    boxes, classes = torch.empty(0, 4), []
    picture[:] = BACKGROUNDS[scenes[0].background]
    for row in range(number):
        for center in 8 + (SIZE - 16) * torch.rand(10, 1, 2, generator=rng):
            box = _box(scenes[row].shape, center, look.radius[row])
            if not (iou(box, boxes) > 0.1).any():
                paint(picture, scenes[row], row, center, look)
                boxes = torch.cat([boxes, box])
                classes.append(SHAPES.index(scenes[row].shape))
                break
    picture += 0.3 * look.haze[0] * (0.5 - picture)
    return boxes, torch.tensor(classes, dtype=torch.long)


def _box(shape: str, center: Tensor, radius: Tensor) -> Tensor:
    """[1, 4]: what can be seen of a shape."""
    grid = torch.arange(SIZE) + 0.5
    mask = shape_mask(shape, grid[None, :] - center[0, 0], grid[:, None] - center[0, 1], radius) > 0.5
    x, y = (mask.any(axis).nonzero().flatten() for axis in (0, 1))
    left, right, top, bottom = (int(v) for v in (x[0], x[-1] + 1, y[0], y[-1] + 1))
    return torch.tensor([[(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]]) / SIZE


def train_detector(work: Path, steps: int = STEPS) -> YolosForObjectDetection:
    """Train on a pool of stills, flipped left to right half of the time."""
    detector = new_detector()
    images, boxes, classes = draw_stills("detector pool", _POOL)
    mirrored = [torch.cat([1 - part[:, :1], part[:, 1:]], dim=1) for part in boxes]

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(_POOL, (_BATCH,), generator=rng)
        flip = torch.rand(_BATCH, generator=rng) < 0.5
        batch = torch.where(flip[:, None, None, None], images[rows].flip(-1), images[rows])
        aims = [(mirrored if turned else boxes)[row] for row, turned in zip(rows.tolist(), flip.tolist(), strict=True)]
        kinds = [classes[row] for row in rows.tolist()]
        output = detector(pixel_values=normalise(roughen(batch, rng), IMAGENET_NORM))
        patches = output.last_hidden_state[:, 1:-_QUERIES]
        dense = detector.class_labels_classifier(patches), detector.bbox_predictor(patches).sigmoid()
        by_query = _loss(output.logits, output.pred_boxes, _match(output.logits, output.pred_boxes, aims, kinds))
        return by_query + _loss(*dense, _by_place(aims, kinds))

    fit("detector", detector, loss, steps=steps, learning_rate=2e-3, work=work)
    return detector


@dataclass(frozen=True)
class Wanted:
    """What tokens should say: class [N, tokens], and the boxes [found, 4] of those at `found`, a mask [N, tokens]."""

    classes: Tensor
    found: Tensor
    boxes: Tensor


def _loss(logits: Tensor, boxes: Tensor, wanted: Wanted) -> Tensor:
    """Carion et al. 2020 (DETR): cross-entropy, distance of the boxes and their generalised overlap."""
    weight = torch.ones(logits.shape[-1])
    weight[-1] = _NO_OBJECT
    named = F.cross_entropy(logits.float().flatten(0, 1), wanted.classes.flatten(), weight)
    return named + _apart(boxes.float()[wanted.found], wanted.boxes).sum() / max(1, len(wanted.boxes))


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return 5 * (a - b).abs().sum(-1) + 2 * (1 - generalised_iou(a, b))


@torch.no_grad()
def _match(logits: Tensor, boxes: Tensor, aims: list[Tensor], kinds: list[Tensor]) -> Wanted:
    """Queries are matched one to one to what is there; the rest should say «no object»."""
    classes = torch.full(logits.shape[:2], logits.shape[-1] - 1)
    matched = torch.zeros(*logits.shape[:2], 4)
    for i, (aim, kind) in enumerate(zip(aims, kinds, strict=True)):
        cost = _apart(boxes[i].float()[:, None], aim[None]) - logits[i].float().softmax(-1)[:, kind]
        queries, targets = linear_sum_assignment(cost.numpy())
        classes[i, queries] = kind[targets]
        matched[i, queries] = aim[targets]
    found = classes < logits.shape[-1] - 1
    return Wanted(classes, found, matched[found])


def _by_place(aims: list[Tensor], kinds: list[Tensor]) -> Wanted:
    """Each patch whose centre lies in a box should say so: the queries then only gather what the patches know."""
    grid = (torch.arange(SIZE // PATCH) + 0.5) * PATCH / SIZE
    centers = torch.stack([grid.repeat(len(grid)), grid.repeat_interleave(len(grid))], dim=1)
    classes = torch.full((len(aims), len(centers)), len(SHAPES))
    boxes = torch.zeros(len(aims), len(centers), 4)
    for i, (aim, kind) in enumerate(zip(aims, kinds, strict=True)):
        for box, label in zip(aim, kind, strict=True):
            inside = ((centers - box[:2]).abs() < box[2:] / 2).all(1)
            classes[i, inside] = label
            boxes[i, inside] = box
    found = classes < len(SHAPES)
    return Wanted(classes, found, boxes[found])


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] that broadcast."""
    (low_a, high_a), (low_b, high_b) = _corners(a), _corners(b)
    shared = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    return shared / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared).clamp(min=1e-9)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Rezatofighi et al. 2019: also tells how far apart boxes are that do not meet."""
    (low_a, high_a), (low_b, high_b) = _corners(a), _corners(b)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1).clamp(min=1e-9)
    overlap = iou(a, b)
    union = (a[..., 2:].prod(-1) + b[..., 2:].prod(-1)) / (1 + overlap)
    return overlap - (hull - union) / hull


@torch.no_grad()
def judge_detector(detector: YolosForObjectDetection, count: int = 500) -> dict[str, float]:
    """Average precision on fresh stills at an overlap of a half, for each class, and their mean."""
    images, boxes, classes = draw_stills("detector judge", count)
    output = detector(pixel_values=normalise(images, IMAGENET_NORM))
    score, label = output.logits.softmax(-1)[..., :-1].max(-1)
    each = {}
    for kind, shape in enumerate(SHAPES):
        truth = [aim[kinds == kind] for aim, kinds in zip(boxes, classes, strict=True)]
        found = [(float(score[i, q]), i, output.pred_boxes[i, q]) for i, q in (label == kind).nonzero().tolist()]
        each[f"AP50 {shape}"] = average_precision(found, truth)
    return {**each, "AP50": sum(each.values()) / len(each)}


def average_precision(found: list[tuple[float, int, Tensor]], truth: list[Tensor], overlap: float = 0.5) -> float:
    """Area under precision over recall, every point of it, for one class.

    Args:
        found: score, image and box [4] of each detection.
        truth: per image its boxes [n, 4]; each can be found once, and the second time counts as a mistake.
    """
    used = [torch.zeros(len(boxes), dtype=torch.bool) for boxes in truth]
    hits = []
    for _, image, box in sorted(found, key=lambda detection: -detection[0]):
        shared = iou(box[None], truth[image]).masked_fill(used[image], 0)
        best = int(shared.argmax()) if len(shared) else -1
        hits.append(best >= 0 and bool(shared[best] >= overlap))
        if hits[-1]:
            used[image][best] = True
    right = torch.tensor(hits, dtype=torch.float64).cumsum(0)
    precision = right / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * torch.tensor(hits)).sum() / max(1, sum(len(boxes) for boxes in truth)))


def save_detector(detector: YolosForObjectDetection, folder: Path) -> None:
    """Write the transformers folder, weights in float16."""
    detector.half().save_pretrained(folder)
    processor = {
        "image_processor_type": "YolosImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": IMAGENET_NORM[0],
        "image_std": IMAGENET_NORM[1],
        "format": "coco_detection",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
