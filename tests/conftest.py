"""Loads the repository as the package `vader_nodes`, whether or not it is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _load_package() -> None:
    spec = importlib.util.find_spec("vader_nodes")
    if spec is not None and spec.origin and Path(spec.origin).resolve() == ROOT / "__init__.py":
        return
    spec = importlib.util.spec_from_file_location(
        "vader_nodes", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vader_nodes"] = module
    spec.loader.exec_module(module)


_load_package()
torch.set_num_threads(1)  # the networks are tiny; make test runs one process per core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run pytest with --slow, or make test-full"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def package_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which a child process imports this very checkout as `vader_nodes`, on one thread."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "vader_nodes").symlink_to(ROOT, target_is_directory=True)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
