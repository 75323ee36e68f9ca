"""What a training shows on its node: the state that is sent, and what the front end makes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vader_nodes.nodes import host, live
from vader_nodes.tools import frontend, workflows
from vader_nodes.vader_backend.objectives.base import Validation
from vader_nodes.vader_backend.trainer import TrainResult


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, empty_base: Path) -> list[dict[str, Any]]:
    """Copies of the states that were sent."""
    states: list[dict[str, Any]] = []
    monkeypatch.setattr(host, "send", lambda event, state: states.append(json.loads(json.dumps(state))))
    return states


def validation(file: Path | None) -> Validation:
    return Validation(torch.zeros(2, 3, 3, 4, 4), ("a", "b"), torch.tensor([1.0, 2.0]), file)


def test_a_board_tells_step_rewards_and_time_left(sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    board = live.Board("5", "w", 100)
    board.progress(TrainResult(11, [0.0] * 11, [3.0] * 11), 100)  # an interrupted run that goes on
    clock[0] += 30
    board.preview(20, validation(host.runs() / "run" / "previews" / "step_000020.mp4"))
    clock[0] += 1
    board.progress(TrainResult(21, [0.0] * 21, [3.0] * 20 + [4.25], [(20, 1.5)]), 100)
    assert board.text == "step 21/100, reward 4.25, held-out reward 1.5, 4 min 5 s left"
    assert sent[-1] == live.boards()[-1]
    assert sent[-1]["rewards"][-1] == [21, 4.25]
    assert sent[-1]["held_out"] == [[20, 1.5]]
    preview = {"filename": "step_000020.mp4", "subfolder": "vader_runs/run/previews", "type": "output"}
    assert sent[-1]["preview"] == preview


def test_a_board_is_not_sent_too_often(sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.time, "monotonic", lambda: 1.0)
    board = live.Board("5", None, 50)
    for step in range(1, 51):
        board.progress(TrainResult(step, [0.0] * step, [1.0] * step), 50)
    assert [state["step"] for state in sent] == [0, 50]


def test_a_board_says_when_it_was_stopped_or_is_done(sent: list[dict[str, Any]], tmp_path: Path) -> None:
    board = live.Board("5", "w", 10)
    board.progress(TrainResult(3, [0.0] * 3, [1.0] * 3), 10)

    def cancelled() -> None:
        with board.open():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert "stopped after step 3" in sent[-1]["text"]
    board.end("2 steps", [1.0, 2.0], [(2, 1.5)], tmp_path)
    assert (sent[-1]["report"], sent[-1]["step"], sent[-1]["text"]) == ("2 steps", 2, "")


def test_a_board_holds_nothing_that_json_lacks(sent: list[dict[str, Any]]) -> None:
    board = live.Board("5", "w", 10)
    board.progress(TrainResult(2, [0.0] * 2, [1.0, math.nan], [(0, math.nan), (1, 2.0)]), 10)
    board.preview(2, Validation(torch.zeros(1, 1, 3, 4, 4), ("a",), torch.tensor([math.inf])))
    json.dumps(live.boards(), allow_nan=False)
    assert live.boards()[-1]["held_out"] == [[1, 2.0]]


def test_only_the_newest_boards_are_kept(sent: list[dict[str, Any]]) -> None:
    for number in range(60):
        live.Board(str(number), "kept", 1)
    nodes = [state["node"] for state in live.boards()]
    assert len(nodes) <= 20
    assert nodes[-1] == "59"


def test_long_curves_are_thinned_and_hold_no_gaps() -> None:
    assert live.thinned([1.0, math.nan, 3.0]) == [[1, 1.0], [3, 3.0]]
    long = live.thinned([float(i) for i in range(1000)])
    assert len(long) <= 300
    assert long[0] == [4, 1.5]
    assert long[-1][0] == 1000


# --- in the front end ------------------------------------------------------------------------


def state(**changes: Any) -> dict[str, Any]:
    drawn = json.loads((workflows.FOLDER / "quickstart.json").read_text(encoding="utf-8"))
    node = next(entry["id"] for entry in drawn["nodes"] if entry["type"] == "VaderTrainLoRA")
    return {
        "node": str(node), "workflow": drawn["id"], "step": 3, "total": 10, "text": "step 3/10, reward 2",
        "rewards": [[1, 1.0], [2, 1.5], [3, 2.0]], "held_out": [[0, 1.0]], "preview": None, "report": None, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    reason = frontend.missing()
    if reason is not None:
        pytest.skip(reason)
    other = state(workflow="another", text="of another workflow")
    with frontend.serving({"vader/trainings": [state(), other]}) as address, frontend.opened(address) as page:
        frontend.converted(page, json.loads((workflows.FOLDER / "quickstart.json").read_text(encoding="utf-8")))
        yield page


def shown(page: Any) -> str:
    return page.evaluate("id => app.graph.getNodeById(id).vaderPanel?.root.innerText ?? ''", int(state()["node"]))


def test_a_reloaded_browser_finds_the_training_again(page: Any) -> None:
    page.wait_for_function("id => app.graph.getNodeById(id).vaderPanel", arg=int(state()["node"]), timeout=10_000)
    assert "step 3/10, reward 2" in shown(page)
    assert "held-out reward" in shown(page)
    assert "another" not in shown(page)


def test_events_move_the_curve_and_the_report_stays(page: Any) -> None:
    page.evaluate("state => app.api.dispatchCustomEvent('vader.training', state)", state(text="step 4/10"))
    assert "step 4/10" in shown(page)
    page.evaluate("state => app.api.dispatchCustomEvent('vader.training', state)", state(text="", report="10 steps"))
    assert "10 steps" in shown(page)
    assert page.evaluate("id => app.graph.getNodeById(id).vaderPanel.video.style.display", 5) == "none"
    points = page.evaluate("id => app.graph.getNodeById(id).vaderPanel.root.querySelectorAll('polyline').length", 5)
    assert points == 2


def test_the_panel_changes_neither_the_file_nor_the_prompt(page: Any) -> None:
    wanted = json.loads((workflows.FOLDER / "api" / "quickstart.json").read_text(encoding="utf-8"))
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == wanted
    values = page.evaluate("id => app.graph.getNodeById(id).serialize().widgets_values", int(state()["node"]))
    drawn = json.loads((workflows.FOLDER / "quickstart.json").read_text(encoding="utf-8"))
    assert values == next(e["widgets_values"] for e in drawn["nodes"] if e["type"] == "VaderTrainLoRA")
