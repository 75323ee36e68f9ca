"""A running ComfyUI with this pack, in a base folder that holds the tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import save_tiny
from vader_nodes.tools.comfyui import HOW_TO_GET_ONE, Server, find, serve


def pytest_runtest_setup() -> None:
    if find() is None:
        pytest.skip(HOW_TO_GET_ONE)  # here and not in the fixture: skips from one line are reported as one


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests; each test names its own files and runs."""
    installation = find()
    assert installation is not None
    base = tmp_path_factory.mktemp("comfyui")
    save_tiny(base / "models" / "diffusers" / "tiny")
    with serve(installation, base) as server:
        yield server
