"""Every family that has an embedded checkpoint: shapes, ranges, partial decoding, gradients."""

from __future__ import annotations

import pytest
import torch
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.files import ROOT, weights
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, random_look, render
from vader_nodes.vader_backend.models.base import VideoModel
from vader_nodes.vader_backend.types import VideoSpec

EMBEDDED = [name for name in registry.names("models") if (ROOT / name).is_dir()]


@pytest.fixture(scope="module", params=EMBEDDED)
def model(request: pytest.FixtureRequest) -> VideoModel:
    module = registry.load("models", request.param)
    folder = weights(request.param)
    assert module.matches(folder)
    return module.build(module.Config(folder=str(folder)))


def clip_of(model: VideoModel) -> torch.Tensor:
    video = model.defaults.video
    return render(SEEN_SCENES[:2], random_look(2, torch.Generator().manual_seed(0)), video.frames)


def test_latents_have_the_stated_shape_and_unit_scale(model: VideoModel) -> None:
    latents = model.encode_video(clip_of(model))
    assert latents.shape == model.latent_shape(model.defaults.video, 2)
    assert 0.4 < latents.std() < 2.5


def test_decoding_gives_back_what_was_encoded(model: VideoModel) -> None:
    video = clip_of(model)
    with torch.no_grad():
        decoded = model.decode(model.encode_video(video), range(video.shape[1]))
    assert decoded.shape == video.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    assert (decoded - video).abs().mean() < 0.05


def test_a_frame_decoded_alone_is_the_frame_of_the_whole(model: VideoModel) -> None:
    latents = model.encode_video(clip_of(model))
    with torch.no_grad():
        whole = model.decode(latents, range(model.defaults.video.frames))
        part = model.decode(latents, [1, 3])
    assert (whole[:, [1, 3]] - part).abs().max() < 1e-4


def test_gradient_reaches_latents_through_the_network_and_the_decoder(model: VideoModel) -> None:
    cond = model.encode(["a red circle", "a blue cross"], model.defaults.video)
    z = torch.randn(model.latent_shape(model.defaults.video, 2), requires_grad=True)
    prediction = model.predict(z, 500, dict(cond.positive))
    assert prediction.shape == z.shape
    assert prediction.dtype == torch.float32
    (gradient,) = torch.autograd.grad(model.decode(prediction, [0]).mean(), z)
    assert gradient.isfinite().all()
    assert gradient[0].any()
    assert gradient[1].any()


def test_samples_do_not_mix(model: VideoModel) -> None:
    cond = model.encode(["a red circle", "a blue cross"], model.defaults.video)
    z = torch.randn(model.latent_shape(model.defaults.video, 2))
    with torch.no_grad():
        both = model.predict(z, 300, dict(cond.positive))
        alone = model.predict(z[1:], 300, dict(cond.select([1]).positive))
    assert (both[1:] - alone).abs().max() < 1e-4


def test_everything_is_frozen(model: VideoModel) -> None:
    for name, network in model.parts().items():
        assert not network.training, name
        assert not any(p.requires_grad for p in network.parameters()), name


@pytest.mark.parametrize("size", [(8, 65, 64), (8, 64, 1), (0, 64, 64)])
def test_sizes_outside_the_model_are_refused(model: VideoModel, size: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"multiple of|at least"):
        model.check(VideoSpec(*size))


def test_the_end_of_a_long_prompt_is_told(model: VideoModel) -> None:
    assert model.truncated("a red circle") == ""
    assert model.truncated("a red circle " + "moving left and " * 200 + "omega").endswith("omega")
