"""Without ComfyUI: folders, names that must not leave them, devices; and with a stand-in for ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from vader_nodes.nodes import device, host
from vader_nodes.nodes.load import family, locate
from vader_nodes.vader_backend.config import InputError


def test_files_are_found_in_the_base_directory(empty_base: Path) -> None:
    for name in ("models/loras/sub/a.safetensors", "output/loras/b.safetensors", "models/loras/c.txt"):
        (empty_base / name).parent.mkdir(parents=True, exist_ok=True)
        (empty_base / name).touch()
    assert host.files("loras") == ["b.safetensors", "sub/a.safetensors"]
    assert host.resolve("loras", "b.safetensors") == empty_base / "output/loras/b.safetensors"
    assert host.files("reward_models") == []


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "", "..\\secret", "C:/x"])
def test_names_that_leave_their_folder_are_refused(empty_base: Path, name: str) -> None:
    (empty_base / "models" / "loras").mkdir(parents=True)
    (empty_base / "models" / "secret").touch()
    for attempt in (
        lambda: host.resolve("loras", name),
        lambda: host.read_input(name),
        lambda: host.new_file(name, ""),
    ):
        with pytest.raises(InputError, match="plain name"):
            attempt()


def test_a_missing_file_names_its_neighbours(empty_base: Path) -> None:
    (empty_base / "models" / "loras").mkdir(parents=True)
    (empty_base / "models" / "loras" / "cats.safetensors").touch()
    with pytest.raises(InputError, match=r"did you mean 'cats\.safetensors'"):
        host.resolve("loras", "cat.safetensors")


def test_new_files_never_overwrite(empty_base: Path) -> None:
    first = host.new_file("videos/v", ".mp4")
    assert first == empty_base / "output/videos/v_00001.mp4"
    assert not first.parent.exists()
    first.parent.mkdir(parents=True)
    (first.parent / "v_00007.mp4").touch()
    assert host.new_file("videos/v", ".mp4").name == "v_00008.mp4"
    assert host.shown(first) == {"filename": "v_00001.mp4", "subfolder": "videos", "type": "output"}


def test_workspace_leaves_inference_mode_and_puts_networks_back() -> None:
    with torch.inference_mode():
        outside = torch.ones(1)
        with device.workspace([nn.Linear(1, 1)]):
            layer = nn.Linear(1, 1)
            layer(outside.clone()).sum().backward()
            assert layer.weight.grad is not None
        assert torch.is_inference_mode_enabled()
    network = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="stop"), device.workspace([network]):
        raise RuntimeError("stop")
    assert network.weight.device.type == "cpu"


def test_a_workspace_gives_pinned_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: given.append(True))
    with device.workspace([]):
        pass
    assert given == [True] * torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(host.Alone, "device", lambda self: torch.device("cpu"))
    monkeypatch.setattr(host.Alone, "release", lambda self: None)
    with device.workspace([]):
        given.clear()
    assert given == [True]


def test_a_full_device_is_told_with_what_to_try() -> None:
    told = pytest.raises(torch.cuda.OutOfMemoryError, match=r"Connect a Memory node .*batch_size.*20 GiB")
    with told as error, device.workspace([]), device.training_mode():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert str(error.value).count("Memory node") == 1


def test_checkpoints_of_no_known_family_are_refused(empty_base: Path) -> None:
    folder = empty_base / "models" / "diffusers" / "other"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    assert host.checkpoints("diffusers", "model_index.json") == ["other"]
    with pytest.raises(InputError, match="modelscope"):
        family(locate("other"))
    with pytest.raises(InputError, match="embedded"):
        locate("mini/../recipe")


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A stand-in for ComfyUI's modules that records what is asked of them."""
    record: dict[str, Any] = {"calls": [], "cancelled": False}
    paths: Any = ModuleType("folder_paths")
    paths.models_dir = str(tmp_path / "models")
    paths.folder_names_and_paths = {}
    paths.get_output_directory = lambda: str(tmp_path / "out")
    paths.get_folder_paths = lambda category: paths.folder_names_and_paths[category][0]
    paths.get_filename_list = lambda category: ["x.safetensors", "y.txt"]
    memory: Any = ModuleType("comfy.model_management")
    memory.get_torch_device = lambda: torch.device("cpu")
    memory.unload_all_models = lambda: record["calls"].append("unload")
    memory.soft_empty_cache = lambda: record["calls"].append("empty")

    def cancelled() -> None:
        if record["cancelled"]:
            raise KeyboardInterrupt

    memory.throw_exception_if_processing_interrupted = cancelled
    utils: Any = ModuleType("comfy.utils")

    class ProgressBar:
        def __init__(self, total: int, node_id: str | None = None) -> None:
            record["node"] = node_id

        def update_absolute(self, done: int, total: int, preview: Any) -> None:
            record["calls"].append((done, total, preview))

    utils.ProgressBar = ProgressBar
    server: Any = ModuleType("server")
    server.PromptServer = type("PromptServer", (), {"instance": object()})
    found = {"folder_paths": paths, "comfy.model_management": memory, "comfy.utils": utils, "server": server}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    record["paths"] = paths
    return record


def test_comfyui_is_used_where_it_runs(comfy: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(host.current(), host.Comfy)
    assert host.new_file("a", ".mp4") == tmp_path / "out" / "a_00001.mp4"
    assert host.files("loras", [".safetensors"]) == ["x.safetensors"]
    host.register({})
    host.register({})
    folders, extensions = comfy["paths"].folder_names_and_paths["reward_models"]
    assert folders == [str(tmp_path / "models" / "reward_models")]
    assert extensions == {".safetensors", ".pth", ".pt", ".tar"}


def test_memory_is_freed_before_and_after_even_on_errors(comfy: dict[str, Any]) -> None:
    def work() -> None:
        with device.workspace([]):
            comfy["calls"].append("work")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        work()
    assert comfy["calls"] == ["unload", "work", "empty"]


def test_progress_shows_pictures_and_cancels(comfy: dict[str, Any]) -> None:
    with host.progress("Training", "5") as show:
        show(1, 2, "half", lambda: torch.ones(3, 4, 4))
        done, total, (kind, picture, size) = comfy["calls"][-1]
        assert (done, total, kind, size, picture.size) == (1, 2, "JPEG", 256, (4, 4))
        comfy["cancelled"] = True
        with pytest.raises(KeyboardInterrupt):
            show(2, 2)
    assert comfy["node"] == "5"
