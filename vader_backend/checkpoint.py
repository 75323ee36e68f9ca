"""Training state on disk: one safetensors file per checkpoint, written atomically, the newest few kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import InputError

_TENSOR = "__tensor__"
_CHECKPOINT = re.compile(r"step_(\d+)\.safetensors")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when the block ends well.

    A process killed inside the block leaves the old file, if any, as it was.

    Raises:
        InputError: the file cannot be written, for want of space or permission; nothing is left of it then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({reason}); free some space or choose another place.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_space(folder: Path, size: int) -> None:
    """Refuse before a long run what would end on a full disk; `size` in bytes.

    Raises:
        InputError: the disk of `folder` has less space left.
    """
    present = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(present).free
    if free < size:
        raise InputError(
            f"The run needs about {size / 1e6:.0f} MB in {folder}, but {free / 1e6:.0f} MB are left; free some space."
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tree(path: Path, tree: Any) -> None:
    """Write a nested structure of dicts, lists, tensors, numbers and strings as one safetensors file, atomically.

    The structure without its tensors goes into the file's metadata as JSON.
    """
    tensors: dict[str, Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(node, dict):
            return {"dict": [[key, strip(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return [strip(value) for value in node]
        return node

    skeleton = json.dumps(strip(tree))
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"tree": skeleton})


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote; tuples come back as lists.

    Raises:
        ValueError: the file is missing, truncated, or was not written by `save_tree`.
    """
    try:
        with safe_open(path, "pt") as file:
            # Clones: a tensor of the file keeps it mapped, and Windows does not delete a mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            skeleton = json.loads((file.metadata() or {})["tree"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); delete it to go on without it.") from error

    def fill(node: Any) -> Any:
        if isinstance(node, list):
            return [fill(value) for value in node]
        if isinstance(node, dict):
            return tensors[node[_TENSOR]] if _TENSOR in node else {key: fill(value) for key, value in node["dict"]}
        return node

    return fill(skeleton)


class CheckpointFolder:
    """The checkpoints of one run, named by the number of finished optimizer steps."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """The step numbers present, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint, then delete all but the newest `keep` and what a killed process left half-written."""
        save_tree(self._path(step), tree)
        for left in (*self.folder.glob(".step_*.tmp"), *self.folder.glob(".tmp*")):  # ours, and safetensors' own
            with suppress(OSError):
                left.unlink()
        for old in self.steps()[: -self.keep]:
            self._path(old).unlink(missing_ok=True)

    def load_newest(self) -> tuple[int, Any] | None:
        """The newest readable checkpoint, or None; an unreadable one falls back to the one before it."""
        for step in reversed(self.steps()):
            try:
                return step, load_tree(self._path(step))
            except ValueError:
                continue
        return None

    def clear(self) -> None:
        """Delete every checkpoint."""
        for step in self.steps():
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.safetensors"
