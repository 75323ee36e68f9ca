"""The LAION head: its layout, its published file format, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.rewards.aesthetic import AestheticHead, load_head

from .conftest import LAYERS, WIDTH


def test_head_is_its_linear_layers_one_after_another(tmp_path: Path, head_tensors: dict[str, Tensor]) -> None:
    torch.save(head_tensors, tmp_path / "head.pth")
    features = F.normalize(torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2)), dim=-1)
    expected = features
    for place in LAYERS:
        expected = expected @ head_tensors[f"layers.{place}.weight"].T + head_tensors[f"layers.{place}.bias"]
    torch.testing.assert_close(load_head(tmp_path / "head.pth", WIDTH)(features), expected[:, 0])


def test_published_sizes_and_keys(tmp_path: Path) -> None:
    published = AestheticHead((768, 1024, 128, 64, 16, 1))
    sizes = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    expected = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {f"layers.{place}.weight": shape for place, shape in expected.items()}
    assert sizes == weights | {f"layers.{place}.bias": shape[:1] for place, shape in expected.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_and_a_wrapper_prefix_load(tmp_path: Path, head_tensors: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"head{suffix}"
    wrapped = {f"module.{name}": tensor.half() for name, tensor in head_tensors.items()}
    save_file(wrapped, path) if suffix == ".safetensors" else torch.save(wrapped, path)
    head = load_head(path, WIDTH)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, head_tensors[name].half().float())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_missing_truncated_and_empty_files_are_refused(
    tmp_path: Path, head_tensors: dict[str, Tensor], suffix: str
) -> None:
    path = tmp_path / f"head{suffix}"
    with pytest.raises(InputError, match="aesthetic head is missing"):
        load_head(path, WIDTH)
    save_file(head_tensors, path) if suffix == ".safetensors" else torch.save(head_tensors, path)
    whole = path.read_bytes()
    for content in (whole[:-200], whole[:50], b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="aesthetic head"):
            load_head(path, WIDTH)


def test_foreign_tensors_are_refused(tmp_path: Path, head_tensors: dict[str, Tensor]) -> None:
    flat = {name: torch.zeros(()) for name in head_tensors}
    for foreign in ({"weight": torch.zeros(3)}, dict(list(head_tensors.items())[:-1]), flat, torch.zeros(3), [1, 2]):
        torch.save(foreign, tmp_path / "head.pth")
        with pytest.raises(InputError, match=r"not a LAION aesthetic head|holds no tensors"):
            load_head(tmp_path / "head.pth", WIDTH)
    torch.save(head_tensors | {"layers.4.weight": torch.zeros(8, 11)}, tmp_path / "head.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_head(tmp_path / "head.pth", WIDTH)


def test_a_head_for_other_features_names_both_widths(folder: Path) -> None:
    with pytest.raises(InputError, match=r"16 wide.* 768 wide"):
        load_head(folder / "head.safetensors", 768)


class _Intruder:
    """Touches a file when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_code_is_refused_unopened(tmp_path: Path, head_tensors: dict[str, Tensor]) -> None:
    torch.save({**head_tensors, "extra": _Intruder(tmp_path / "mark")}, tmp_path / "head.pth")
    assert zipfile.is_zipfile(tmp_path / "head.pth")
    with pytest.raises(InputError, match="could run code"):
        load_head(tmp_path / "head.pth", WIDTH)
    assert not (tmp_path / "mark").exists()


def test_the_published_file_loads_as_it_is() -> None:
    path = Path(__file__).parents[3] / "shared" / "real" / "sac+logos+ava1-l14-linearMSE.pth"
    if not path.is_file():
        pytest.skip("the published head is not here")
    head = load_head(path, 768)
    held = torch.load(path, map_location="cpu", weights_only=True)  # it was saved from a GPU
    assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in held.items()
    }
    features = F.normalize(torch.randn(200, 768, generator=torch.Generator().manual_seed(2)), dim=-1).requires_grad_()
    expected = features.detach().double()
    for place in LAYERS:
        expected = expected @ held[f"layers.{place}.weight"].double().T + held[f"layers.{place}.bias"].double()
    scores = head(features)
    torch.testing.assert_close(scores, expected[:, 0].float(), rtol=1e-4, atol=1e-4)
    assert scores.std() > 0.1
    assert torch.autograd.grad(scores.sum(), features)[0].isfinite().all()
    with pytest.raises(InputError, match=r"768 wide.* 1024 wide"):
        load_head(path, 1024)
