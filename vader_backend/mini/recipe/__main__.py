"""Trains every mini network, judges it, and writes the embedded weights.

Each training resumes where it was interrupted; a finished one is only judged again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ...checkpoint import write_text
from ...loading import load_frozen
from ...rewards._clip import load_clip
from ..files import ROOT
from .aesthetic import judge_aesthetic, save_aesthetic, train_aesthetic
from .aesthetic_v25 import aesthetic_v25
from .clip import judge_clip, save_clip, train_clip
from .contrasts import image_rewards
from .detector import judge_detector, save_detector, train_detector
from .image_autoencoder import image_autoencoder
from .imagereward import imagereward
from .opensora import opensora
from .svd import svd
from .text_to_video import judge_text_to_video, save_text_to_video, train_text_to_video
from .tokenizer import save_tokenizer
from .vae import judge_vae, save_vae, train_vae
from .viclip import viclip
from .videocrafter2 import videocrafter2
from .videomae import videomae
from .videoreward import videoreward
from .vjepa import vjepa


def main() -> None:
    """Entry point of `make mini`."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.vader_backend.mini.recipe", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/mini"), help="folder of the checkpoints")
    parser.add_argument("--weights", type=Path, default=ROOT, help="folder to write the weights to")
    parser.add_argument("--only", choices=tuple(_NETWORKS), help="train one network and leave the others")
    options = parser.parse_args()
    for name, make in _NETWORKS.items():
        if options.only in (None, name):
            _report(options.weights, name, make(options.work, options.weights))


def _clip(work: Path, weights: Path) -> dict[str, Any]:
    tokenizer = save_tokenizer(work / "tokenizer")
    model = train_clip(tokenizer, work)
    quality = judge_clip(model, tokenizer)
    save_clip(model, weights / "clip")
    return quality


def _aesthetic(work: Path, weights: Path) -> dict[str, Any]:
    clip = load_clip(weights / "clip")
    head = train_aesthetic(clip, work)
    quality = judge_aesthetic(clip, head)
    save_aesthetic(head, weights / "aesthetic" / "head.safetensors")
    return quality


def _detector(work: Path, weights: Path) -> dict[str, Any]:
    detector = train_detector(work)
    quality = judge_detector(detector)
    save_detector(detector, weights / "detector")
    return quality


def _autoencoder(work: Path, weights: Path) -> dict[str, Any]:
    vae = train_vae(work)
    quality = judge_vae(vae)
    save_vae(vae, weights / "modelscope")
    return quality


def _text_to_video(work: Path, weights: Path) -> dict[str, Any]:
    vae = load_frozen(AutoencoderKL, weights / "modelscope" / "vae", torch.float32, "mini autoencoder")
    tokenizer = save_tokenizer(work / "tokenizer")
    model = train_text_to_video(vae, tokenizer, work)
    quality = judge_text_to_video(model, vae, tokenizer)
    save_text_to_video(model, weights / "modelscope")
    return quality


# In this order: the aesthetic head stands on the written CLIP, text to video on the written autoencoder.
_NETWORKS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "clip": _clip,
    "aesthetic": _aesthetic,
    "detector": _detector,
    "autoencoder": _autoencoder,
    "text_to_video": _text_to_video,
    "image_autoencoder": image_autoencoder,
    "videocrafter2": videocrafter2,
    "svd": svd,
    "opensora": opensora,
    "videomae": videomae,
    "vjepa": vjepa,
    "viclip": viclip,
    "image_rewards": image_rewards,
    "imagereward": imagereward,
    "aesthetic_v25": aesthetic_v25,
    "videoreward": videoreward,
}


def _report(weights: Path, name: str, quality: dict[str, Any]) -> None:
    """Print the quality and keep it beside the weights."""
    path = weights / "quality.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_text(path, json.dumps({**known, name: quality}, indent=2) + "\n")
    print(f"{name}: {json.dumps(quality, indent=2)}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(max(2, torch.get_num_threads()))
    main()
