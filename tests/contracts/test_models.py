"""Every embedded checkpoint: its autoencoder knows the world that it was trained on, at unit scale.

What holds for random weights as well is in test_families.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.mini.files import ROOT, weights
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, random_look, render
from vader_nodes.vader_backend.models.base import VideoModel

EMBEDDED = [name for name in registry.names("models") if (ROOT / name).is_dir()]


@pytest.fixture(scope="module", params=EMBEDDED)
def model(request: pytest.FixtureRequest) -> VideoModel:
    module = registry.load("models", request.param)
    folder = weights(request.param)
    assert module.matches(folder)
    return module.build(module.Config(folder=str(folder)))


@pytest.fixture(scope="module")
def video(model: VideoModel) -> Tensor:
    return render(SEEN_SCENES[:2], random_look(2, torch.Generator().manual_seed(0)), model.defaults.video.frames)


@pytest.fixture(scope="module")
def latents(model: VideoModel, video: Tensor) -> Tensor:
    return model.encode_video(video)


def test_latents_have_the_stated_shape_and_unit_scale(model: VideoModel, latents: Tensor) -> None:
    assert latents.shape == model.latent_shape(model.defaults.video, 2)
    assert 0.4 < latents.std() < 2.5


@torch.no_grad()
def test_decoding_gives_back_what_was_encoded(model: VideoModel, video: Tensor, latents: Tensor) -> None:
    decoded = model.decode(latents, range(video.shape[1]))
    assert decoded.shape == video.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    assert (decoded - video).abs().mean() < 0.05


def test_all_embedded_weights_stay_below_60_megabytes() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 60e6
