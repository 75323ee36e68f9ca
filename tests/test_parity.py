"""`make parity`: any folder of fixtures, whatever they are called, hold and leave out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn import functional
from vader_nodes.tools.parity import __main__ as parity
from vader_nodes.tools.parity import svd
from vader_nodes.tools.parity.fixtures import read

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = "opensora_rflow_plain"


def put(folder: Path, name: str, **changes: object) -> None:
    """A copy of a small fixture under another name, with some of its json changed."""
    shutil.copy(FIXTURES / f"{SMALL}.safetensors", folder / f"{name}.safetensors")
    about = json.loads((FIXTURES / f"{SMALL}.json").read_text(encoding="utf-8"))
    (folder / f"{name}.json").write_text(json.dumps({**about, **changes}), encoding="utf-8")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit status and printed lines."""
    monkeypatch.setattr("sys.argv", ["parity", str(folder)])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    return int(ended.value.code or 0), capsys.readouterr().out.splitlines()


def test_the_item_counts_and_not_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "any name")
    put(tmp_path, "later", item="of another time")
    status, lines = run(tmp_path, monkeypatch, capsys)
    assert status == 0
    assert [line.rpartition(", ")[2] for line in lines] == ["ok", "nothing here computes of another time"]


def test_a_fixture_that_fails_is_told_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "a", config={"scheduler": {}})
    (tmp_path / "b.safetensors").write_text("nothing")
    put(tmp_path, "c", tolerance={"max_abs": 1e-12})
    put(tmp_path, "d")
    status, lines = run(tmp_path, monkeypatch, capsys)
    assert status == 1
    assert lines[0].startswith("a: NOT ok, KeyError: ")
    assert lines[1].startswith("b: NOT ok, FileNotFoundError: ")
    assert lines[2].endswith("NOT ok")
    assert lines[-1].startswith("d: ")
    assert lines[-1].endswith(" ok")


def test_an_output_that_nothing_computes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "a")
    monkeypatch.setattr(parity, "runners", lambda: {"opensora_rflow": lambda fixture: {}})
    status, lines = run(tmp_path, monkeypatch, capsys)
    assert status == 1
    assert "  final: not computed here" in "\n".join(lines)


def test_an_empty_folder_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run(tmp_path, monkeypatch, capsys)
    assert status == 1
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("svd_unet", "context2", "out_ctx3"),
        ("svd_unet", "image_only_mixed", "out_mixed"),
        ("opensora_stdit3", "x_mask", "pred_x_mask"),
    ],
)
def test_an_output_may_be_left_out_with_its_input(name: str, given: str, expected: str) -> None:
    whole = read(FIXTURES / f"{name}.json")
    inputs = {key: tensor for key, tensor in whole.inputs.items() if key != given}
    outputs = {key: tensor for key, tensor in whole.outputs.items() if key != expected}
    results = parity.compare(replace(whole, inputs=inputs, outputs=outputs), parity.runners()[whole.item])
    assert len(results) == len(whole.outputs) - 1
    assert all(ok for _, _, ok in results), results


def test_svds_projections_may_be_convolutions() -> None:
    fixture = read(FIXTURES / "svd_unet.json")
    projections = (".proj_in.weight", ".proj_out.weight")
    weights = {k: v[:, :, None, None] if k.endswith(projections) else v for k, v in fixture.weights.items()}
    results = parity.compare(replace(fixture, weights=weights), svd.unet)
    assert all(ok for _, _, ok in results), results


def test_svd_may_be_told_numbers_that_are_no_three_equal_parts() -> None:
    fixture = read(FIXTURES / "svd_unet.json")
    key, y = "model.diffusion_model.label_emb.0.0.weight", fixture.inputs["y"]
    widened = {**fixture.weights, key: functional.pad(fixture.weights[key], (0, 1))}
    told = {**fixture.inputs, "y": functional.pad(y, (0, 1), value=1.0)}
    results = parity.compare(replace(fixture, weights=widened, inputs=told), svd.unet)
    assert all(ok for _, _, ok in results), results
