"""Encoders are on the device while they encode, and everything is back afterwards; many prompts go in groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Brightness, tiny_model
from torch import Tensor, nn
from vader_nodes.nodes import device, host
from vader_nodes.nodes.sample import VaderApplyLoRASample
from vader_nodes.nodes.train import VaderTrainLoRA
from vader_nodes.vader_backend.memory.idle_offload import idle_offload
from vader_nodes.vader_backend.placement import encode, residents
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.types import Conditioning, VideoSpec

VIDEO = VideoSpec(1, 8, 8)
HERE, THERE = torch.device("cpu"), torch.device("cuda")


class Network(nn.Module):
    """A network that says where it is put, on devices that need not exist."""

    def __init__(self, name: str, moves: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.moves, self.place = name, moves, HERE

    def to(self, device: torch.device | str) -> Network:  # type: ignore[override]
        device = torch.device(device)
        if device != self.place:
            self.moves.append((self.name, device.type))
        self.place = device
        return self

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=self.place)


class Model:
    """A model that notes where its networks are while it encodes."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, str]] = []
        self.denoiser, self.vae, self.text, self.image = (
            Network(name, self.moves) for name in ("denoiser", "vae", "text", "image")
        )
        self.groups: list[int] = []
        self.places: list[str] = []
        self.fail = False

    @property
    def device(self) -> torch.device:
        return self.denoiser.place

    def parts(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "vae": self.vae, "text_encoder": self.text, "image_encoder": self.image}

    def encode(
        self, prompts: Sequence[str], video: VideoSpec, *, negative: str, images: Tensor | None, rng: object
    ) -> Conditioning:
        self.groups.append(len(prompts))
        self.places = [network.place.type for network in (self.denoiser, self.vae, self.text, self.image)]
        if self.fail:
            raise RuntimeError("out of memory")
        rows = torch.tensor([[float(prompt)] for prompt in prompts])
        return Conditioning({"text": rows if images is None else images + rows}, {"text": -rows})

    def predict(self) -> None:
        self.moves.append(("predict", ""))

    def decode(self) -> Tensor:
        self.moves.append(("decode", ""))
        return torch.ones(1, requires_grad=True).exp()


@pytest.fixture
def model() -> Model:
    """Placed as in a run: the encoders stay behind."""
    model = Model()
    for network in residents(model):  # type: ignore[arg-type]
        network.to(THERE)
    model.moves.clear()
    return model


def encoded(model: Model, count: int, images: Tensor | None = None) -> Conditioning:
    return encode(model, [str(i) for i in range(count)], VIDEO, images=images)  # type: ignore[arg-type]


def test_a_run_keeps_denoiser_and_autoencoder(model: Model) -> None:
    assert residents(model) == [model.denoiser, model.vae]  # type: ignore[arg-type]
    assert [network.place for network in (model.denoiser, model.vae, model.text, model.image)] == [
        THERE, THERE, HERE, HERE
    ]  # fmt: skip


def test_encoders_take_the_denoisers_place(model: Model) -> None:
    encoded(model, 2)
    assert model.places == ["cpu", "cuda", "cuda", "cuda"]
    assert model.moves == [
        ("denoiser", "cpu"), ("text", "cuda"), ("image", "cuda"),
        ("image", "cpu"), ("text", "cpu"), ("denoiser", "cuda"),
    ]  # fmt: skip


def test_images_bring_the_autoencoder_from_wherever_it_lies(model: Model) -> None:
    model.vae.place = HERE
    encoded(model, 2, torch.ones(2, 1))
    assert model.places == ["cpu", "cuda", "cuda", "cuda"]
    assert model.vae.place == HERE


def test_on_the_cpu_nothing_moves() -> None:
    model = Model()
    encoded(model, 2, torch.ones(2, 1))
    assert not model.moves


@pytest.mark.parametrize("images", [None, torch.ones(2, 1)])
def test_a_failure_puts_everything_back(model: Model, images: Tensor | None) -> None:
    model.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        encoded(model, 2, images)
    assert [network.place for network in (model.denoiser, model.vae, model.text, model.image)] == [
        THERE, THERE, HERE, HERE
    ]  # fmt: skip


def test_many_prompts_are_encoded_in_groups_and_images_one_by_one(model: Model) -> None:
    found = encoded(model, 18)
    assert model.groups == [8, 8, 2]
    assert found.positive["text"].flatten().tolist() == list(range(18))
    assert found.negative["text"].flatten().tolist() == [-i for i in range(18)]
    model.groups.clear()
    found = encoded(model, 3, torch.tensor([[10.0], [20.0], [30.0]]))
    assert model.groups == [1, 1, 1]
    assert found.positive["text"].flatten().tolist() == [10, 21, 32]


def test_a_workspace_places_what_it_is_given_and_takes_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host.Alone, "device", lambda self: THERE)
    model = Model()
    with device.workspace(residents(model)):  # type: ignore[arg-type]
        encoded(model, 1)
        assert model.device == THERE
    assert model.moves == [
        ("denoiser", "cuda"), ("vae", "cuda"),
        ("denoiser", "cpu"), ("text", "cuda"), ("image", "cuda"),
        ("image", "cpu"), ("text", "cpu"), ("denoiser", "cuda"),
        ("denoiser", "cpu"), ("vae", "cpu"),
    ]  # fmt: skip


class Asked(Exception):
    """What a node wants to have on the device."""


def test_nodes_leave_the_encoders_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def workspace(networks: Iterable[nn.Module]) -> None:
        raise Asked(*networks)

    monkeypatch.setattr(device, "workspace", workspace)
    model, prompts = tiny_model(tmp_path, torch.float32), PromptSet(("a red circle",), ())
    with pytest.raises(Asked) as sampled:
        VaderApplyLoRASample().sample(model, prompts)
    with pytest.raises(Asked) as trained:
        VaderTrainLoRA().train(model, Brightness(), prompts)  # type: ignore[arg-type]
    assert sampled.value.args == trained.value.args == (model.denoiser, model.vae)


def test_autoencoder_and_rewards_wait_in_main_memory_while_videos_are_denoised(model: Model) -> None:
    reward = Network("reward", model.moves)
    reward.place = THERE
    with idle_offload(model, [reward], THERE):  # type: ignore[arg-type]
        for _ in range(2):
            model.predict()
        video = model.decode()
        model.moves.append(("score", ""))
        video.register_hook(lambda gradient: model.moves.append(("backward", "")))
        video.sum().backward()
        model.predict()  # a step that is recomputed in the backward pass
    rest, back = [("vae", "cpu"), ("reward", "cpu")], [("vae", "cuda"), ("reward", "cuda")]
    assert model.moves == [
        *rest, ("predict", ""), ("predict", ""),
        ("vae", "cuda"), ("decode", ""), ("reward", "cuda"), ("score", ""),
        ("reward", "cpu"), ("backward", ""), ("vae", "cpu"), ("predict", ""), *back,
    ]  # fmt: skip
    model.moves.clear()
    model.predict()
    assert model.moves == [("predict", "")]


def test_what_waited_in_main_memory_does_not_lie_on_the_device_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of `align`: the tricks first, then the workspaces, which are left first."""
    monkeypatch.setattr(host.Alone, "device", lambda self: THERE)
    model = Model()
    reward = Network("reward", model.moves)
    with (
        idle_offload(model, [reward], THERE),  # type: ignore[arg-type]
        device.workspace(residents(model)),  # type: ignore[arg-type]
        device.workspace([reward]),
    ):
        model.predict()
        model.decode()
        assert [model.vae.place, reward.place] == [THERE, THERE]
    assert [model.denoiser.place, model.vae.place, reward.place] == [HERE, HERE, HERE]
