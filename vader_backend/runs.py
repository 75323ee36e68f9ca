"""The folder of one training run, named by its configuration, so that it is found again."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import CheckpointFolder, write_text
from .config import InputError
from .lora import LoraWeights, load_lora, save_lora
from .video_file import write_mp4


def configuration_hash(configuration: dict[str, Any]) -> str:
    """Eight hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:8]


class RunFolder:
    """config.json, metrics.jsonl, previews/, checkpoints/, and, once finished, lora.safetensors and result.json.

    Raises:
        InputError: the name leaves the root folder, or the folder cannot be written.
    """

    def __init__(self, root: Path, name: str, configuration: dict[str, Any], *, write: bool = True) -> None:
        check_name(name, "name")
        self.hash = configuration_hash(configuration)
        self.path = root / f"{name}_{self.hash}"
        self.checkpoints = CheckpointFolder(self.path / "checkpoints")
        self._write = write
        self._save(self.path / "config.json", json.dumps(configuration, indent=2) + "\n")

    def finished(self) -> tuple[LoraWeights, dict[str, Any]] | None:
        """The LoRA and the result of a finished run, or None; a damaged one counts as unfinished."""
        try:
            result = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
            return load_lora(self.path / "lora.safetensors"), result
        except (OSError, ValueError):
            return None

    def finish(self, lora: LoraWeights, result: dict[str, Any]) -> None:
        """Write the result; the checkpoints are no longer needed."""
        if self._write:
            save_lora(self.path / "lora.safetensors", lora)
            self._save(self.path / "result.json", json.dumps(result, indent=2) + "\n")
            self.checkpoints.clear()

    def rewind(self, step: int) -> None:
        """Drop metrics of steps after `step`: they will be taken anew."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self._save(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def metrics(self) -> list[dict[str, float]]:
        """The metrics so far, a line per step; a half-written last line is left out."""
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        except OSError:
            return []
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line of metrics; what is not finite becomes null."""
        if self._write:
            clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **clean}) + "\n")

    def preview(self, step: int, video_BTCHW: Tensor, fps: float) -> Path:
        """Write preview videos side by side as previews/step_<step>.mp4, and return its path."""
        path = self.path / "previews" / f"step_{step:06d}.mp4"
        if self._write:
            write_mp4(path, video_BTCHW.transpose(0, 1).movedim(1, -2).flatten(-2), fps)
        return path

    def _save(self, path: Path, text: str) -> None:
        if self._write:
            write_text(path, text)


def check_name(name: str, what: str) -> None:
    """Refuse a file or folder name that would leave its folder.

    Raises:
        InputError: the name is empty, absolute, or has a part `..`.
    """
    if not is_plain(name):
        raise InputError(f"{what} is {name!r}; enter a plain name without '..', a leading '/' or a drive.")


def is_plain(name: str) -> bool:
    """Whether a file or folder name stays in its folder."""
    parts = name.replace("\\", "/").split("/")
    return bool(name.strip()) and not (name.startswith("~") or ":" in name or {"", ".."} & set(parts))
