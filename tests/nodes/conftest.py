"""A base directory with a tiny checkpoint, in which the nodes work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import save_tiny
from vader_nodes.nodes import host


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its models/diffusers holds `tiny`."""
    base = tmp_path_factory.mktemp("base")
    save_tiny(base / "models" / "diffusers" / "tiny")
    return base


@pytest.fixture
def base(tiny_base: Path) -> Iterator[Path]:
    """The nodes read and write there during a test."""
    host.use_base_directory(tiny_base)
    yield tiny_base
    host.use_base_directory(Path.cwd())


@pytest.fixture
def empty_base(tmp_path: Path) -> Iterator[Path]:
    """The same without any file."""
    host.use_base_directory(tmp_path)
    yield tmp_path
    host.use_base_directory(Path.cwd())
