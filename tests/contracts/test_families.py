"""What every family of video models promises, on a tiny checkpoint of each, for text and for start images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from tiny import Brightness
from tiny_families import VARIANTS, Tiny
from torch import Tensor
from vader_nodes.vader_backend import placement, registry
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.generate import SampleConfig, VideoConfig, generate, start_images
from vader_nodes.vader_backend.lora import LoraConfig, applied, attached, export, load_lora, save_lora
from vader_nodes.vader_backend.lora_formats import Layout
from vader_nodes.vader_backend.memory.gradient_checkpointing import gradient_checkpointing
from vader_nodes.vader_backend.models.base import PATHS, VideoModel
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.types import Conditioning, VideoSpec

PROMPTS = ("a red circle", "the blue square")
LORA = LoraConfig(rank=2, alpha=2.0, dropout=0.0)
SAME = 1e-4  # of values about 1; sums of another order differ by less


@dataclass(frozen=True)
class Case:
    """A model with what its tests need."""

    tiny: Tiny
    model: VideoModel

    @property
    def video(self) -> VideoSpec:
        return self.tiny.video

    def noise(self, batch: int = 2) -> Tensor:
        shape = self.model.latent_shape(self.video, batch)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def encode(self, negative: str = "") -> Conditioning:
        images = start_images(self.tiny.pictures(len(PROMPTS)), self.video)
        return self.model.encode(PROMPTS, self.video, negative=negative, images=images)

    @torch.no_grad()
    def predict(self) -> Tensor:
        return self.model.predict(self.noise(), self.middle, dict(self.encode().positive))

    @property
    def middle(self) -> float:
        """A native time in the middle of the schedule."""
        return self.model.process.schedule(3, self.video).timesteps[1]

    def objective(self) -> vader.Vader:
        config = vader.Config(sampling_steps=3, k=2, reward_frames="even", frame_count=2)
        prompts = PromptSet(PROMPTS, (), self.tiny.pictures(len(PROMPTS)))
        return vader.build(config, self.model, Brightness(), prompts, self.video, seed=3)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny, folder = VARIANTS[request.param], tmp_path_factory.mktemp(request.param)
    tiny.write(folder)
    return Case(tiny, tiny.build(folder))


@pytest.fixture
def unchanged(case: Case) -> Iterator[None]:
    """What a test does to the base is undone, to the bit."""
    before, predicted = {key: tensor.clone() for key, tensor in weights(case.model).items()}, case.predict()
    yield
    assert_equal(before, weights(case.model))
    assert torch.equal(predicted, case.predict())
    assert not any("lora" in name for name, _ in case.model.denoiser.named_modules())


def weights(model: VideoModel) -> dict[str, Tensor]:
    return {f"{part}.{key}": t for part, net in model.parts().items() for key, t in net.state_dict().items()}


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_the_run_is_told_what_was_chosen_at_loading(case: Case) -> None:
    """All of it: a field of the Config that the run's hash leaves out would give a finished run to other settings."""
    config = registry.load("models", case.tiny.family).Config
    assert set(case.model.settings) == {field.name for field in fields(config)} - set(PATHS)
    assert case.tiny.settings.items() <= dict(case.model.settings).items()


def test_every_family_has_a_tiny_checkpoint() -> None:
    lacking = set(registry.names("models")) - {tiny.family for tiny in VARIANTS.values()}
    assert not lacking, f"add a tiny checkpoint to tests/tiny_families.py for: {', '.join(sorted(lacking))}"


# --- conditioning and sampling ---------------------------------------------------------------


def test_each_prompt_has_its_row_in_both_branches(case: Case) -> None:
    cond = case.encode(negative="" if case.tiny.family == "svd" else "green")
    assert cond.positive.keys() == cond.negative.keys()
    assert {len(t) for part in (cond.positive, cond.negative) for t in part.values()} == {len(PROMPTS)}
    assert any(not torch.equal(t, cond.negative[name]) for name, t in cond.positive.items())
    assert any(not torch.equal(t[0], t[1]) for t in cond.positive.values())


def test_placed_encoding_gives_the_same(case: Case) -> None:
    images = start_images(case.tiny.pictures(len(PROMPTS)), case.video)
    placed, plain = placement.encode(case.model, PROMPTS, case.video, images=images), case.encode()
    for ours, theirs in ((placed.positive, plain.positive), (placed.negative, plain.negative)):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=SAME)


def test_samples_do_not_mix(case: Case) -> None:
    cond, z = case.encode(), case.noise()
    with torch.no_grad():
        alone = case.model.predict(z[1:], case.middle, dict(cond.select([1]).positive))
    both = case.predict()
    assert both.shape == z.shape
    assert both.dtype == torch.float32
    assert (both[1:] - alone).abs().max() < SAME * both.abs().max()


def test_videos_are_sampled(case: Case) -> None:
    size = VideoConfig(case.video.frames, case.video.height, case.video.width)
    videos = generate(case.model, PROMPTS, SampleConfig(steps=2), size, images=case.tiny.pictures(len(PROMPTS)))
    assert videos.shape == (2, case.video.frames, 3, case.video.height, case.video.width)
    assert videos.isfinite().all()
    assert 0 <= videos.min() < videos.max() <= 1


# --- decoding --------------------------------------------------------------------------------


@torch.no_grad()
def test_chosen_frames_are_those_of_the_whole(case: Case, record_property: Callable[[str, object], None]) -> None:
    z, last = case.noise(), case.video.frames - 1
    whole = case.model.decode(z, range(case.video.frames))
    chosen = [last, 0, last // 2]
    assert (case.model.decode(z, chosen) - whole[:, chosen]).abs().max() < SAME
    error = (whole - case.tiny.unchunked(case.model, z, case.video.frames)).abs()
    record_property("largest_error_against_unchunked_decode", float(error.max()))
    record_property("mean_error_against_unchunked_decode", float(error.mean()))
    assert (error.max() < SAME) == case.tiny.exact, f"off by {error.max():.4f}, on average {error.mean():.4f}"


def test_latents_have_the_stated_shape(case: Case) -> None:
    video = torch.rand(1, case.video.frames, 3, case.video.height, case.video.width)
    assert case.model.encode_video(video).shape == case.model.latent_shape(case.video, 1)


# --- training --------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_lora_is_attached_saved_loaded_and_removed(case: Case, layout: Layout, tmp_path: Path) -> None:
    base, model = case.predict(), case.model
    with attached(model, LORA, seed=1) as parameters:
        assert torch.equal(case.predict(), base)
        randomise(parameters)
        trained = case.predict()
        save_lora(tmp_path / "lora.safetensors", export(model, dict(parameters), 1.0, {}, layout))
    assert (trained - base).abs().max() > 10 * SAME * base.abs().max()
    with applied(model, load_lora(tmp_path / "lora.safetensors")):
        assert (case.predict() - trained).abs().max() < SAME * trained.abs().max()


def randomise(parameters: Mapping[str, Tensor]) -> None:
    rng = torch.Generator().manual_seed(2)
    for parameter in parameters.values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)


@pytest.mark.usefixtures("unchanged")
def test_one_step_lowers_the_loss(case: Case) -> None:
    objective = case.objective()
    (batch,) = objective.collect(0, 2)
    with attached(case.model, LORA, seed=0) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
        before, metrics = objective.loss(batch)
        before.backward()
        optimizer.step()
        after, _ = objective.loss(batch)
    assert metrics["reward"].shape == (2,)
    assert after.item() < before.item()


@pytest.mark.usefixtures("unchanged")
def test_checkpointing_leaves_the_gradient_as_it_is(case: Case) -> None:
    objective = case.objective()
    (batch,) = objective.collect(0, 1)
    with attached(case.model, LORA, seed=0) as parameters:
        randomise(parameters)
        plain = torch.autograd.grad(objective.loss(batch)[0], list(parameters.values()))
        with gradient_checkpointing(case.model):
            spared = torch.autograd.grad(objective.loss(batch)[0], list(parameters.values()))
    assert any(gradient.any() for gradient in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, spared, strict=True))


def test_gradient_reaches_latents_through_network_and_decoder(case: Case) -> None:
    z, cond = case.noise().requires_grad_(), case.encode()
    prediction = case.model.predict(z, case.middle, dict(cond.positive))
    (gradient,) = torch.autograd.grad(case.model.decode(prediction, [1]).mean(), z)
    assert gradient.isfinite().all()
    assert gradient[0].any()
    assert gradient[1].any()


# --- the rest --------------------------------------------------------------------------------


def test_everything_is_frozen(case: Case) -> None:
    assert {"denoiser", "vae"} < case.model.parts().keys()
    for name, network in case.model.parts().items():
        assert not network.training, name
        assert not any(p.requires_grad for p in network.parameters()), name


@pytest.mark.parametrize("size", [(8, 65, 64), (8, 64, 1), (0, 64, 64)])
def test_sizes_outside_the_model_are_refused(case: Case, size: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"multiple of|at least"):
        case.model.check(VideoSpec(*size))
    case.model.check(case.video)
    case.model.check(case.model.defaults.video)


def test_the_end_of_a_long_prompt_is_told(case: Case) -> None:
    assert case.model.truncated("a red") == ""
    if case.tiny.family != "svd":  # it reads no text
        assert case.model.truncated("a red circle " * 200 + "sea").endswith("sea")
