"""The Memory node's presets, and what Estimate Memory and `python -m vader_nodes estimate` say on embedded models."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_graph import node, story
from vader_nodes.__main__ import main
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, estimate, host, validate, workflow
from vader_nodes.nodes.estimate import GIVEN, VaderEstimateMemory
from vader_nodes.nodes.load import VaderLoadVideoModel
from vader_nodes.nodes.memory import VaderMemory, automatic
from vader_nodes.nodes.rewards import reward_nodes
from vader_nodes.nodes.train import settings_of
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.estimate import Estimate
from vader_nodes.vader_backend.memory.options import PRESETS, MemoryConfig, preset_for
from vader_nodes.vader_backend.memory.tracker import tensors_of
from vader_nodes.vader_backend.placement import residents
from vader_nodes.vader_backend.types import VideoSpec


def chosen(**values: object) -> MemoryConfig:
    config: MemoryConfig = VaderMemory().choose(**values)["result"][0]  # type: ignore[arg-type]
    return config


# --- the Memory node -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_decides_whatever_the_settings_are(name: str) -> None:
    assert chosen(preset=name) == chosen(preset=name, decode_tile=8, stepwise=False) == PRESETS[name]


def test_custom_takes_the_settings() -> None:
    config = MemoryConfig(stepwise=True, resident_gb=2.5, weight_storage="nf4")
    assert chosen(preset="custom", **asdict(config)) == config
    assert chosen(preset="custom") == MemoryConfig()


def test_the_front_end_learns_what_presets_set() -> None:
    shown = VaderMemory.INPUT_TYPES()["required"]["preset"][1]["vader_presets"]
    assert shown == {name: asdict(chosen(preset=name)) for name in (*PRESETS, "auto")}
    assert shown["off"].keys() == VaderMemory.INPUT_TYPES()["optional"].keys()


def test_the_node_says_what_its_preset_stands_for() -> None:
    (text,) = VaderMemory().choose(preset="48 GB")["ui"]["text"]
    assert text == "48 GB: gradient_checkpointing, stepwise, resident_gb 32"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"preset": "18 GB"}, "preset"),
        ({"preset": "custom", "weight_storage": "int3"}, "weight_storage is 'int3'"),
        ({"preset": "custom", "decode_tile": -8}, "decode_tile .*-8"),
        ({"preset": "custom", "resident_gb": float("nan")}, "resident_gb"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(values: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        validate.check(workflow.parse({"1": node("VaderMemory", **values)}), NODE_CLASS_MAPPINGS)
    assert len(str(caught.value).splitlines()) == 1


def test_auto_is_off_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.Alone, "device", lambda self: torch.device("cpu"))
    assert automatic() == chosen(preset="auto") == PRESETS["off"]


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [(8, "12 GB"), (11.8, "12 GB"), (15.7, "16 GB"), (22, "16 GB"), (25.4, "24 GB"), (47.7, "48 GB"), (85, "48 GB")],
)
def test_auto_is_the_largest_preset_that_the_card_has_room_for(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float, name: str
) -> None:
    properties = SimpleNamespace(total_memory=int(gigabytes * 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert preset_for(torch.device("cuda")) == name


# --- Estimate Memory -------------------------------------------------------------------------


def rows(report: str) -> dict[str, list[str]]:
    """The cells of a report's table, by preset."""
    table, _, _ = report.partition("\n\n")
    lines = [re.split(" {2,}", line.strip()) for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in lines}


def test_the_table_names_every_preset_and_the_smallest_card(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = dict(zip((*PRESETS, GIVEN), (90.0, 40.0, 23.0, 14.0, 10.0, 1.5), strict=True))
    found = iter(Estimate(int(peak * 1e9), {"decode": int(1e9)}, 0, int(2e9)) for peak in peaks.values())
    monkeypatch.setattr(estimate, "estimate", lambda *given: next(found))
    video = VideoSpec(frames=8, height=64, width=128)
    model: Any = SimpleNamespace(name="wide", defaults=SimpleNamespace(video=video), check=lambda video: None)
    reward: Any = None
    report = estimate.table(model, reward, settings_of({}), MemoryConfig(stepwise=True))
    assert report.startswith("wide, 128x64, 8 frames")
    cells = rows(report)
    assert {name: float(line[0]) for name, line in cells.items()} == peaks
    assert {name: line[8] for name, line in cells.items()} == {
        "off": "none", "48 GB": "48 GB", "24 GB": "48 GB", "16 GB": "16 GB", "12 GB": "12 GB", GIVEN: "12 GB"
    }  # fmt: skip
    assert cells["off"][1:8] == ["0.00", "0.00", "0.00", "1.00", "0.00", "0.00", "2.00"]
    assert f"\n{GIVEN}: stepwise\n" in report


def test_an_estimate_leaves_model_and_reward_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "PRESETS", {"off": PRESETS["off"]})
    (model,) = VaderLoadVideoModel().load(checkpoint="mini/modelscope")
    (reward,) = reward_nodes()["VaderRewardAesthetic"]().make()
    tensors = list(tensors_of([*model.parts().values(), *reward.networks()]))
    copies = [tensor.clone() for tensor in tensors]
    with torch.inference_mode():  # as ComfyUI runs nodes
        (report,) = VaderEstimateMemory().estimate(model, reward)["result"]
    after = list(tensors_of([*model.parts().values(), *reward.networks()]))
    for tensor, copy, same in zip(tensors, copies, after, strict=True):
        assert same is tensor
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad
    peak, *phases, _ = map(float, rows(report)["off"][:8])
    assert peak == max(phases)
    assert peak * 1e9 > sum(tensor.nbytes for tensor in tensors_of([*residents(model), *reward.networks()]))


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["estimate", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_line_estimates_a_workflow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], empty_base: Path
) -> None:
    monkeypatch.setattr(estimate, "PRESETS", {})
    every_step = ("VaderTrainLoRA.sampling_steps=1", "VaderTrainLoRA.k=1")
    settings = [word for setting in every_step for word in ("--set", setting)]
    code, out, err = cli(capsys, "workflows/api/quickstart.json", "--base-directory", str(empty_base), *settings)
    assert (code, "modelscope, 64x64, 8 frames" in out) == (0, True), err
    assert "VADER Train LoRA" in out
    cells = rows(out[out.index("modelscope,") :])
    assert list(cells) == [GIVEN]
    assert float(cells[GIVEN][2]) == 0  # no rollout: every step is differentiated
    assert not list(empty_base.iterdir())


def test_a_workflow_without_training_is_refused(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    path.write_text(json.dumps({key: story()[key] for key in ("1", "2", "4")}))
    code, out, err = cli(capsys, str(path), "--base-directory", str(base))
    assert (code, out) == (2, "")
    assert "no VADER Train LoRA" in err
