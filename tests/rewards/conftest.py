"""The smallest networks of each kind, with random weights, in the folder layouts that the rewards read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import PIL
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, YolosConfig, YolosForObjectDetection
from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer
from vader_nodes.vader_backend.registry import load
from vader_nodes.vader_backend.rewards._images import PerFrameReward

WIDTH = 16
HEIGHT_FIRST = int(PIL.__version__.partition(".")[0]) >= 13  # whether Pillow scales as `_fit.scaled` does
LAYERS = {0: (12, WIDTH), 2: (10, 12), 4: (8, 10), 6: (6, 8), 7: (1, 6)}
PROMPTS = ("a red circle moving left on a black background", "a blue cross moving up on a white background")


@pytest.fixture(scope="session")
def head_tensors() -> dict[str, Tensor]:
    return draw_head()


def draw_head() -> dict[str, Tensor]:
    """A LAION head on features 16 wide."""
    rng = torch.Generator().manual_seed(3)
    weights = {f"layers.{i}.weight": torch.randn(shape, generator=rng) for i, shape in LAYERS.items()}
    return weights | {f"layers.{i}.bias": torch.randn(shape[0], generator=rng) for i, shape in LAYERS.items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, head_tensors: dict[str, Tensor]) -> Path:
    """clip/, detector/ and head.safetensors."""
    root = tmp_path_factory.mktemp("networks")
    save_image_networks(root)
    save_file(head_tensors, root / "head.safetensors")
    return root


@pytest.fixture
def make(folder: Path) -> Callable[..., PerFrameReward]:
    """make("hps", frames=2): a reward by its file name, on the small networks."""
    own: dict[str, dict[str, object]] = {
        "aesthetic": {"checkpoint": "clip", "head": "head.safetensors"},
        "hps": {"checkpoint": "clip"},
        "pickscore": {"checkpoint": "clip"},
        "clipscore": {"checkpoint": "clip"},
        "yolos": {"checkpoint": "detector", "target": "book", "height": 16},
    }

    def build(kind: str, dtype: torch.dtype = torch.float32, **settings: object) -> PerFrameReward:
        module = load("rewards", kind)
        reward = module.build(module.Config(**{**own[kind], **settings}), lambda name: folder / name)
        for network in reward.networks():
            network.to(dtype)
        return reward

    return build


def save_image_networks(root: Path) -> None:
    """A CLIP of pictures of 16 x 16 and texts of 12 tokens, and a detector of three classes: clip/ and detector/."""
    tokenizer = save_tokenizer(root / "clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    _spread(clip)
    clip.save_pretrained(root / "clip")
    labels = {0: "N/A", 1: "book", 2: "cup", 3: "teddy bear"}
    detector = YolosForObjectDetection(
        YolosConfig(
            **tower, image_size=[16, 16], patch_size=8, num_detection_tokens=5, use_mid_position_embeddings=False,
            id2label=labels, label2id={name: i for i, name in labels.items()},
        )
    )  # fmt: skip
    _spread(detector)
    detector.save_pretrained(root / "detector")


def video(frames: int = 2, height: int = 20, width: int = 28, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two videos of noise, away from black and white."""
    noise = torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return 0.2 + 0.6 * noise


def _spread(network: nn.Module) -> None:
    """Larger weights than transformers draws, so that scores differ visibly."""
    rng = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        if parameter.dim() > 1 or not parameter.any():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
