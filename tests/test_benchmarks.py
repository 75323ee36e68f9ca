"""The pages under benchmarks/results/ say what their json holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from vader_nodes.benchmarks import cost_grid, cost_growth, memory_ladder, reward_against_time, step_time

PAGES = {
    "memory_ladder": lambda found: memory_ladder.page(found["rows"]),
    "cost_growth": cost_growth.page,
    "reward_against_time": reward_against_time.page,
}


@pytest.fixture
def results(root: Path) -> Path:
    return root / "benchmarks" / "results"


def kept(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_written_from_their_json(results: Path, name: str) -> None:
    assert PAGES[name](kept(results, name)) == (results / f"{name}.md").read_text(encoding="utf-8")
    assert (results / f"{name}.png").is_file()


def test_the_page_of_the_step_time_is_written_from_its_json(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "RESULTS", tmp_path)
    monkeypatch.setattr(step_time, "ratio", lambda model, reward, repeats: kept(results, "step_time"))
    monkeypatch.setattr(sys, "argv", ["step_time"])
    step_time.main()
    page = (results / "step_time.md").read_text(encoding="utf-8")
    assert (tmp_path / "step_time.md").read_text(encoding="utf-8") == page


def test_growth_is_told_relative_to_the_base() -> None:
    grid = cost_grid.GRIDS["embedded"]
    row = cost_grid.case("checkpointing", cost_grid.Point(16, 64))
    found = {
        "rounds": [{grid.reference: 2.0, row: 6.0}, {grid.reference: 4.0, row: 13.0}, {grid.reference: 2.0, row: 5.0}],
        "embedded": {grid.reference: {"peak": 100}, row: {"peak": 150}},
    }
    assert row in grid.cases()
    assert cost_growth.growth(found, "embedded", row) == (3.0, 1.5)


def test_the_goal_is_found_on_the_line_between_two_looks() -> None:
    assert reward_against_time.reached((0, 10, 20, 30), (0.0, 0.25, 0.75, 0.5), 0.5) == 15
    assert reward_against_time.reached((0, 10, 20), (0.0, -0.5, 0.4), 0.5) is None
