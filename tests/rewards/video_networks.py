"""The smallest video networks, with random weights, in the layouts that the rewards read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VJEPA2Config, VJEPA2Model
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer
from vader_nodes.vader_backend.registry import load

from .conftest import _spread

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vjepa.safetensors"
VICLIP_FIXTURE = FIXTURE.with_name("viclip.safetensors")
LABELS = ("riding a bike", "playing chess", "playing guitar", "playing bass guitar", "eating doughnuts", "jogging")
FRAMES = 4
SIZE = 32


def save_videomae(folder: Path, labels: Sequence[str] = LABELS) -> None:
    """A classifier on 4 frames of 32 x 32."""
    config = VideoMAEConfig(
        image_size=SIZE, patch_size=16, num_frames=FRAMES, tubelet_size=2, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    model = VideoMAEForVideoClassification(config)
    _spread(model)
    model.save_pretrained(folder)


def vjepa_parts() -> dict[str, dict[str, Tensor]]:
    """The tables of an original checkpoint: a network on 4 frames of 32 x 32."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read(FIXTURE).weights.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts


def save_vjepa(folder: Path) -> None:
    """As the original's training writes it, optimizer and all."""
    folder.mkdir()
    weights = vjepa_parts()
    some = weights["encoder"]["module.backbone.norm.bias"]
    training = {"opt": {"state": {0: {"exp_avg": some}}, "param_groups": [{"lr": 0.1}]}, "scaler": None, "epoch": 3}
    torch.save({**weights, **training}, folder / "vitl16.pth.tar")


def save_vjepa2(folder: Path) -> None:
    """V-JEPA 2 on 4 frames of 32 x 32."""
    config = VJEPA2Config(
        patch_size=8, crop_size=SIZE, frames_per_clip=FRAMES, tubelet_size=2, hidden_size=24, num_attention_heads=2,
        num_hidden_layers=2, mlp_ratio=2.0, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2,
        pred_mlp_ratio=2.0, pred_num_mask_tokens=3,
    )  # fmt: skip
    model = VJEPA2Model(config)
    _spread(model)
    model.save_pretrained(folder)


def viclip_tensors(words: int) -> dict[str, Tensor]:
    """Those of the fixture, on 4 frames of 28 x 28, made for a tokenizer of so many words."""
    own = read(VICLIP_FIXTURE).weights
    width = own["text_encoder.token_embedding.weight"].shape[1]
    embedding = torch.randn(words, width, generator=torch.Generator().manual_seed(6))
    return {**own, "text_encoder.token_embedding.weight": embedding}


def save_viclip(folder: Path) -> None:
    """ViClip.pth, as it is published, with its tokenizer beside it."""
    words = len(save_tokenizer(folder / "tokenizer"))
    torch.save({"model": viclip_tensors(words)}, folder / "ViClip.pth")


# By kind: the reward, what writes a checkpoint into a folder, and which file of it is named ("": the folder).
SOURCES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "videomae": ("videomae", save_videomae, ""),
    "vjepa": ("vjepa", save_vjepa, "vitl16.pth.tar"),
    "vjepa2": ("vjepa", save_vjepa2, "model.safetensors"),
}
ACTIONS = ("a cat riding a bike", "a dog playing chess")


def build(kind: str, folder: Path, cast: torch.dtype | None = None, **settings: Any) -> Any:
    """A reward on a checkpoint of SOURCES; cast: a precision to convert the loaded weights to."""
    name, _, file = SOURCES[kind]
    module = load("rewards", name)
    reward = module.build(module.Config(checkpoint="x", **settings), lambda _: folder / file)
    for network in reward.networks():
        network.to(cast)
    return reward
