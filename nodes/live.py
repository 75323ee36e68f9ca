"""What a training shows on its node while it runs: sent as it changes, and kept for a browser that is reloaded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..vader_backend.objectives.base import Validation
from ..vader_backend.trainer import TrainResult
from . import host

EVENT = "vader.training"
ROUTE = "/vader/trainings"
_POINTS = 300
_SECONDS = 0.5
_KEPT = 20
_boards: dict[tuple[str | None, str | None], Board] = {}


class Board:
    """The state of one training node, as JSON.

    step, total; text: a line on where it is; rewards and held_out: curves as [step, value];
    preview: the newest preview video, as ComfyUI's front end finds files; report: set at the end.
    """

    def __init__(self, node_id: str | None, workflow_id: str | None, total: int) -> None:
        self.state: dict[str, Any] = {
            "node": node_id, "workflow": workflow_id, "step": 0, "total": total, "text": "starting",
            "rewards": [], "held_out": [], "preview": None, "report": None,
        }  # fmt: skip
        self._begun: tuple[int, float] | None = None
        self._sent = 0.0
        _boards.pop((workflow_id, node_id), None)
        _boards[workflow_id, node_id] = self
        for old in list(_boards)[:-_KEPT]:
            del _boards[old]
        self._send()

    @property
    def text(self) -> str:
        return self.state["text"]

    @property
    def total(self) -> int:
        return self.state["total"]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Say so where the block is left early."""
        try:
            yield
        except BaseException:
            step = self.state["step"]
            self.state["text"] = (
                f"stopped after step {step}; Run goes on from the last checkpoint" if step else "stopped"
            )
            self._send()
            raise

    def progress(self, result: TrainResult, total: int) -> None:
        """A step is done."""
        now = time.monotonic()
        self.state["held_out"] = _finite(result.held_out)
        self._begun = self._begun or (result.step, now)
        parts = [f"step {result.step}/{total}", f"reward {result.rewards[-1]:.4g}"]
        if self.state["held_out"]:
            parts.append(f"held-out reward {self.state['held_out'][-1][1]:.4g}")
        first, start = self._begun
        if first < result.step < total:
            parts.append(f"{_duration((total - result.step) * (now - start) / (result.step - first))} left")
        self.state |= {"step": result.step, "text": ", ".join(parts), "rewards": thinned(result.rewards)}
        if now - self._sent > _SECONDS or result.step == total:
            self._send()

    def preview(self, step: int, validation: Validation) -> None:
        """Held-out videos were sampled and scored."""
        self.state["held_out"] = _finite([*self.state["held_out"], (step, float(validation.rewards.mean()))])
        if validation.file is not None:
            self.state["preview"] = host.shown(validation.file)
        self._send()

    def end(self, report: str, rewards: list[float], held_out: list[tuple[int, float]], run_folder: Path) -> None:
        """It is over; a reused run fills the board at once."""
        newest = max((run_folder / "previews").glob("*.mp4"), default=None)
        self.state |= {
            "step": len(rewards), "text": "", "report": report, "rewards": thinned(rewards),
            "held_out": _finite(held_out), "preview": host.shown(newest) if newest else None,
        }  # fmt: skip
        self._send()

    def _send(self) -> None:
        self._sent = time.monotonic()
        host.send(EVENT, dict(self.state))


def thinned(values: list[float], points: int = _POINTS) -> list[list[float]]:
    """A curve as [step, mean of the steps up to it], with at most `points` entries and no gaps for JSON."""
    width = max(1, math.ceil(len(values) / points))
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    finite = [(i, [v for v in part if math.isfinite(v)]) for i, part in enumerate(parts)]
    return [[min((i + 1) * width, len(values)), sum(part) / len(part)] for i, part in finite if part]


def boards() -> list[dict[str, Any]]:
    """The states of the newest trainings, one for each node of each workflow."""
    return [dict(board.state) for board in list(_boards.values())]


def _finite(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """[step, value] where there is a value: JSON has no other."""
    return [[int(step), value] for step, value in points if math.isfinite(value)][-_POINTS:]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
