"""What README.md says is true: the files it names exist and its example reward works."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def example(readme: str, tmp_path: Path) -> ModuleType:
    """The example reward, loaded as if it lay in the rewards folder."""
    source = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert source is not None
    path = tmp_path / "redness.py"
    path.write_text(source[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("vader_nodes.vader_backend.rewards.redness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_the_example_reward_scores_and_has_a_gradient(example: ModuleType) -> None:
    reward = example.build(example.Config(strength=2.0), Path)
    assert [field.name for field in fields(example.Config)] == ["strength"]
    assert reward.frames.pick(8) == [0, 7]
    video = torch.zeros(2, 2, 3, 4, 4)
    video[1, :, 0] = 1
    video.requires_grad_()
    scores = reward(video, ["", ""], [0, 7])
    assert scores.tolist() == [0.0, 2.0]
    scores.sum().backward()
    assert video.grad is not None
    assert bool((video.grad != 0).all())


def test_every_file_that_is_named_exists(readme: str, root: Path) -> None:
    named = set(re.findall(r"`(vader_backend/[\w/]+\.py|workflows/api/\w+\.json|tests/\w+/)`", readme))
    assert len(named - {"vader_backend/rewards/redness.py"}) >= 6
    assert not [name for name in named - {"vader_backend/rewards/redness.py"} if not (root / name).exists()]


def test_every_make_target_exists(readme: str, root: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make (?:VENV=\S+ )?([a-z][\w-]*)", readme, re.MULTILINE))
    assert {"demo", "test", "test-full", "lint", "mini"} <= named <= targets
