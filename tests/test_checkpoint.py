"""Checkpoints survive truncation and SIGKILL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vader_nodes.vader_backend.checkpoint import CheckpointFolder, atomic_path, load_tree, save_tree, write_text


def tree(step: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(step)
    weight = torch.randn(6, 4, generator=rng)
    return {
        "step": step,
        "losses": [0.1, 0.25],
        "optimizer": {"state": {0: {"exp_avg": weight, "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "transposed": weight.t(),
        "shared": [weight, weight],
        "kinds": [torch.ones(2, dtype=torch.bfloat16), torch.arange(3), torch.empty(0)],
        "text": "__tensor__",
        "nothing": None,
        "yes": True,
        "empty": {},
    }


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    else:
        assert found == expected


def test_round_trip_keeps_structure_types_and_bits(tmp_path: Path) -> None:
    save_tree(tmp_path / "tree.safetensors", tree(1))
    assert_equal(load_tree(tmp_path / "tree.safetensors"), tree(1))


def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def start() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def update(layer: torch.nn.Linear, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = start()
    update(layer, optimizer)
    save_tree(tmp_path / "t", {"layer": dict(layer.state_dict()), "optimizer": optimizer.state_dict()})
    update(layer, optimizer)
    found = load_tree(tmp_path / "t")
    resumed, again = start()
    resumed.load_state_dict(found["layer"])
    again.load_state_dict(found["optimizer"])
    update(resumed, again)
    assert torch.equal(resumed.weight, layer.weight)


def test_every_truncation_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    save_tree(path, tree(1))
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            load_tree(path)


def test_missing_and_foreign_files_are_value_errors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("not a checkpoint at all")
    for name in ("foreign", "text", "missing"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            load_tree(tmp_path / f"{name}.safetensors")


def test_folder_keeps_the_newest_two(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    assert folder.load_newest() is None
    for step in (5, 10, 15):
        folder.save(step, tree(step))
    assert folder.steps() == [10, 15]
    found = folder.load_newest()
    assert found is not None
    assert found[0] == 15
    assert_equal(found[1], tree(15))
    folder.clear()
    assert folder.load_newest() is None


def test_a_truncated_newest_falls_back_to_the_one_before(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, tree(1))
    folder.save(2, tree(2))
    newest = tmp_path / "step_000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    found = folder.load_newest()
    assert found is not None
    assert found[0] == 1


def test_a_failing_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError):  # noqa: PT012, SIM117
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from vader_nodes.vader_backend.checkpoint import CheckpointFolder

folder = CheckpointFolder(Path(sys.argv[1]))
rng = random.Random(0)
step = 1
folder.save(step, {"step": step, "w": torch.full((1000,), 1.0)})
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            folder.save(step, {"step": step, "w": torch.full((300_000,), float(step))})
    time.sleep(0.003 + rng.random() * 0.08)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = folder.load_newest()
    assert found is not None, "no loadable checkpoint"
    assert found[0] == found[1]["step"] >= step, "an older state than the one before the kill"
    assert bool((found[1]["w"] == found[0]).all()), "a torn checkpoint"
    assert max(folder.steps()) == found[0], "the newest file is damaged"
    strange = [p.name for p in folder.folder.iterdir() if not p.name.startswith((".", "step_"))]
    assert not strange, strange
    step = found[0]
print("reached", step)
"""


def test_sigkill_during_saves_always_leaves_a_loadable_checkpoint(tmp_path: Path, package_env: dict[str, str]) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path), "30"]
    done = subprocess.run(command, env=package_env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 10, "the children did save"
    folder = CheckpointFolder(tmp_path)
    folder.save(10**6 - 1, tree(7))
    assert len(folder.steps()) == 2
    found = folder.load_newest()
    assert found is not None
    assert_equal(found[1], tree(7))
    assert {path.name for path in tmp_path.iterdir()} == {f"step_{step:06d}.safetensors" for step in folder.steps()}
