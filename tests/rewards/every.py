"""Every registered reward on the smallest checkpoint in its published layout, and where its own are, embedded ones."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.mini.files import PREFIX, ROOT

from .conftest import draw_head, save_image_networks
from .tiny_beyond import save_aesthetic_v25, save_imagereward, save_videoreward
from .video_networks import save_viclip, save_videomae, save_vjepa

KINDS = tuple(registry.names("rewards"))
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "standing still")
# What names the checkpoints that `save_all` writes.
SETTINGS: dict[str, dict[str, Any]] = {
    "aesthetic": {"checkpoint": "clip", "head": "head.safetensors"},
    "hps": {"checkpoint": "clip"},
    "pickscore": {"checkpoint": "clip"},
    "clipscore": {"checkpoint": "clip"},
    "yolos": {"checkpoint": "detector", "target": "book", "height": 16},
    "videomae": {"checkpoint": "videomae"},
    "vjepa": {"checkpoint": "vjepa/vitl16.pth.tar"},
    "viclip": {"checkpoint": "viclip/ViClip.pth"},
    "imagereward": {"checkpoint": "imagereward"},
    "aesthetic_v25": {"checkpoint": "siglip/siglip", "head": "siglip/head.pth"},
    "videoreward": {"checkpoint": "videoreward/VideoReward", "base": "videoreward/qwen"},
    "mini_oracle": {},
    "mini_vividness": {},
}
NETWORKS = tuple(kind for kind in KINDS if SETTINGS[kind])


def save_all(root: Path) -> Path:
    """A folder with a tiny checkpoint for each reward."""
    save_image_networks(root)
    save_file(draw_head(), root / "head.safetensors")
    save_videomae(root / "videomae", MOTIONS)
    save_vjepa(root / "vjepa")
    save_viclip(root / "viclip")
    save_imagereward(root / "imagereward")
    save_aesthetic_v25(root / "siglip")
    save_videoreward(root / "videoreward")
    return root


def build(kind: str, root: Path, **settings: Any) -> Any:
    """A reward on what `save_all` wrote, in float32 unless told otherwise."""
    module = registry.load("rewards", kind)
    return module.build(module.Config(**{**_exact(module), **SETTINGS[kind], **settings}), lambda name: root / name)


def build_default(kind: str, root: Path) -> Any:
    """A reward with its default settings on embedded weights; on those in `root` where none are embedded."""
    module = registry.load("rewards", kind)
    config = module.Config(**_exact(module))
    names = [getattr(config, name) for name in path_fields(kind)]
    if all(name.startswith(PREFIX) and (ROOT / name.removeprefix(PREFIX)).exists() for name in names):
        return module.build(config)
    return build(kind, root)


def path_fields(kind: str) -> list[str]:
    """The settings that name a reward's files."""
    return [name for name in SETTINGS[kind] if name in ("checkpoint", "head", "base")]


def _exact(module: Any) -> dict[str, str]:
    return {field.name: "float32" for field in fields(module.Config) if field.name == "dtype"}
