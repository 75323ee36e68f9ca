"""The whole story on a tiny checkpoint, as ComfyUI and as the command line would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_graph import RednessNode, Workflow, node, story
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, graph, workflow
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.video_file import read_mp4

CLASSES = {**NODE_CLASS_MAPPINGS, "Redness": RednessNode}


def run(data: Workflow) -> tuple[dict[str, tuple[Any, ...]], str]:
    lines: list[str] = []
    with torch.inference_mode():  # as ComfyUI runs nodes
        return graph.run(workflow.parse(data), CLASSES, lines.append), "\n".join(lines)


def small(**inputs: Any) -> Workflow:
    """Load, prompts, sample, save."""
    data = {key: story()[key] for key in ("1", "2", "4")}
    data["4"]["inputs"] |= {"which": "train", **inputs}
    return {**data, "5": node("VaderSaveVideo", images=["4", 0], prompts=["4", 1])}


def test_train_sample_score_compare_and_save(base: Path) -> None:
    results, said = run(story())
    assert results["4"][0].shape == (12, 8, 8, 3)
    assert len(results["5"][1]["loss"]) == 2
    assert not torch.equal(results["4"][0], results["6"][0])
    assert "2 training prompts" in results["7"][0]
    assert "2 held-out prompts" in said
    folder = next((base / "output" / "vader_runs").iterdir())
    assert {"lora.safetensors", "metrics.jsonl", "reward_curve.png"} <= {path.name for path in folder.iterdir()}
    assert len(read_mp4(next((base / "output" / "videos").glob("*.mp4")))) == 3
    (name,) = results["10"]
    with safe_open(base / "output" / name, "pt") as file:
        about = file.metadata()
    assert {"base_model", "rewards", "method", "steps", "k", "rank", "configuration_hash"} <= set(about)
    again, said = run(story())
    assert "reused" in said
    assert torch.equal(again["6"][0], results["6"][0])
    saved = {**small(lora_name=name.removeprefix("loras/")), "6": node("VaderSaveVideo", images=["4", 0])}
    from_file, _ = run(saved)
    assert (from_file["4"][0] - results["6"][0][:6]).abs().max() < 1e-4  # other batch sizes round otherwise


def test_strength_zero_is_the_base_model(base: Path) -> None:
    data = story()
    data["6"]["inputs"]["strength"] = 0.0
    results, _ = run(data)
    assert torch.equal(results["4"][0], results["6"][0])


def refused(data: Workflow, words: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is refused before the base videos, which come first in the file, are sampled."""
    monkeypatch.setattr(NODE_CLASS_MAPPINGS["VaderApplyLoRASample"], "sample", lambda *_, **__: pytest.fail("sampled"))
    data["5"]["inputs"]["name"] = "refused"
    with pytest.raises(InputError, match=words):
        run(data)
    assert not list((base / "output" / "vader_runs").glob("refused*"))


def test_a_reward_without_gradient_is_refused_before_any_work(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_graph.Redness.differentiable", False)
    refused(story(), "no gradient", base, monkeypatch)


def test_k_above_the_models_own_steps_is_refused_before_any_work(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = story()
    data["5"]["inputs"] |= {"sampling_steps": 0, "k": 1000}
    refused(data, "1000", base, monkeypatch)


def test_what_waits_for_the_training_is_checked_before_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = story()
    data["6"]["inputs"] |= {"width": 9}
    refused(data, "width is 9", base, monkeypatch)


def test_long_prompts_are_told(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = small()
    data["2"] = node("VaderPrompts", source="typed", text="red " * 40)
    run(data)
    assert "red red" in caplog.text
    assert "too long" in caplog.text


def test_no_prompts_for_the_chosen_part(base: Path) -> None:
    data = small()
    data["2"] = node("VaderPrompts", source="mini_unseen")
    with pytest.raises(InputError, match="which=train"):
        run(data)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "truncated"), (b"\x80\x04garbage", "a pickle"), (b"{}" * 50, "truncated")]
)
def test_damaged_lora_files_are_refused(base: Path, content: bytes, word: str) -> None:
    path = base / "models" / "loras" / "broken.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=word):
        run(small(lora_name="broken.safetensors"))
    path.unlink()


def command(package_env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vader_nodes", *arguments]
    return subprocess.run(line, env=package_env, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_line_runs_a_workflow(tiny_base: Path, tmp_path: Path, package_env: dict[str, str]) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small()))
    arguments = ("run", str(path), "--base-directory", str(tiny_base), "--set", "5.filename_prefix=cli/v")
    done = command(package_env, *arguments)
    assert done.returncode == 0, done.stderr
    assert "wrote output/cli/v_00001.mp4" in done.stdout
    assert len(read_mp4(tiny_base / "output/cli/v_00001.mp4")) == 3


def test_other_ranks_neither_print_nor_write(tiny_base: Path, tmp_path: Path, package_env: dict[str, str]) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small()))
    arguments = ("run", str(path), "--base-directory", str(tiny_base), "--set", "5.filename_prefix=rank/v")
    done = command({**package_env, "RANK": "1"}, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not (tiny_base / "output" / "rank").exists()


def test_bad_input_is_one_sentence_and_code_2(tmp_path: Path, package_env: dict[str, str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"1": node("KSampler")}))
    done = command(package_env, "run", str(path), "--base-directory", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "KSampler" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.json"]


def test_the_command_line_lists_nodes(package_env: dict[str, str]) -> None:
    done = command(package_env, "nodes")
    assert done.returncode == 0, done.stderr
    assert all(f"{name}: " in done.stdout for name in NODE_CLASS_MAPPINGS)
    assert "k (INT; default 1; 1 to 1000)" in done.stdout
