"""Downloads a checkpoint from the Hugging Face hub, with progress, cancel and resume.

The download runs as a process of its own: it can be stopped at any moment, and the next one goes on where it was.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryFile

from huggingface_hub import HfApi

from .checkpoint import require_space, write_text
from .config import InputError

_KINDS = (".json", ".safetensors", ".txt", ".model")
_PICKLED = re.compile(r"(.*/)?pytorch_model[^/]*\.bin")  # of transformers; only its tensors are read
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_INDEX = "model_index.json"
_DONE = ".vader_downloaded.json"
_POLL_SECONDS = 0.5
_WORKER = Path(__file__).with_name("_hub_download.py")


def check_repository(name: str) -> None:
    """Raises InputError where this is not the id of a repository, such as org/name."""
    if not _REPOSITORY.fullmatch(name) or any(set(part) <= {"."} for part in name.split("/")):
        raise InputError(f"{name!r} is not the id of a Hugging Face repository; write it as organisation/name.")


def download(
    repository: str,
    folder: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    accept: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Bring a repository's files into `folder`, unless they are there already.

    Args:
        accept: asked, where the repository is a diffusers folder, once its configurations are there; what it raises
            stops the download.
        on_progress: told the bytes that are there and the bytes in all, twice a second; what it raises stops the
            download, which goes on from there the next time.

    Returns:
        `folder`.

    Raises:
        InputError: no such repository, no network, no permission, or no space.
    """
    check_repository(repository)
    if _finished(folder, repository):
        return folder
    revision, sizes = _listed(repository, folder)
    total = sum(sizes.values())
    require_space(folder, total - _present(folder, sizes))

    def report() -> None:
        on_progress(min(_present(folder, sizes), total), total)

    if _INDEX in sizes:
        _fetch(repository, revision, folder, [name for name in sizes if name.endswith(".json")], report)
        accept(folder)
    _fetch(repository, revision, folder, sizes, report)
    write_text(folder / _DONE, json.dumps({"repository": repository, "revision": revision}) + "\n")
    return folder


def _finished(folder: Path, repository: str) -> bool:
    try:
        return json.loads((folder / _DONE).read_text(encoding="utf-8"))["repository"] == repository
    except (OSError, ValueError, KeyError):
        return False


def _endpoint() -> str | None:
    """Where the hub is; None for where huggingface_hub looks by itself."""
    return os.environ.get("HF_ENDPOINT")


def _listed(repository: str, folder: Path) -> tuple[str, dict[str, int]]:
    """The newest revision, and its wanted files with their sizes in bytes."""
    try:
        info = HfApi(endpoint=_endpoint()).model_info(repository, files_metadata=True)
    except Exception as error:
        raise _refused(repository, folder, f"{type(error).__name__}: {error}") from error
    files = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
    wanted = [name for name in files if _wanted(name, files)]
    if not any(name.endswith((".safetensors", ".bin")) for name in wanted):
        raise InputError(
            f"{repository} has neither a .safetensors file nor a pytorch_model.bin; choose another repository."
        )
    return str(info.sha), {name: files[name] for name in wanted}


def _wanted(name: str, files: Collection[str]) -> bool:
    """No pictures, and pickles only where a folder has no safetensors.

    Of a diffusers folder no second copy: in one file at its root, or in half precision.
    """
    pickled = _PICKLED.fullmatch(name)
    if pickled and any(file.startswith(pickled[1] or "") and file.endswith(".safetensors") for file in files):
        return False
    if not pickled and not name.endswith(_KINDS):
        return False
    if name.endswith(".safetensors") and _INDEX in files and "/" not in name:
        return False
    return ".fp16." not in name or name.replace(".fp16.", ".") not in files


def _fetch(repository: str, revision: str, folder: Path, files: Collection[str], report: Callable[[], None]) -> None:
    given = {"repository": repository, "revision": revision, "folder": str(folder), "files": sorted(files)}
    command = [sys.executable, str(_WORKER), json.dumps(given)]
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said, env=quiet) as process:  # noqa: S603
        try:
            while process.poll() is None:
                report()
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
        said.seek(0)
        lines = said.read().strip().splitlines()
    if process.returncode:
        raise _refused(repository, folder, lines[-1] if lines else f"exit status {process.returncode}")
    report()


def _present(folder: Path, sizes: dict[str, int]) -> int:
    """Bytes that are there, those of unfinished files too."""
    whole = sum((folder / name).stat().st_size for name in sizes if (folder / name).is_file())
    parts = (folder / ".cache").glob("**/*.incomplete") if (folder / ".cache").is_dir() else ()
    return whole + sum(part.stat().st_size for part in parts)


def _refused(repository: str, folder: Path, reason: str) -> InputError:
    first = reason.strip().splitlines()[0][:200]
    return InputError(
        f"{repository} cannot be downloaded ({first}). Check the name and the connection (a gated model needs a token "
        f"in HF_TOKEN), or put its files into {folder}."
    )
