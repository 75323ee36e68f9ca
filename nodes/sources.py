"""What Load Video Model opens: checkpoints and their separate parts, under the names that a workflow saves.

A checkpoint's name is mini/<name> for an embedded one, checkpoints/<file> or diffusion_models/<file> for a file of
that category, and otherwise a folder of models/diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..vader_backend import registry
from ..vader_backend.config import InputError
from ..vader_backend.loading import SUFFIXES, read_tensors, reading
from ..vader_backend.mini import files
from . import host, schema

AUTO = "auto"


@dataclass(frozen=True)
class Part:
    """A network or tokenizer that may lie apart from its checkpoint, in a category of ComfyUI's models."""

    category: str
    purpose: str


PARTS = {
    "vae": Part("vae", "Wan and LTX-Video as a single file: the autoencoder"),
    "text_encoder": Part("text_encoders", "Wan and LTX-Video as a single file: the text encoder"),
    "image_encoder": Part("clip_vision", "Wan 2.1 image-to-video as a single file: the CLIP vision encoder"),
    "tokenizer": Part(
        "text_encoders",
        "Wan, LTX-Video and VideoCrafter2 as a single file, where no tokenizer comes with the files or with ComfyUI: "
        "its folder",
    ),
}
_FILES = ("checkpoints", "diffusion_models")
_FOLDERS = "diffusers"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def checkpoints() -> list[str]:
    """The embedded checkpoints, then the folders of models/diffusers and the files that a family recognises."""
    embedded = [f"{files.PREFIX}{path.name}" for path in sorted(files.ROOT.iterdir()) if path.is_dir()]
    single = [f"{category}/{name}" for category in _FILES for name in host.files(category, SUFFIXES)]
    return [name for name in (*embedded, *_folders(), *single) if _is_known(name)]


def _folders() -> list[str]:
    """Those that may be checkpoints: none below a diffusers folder, none whose name would mean another place."""
    names, taken = host.subfolders(_FOLDERS), ("mini", *_FILES)
    whole = {name for name in names if (host.resolve(_FOLDERS, name) / "model_index.json").is_file()}
    return [name for name in names if (top := name.split("/")[0]) not in taken and (name == top or top not in whole)]


def locate(name: str) -> Path:
    """The file or folder of a checkpoint.

    Raises:
        InputError: there is none; the message says where it belongs.
    """
    category, _, rest = name.partition("/")
    if name.startswith(files.PREFIX):
        return files.weights(name.removeprefix(files.PREFIX))
    if category in _FILES and rest:
        return host.resolve(category, rest)
    return host.resolve(_FOLDERS, name, partial(host.subfolders, _FOLDERS))


def family(path: Path) -> ModuleType:
    """The module of the family that a checkpoint belongs to.

    Raises:
        InputError: no family recognises it, or it cannot be read.
    """
    found = _families(path)
    if found:
        return found[0]
    for file in (path, *sorted(path.glob("*"))) if path.is_dir() else (path,):
        if file.suffix in SUFFIXES:
            read_tensors(file, "checkpoint")
    raise InputError(
        f"The checkpoint {path.name} is of no known family ({', '.join(registry.names('models'))}); choose a folder "
        "whose model_index.json names one of them, or one of the files that the help page of this node lists."
    )


def configured(module: ModuleType, path: Path, values: Mapping[str, Any]) -> Any:
    """The Config of a family that a node's inputs describe, with every part that the checkpoint needs.

    Raises:
        InputError: a value is out of its range, or a part is missing.
    """
    own = {field.name for field in fields(module.Config)}
    named = {name: str(part(name, values.get(name, AUTO)) or "") for name in PARTS if name in own}
    config = schema.read(module.Config, {**values, **named, "folder": str(path)})
    lacking = getattr(module, "lacking", lambda _: None)
    with reading("checkpoint", path):
        while (needed := lacking(config)) is not None:
            config = replace(config, **{needed.field: str(_fitting(needed.field, needed.what, needed.fits, path))})
    return config


def parts(field: str) -> list[str]:
    """What may be chosen for a part: files and folders; of a folder no single files. Tokenizers are folders."""
    category = PARTS[field].category
    markers = _TOKENIZER_FILES if field == "tokenizer" else ("config.json",)
    folders = sorted({name for marker in markers for name in host.checkpoints(category, marker)})
    single = host.files(category, SUFFIXES) if field != "tokenizer" else []
    return [*(name for name in single if name.rpartition("/")[0] not in folders), *folders]


def part(field: str, name: str) -> Path | None:
    """Where a chosen part lies; None where it is left to be found. Raises InputError where there is no such part."""
    return None if name == AUTO else host.resolve(PARTS[field].category, name, partial(parts, field))


def _fitting(field: str, what: str, fits: Callable[[Path], bool], checkpoint: Path) -> Path:
    """The one part that fits; of tokenizers ComfyUI's own where the user has none."""
    category = PARTS[field].category
    found = [name for name in parts(field) if _holds(fits, host.resolve(category, name))]
    if len(found) > 1:
        raise InputError(f"{checkpoint.name} needs {what}, which may be {' or '.join(found)}; choose one as {field}.")
    if found:
        return host.resolve(category, found[0])
    if field == "tokenizer" and (own := [path for path in host.tokenizers() if _holds(fits, path)]):
        return own[0]
    raise InputError(
        f"{checkpoint.name} needs {what}, and none was found in {host.places(category)}; put it there, or choose the "
        f"right one as {field}."
    )


def _is_known(name: str) -> bool:
    """Whether a family recognises a checkpoint; one that cannot be read is skipped."""
    try:
        path = locate(name)
        state = path.stat()
    except (InputError, OSError):
        return False
    return _recognised(path, state.st_mtime_ns, state.st_size) if path.is_file() else bool(_families(path))


@cache
def _recognised(path: Path, _mtime: int, _size: int) -> bool:
    return bool(_families(path))


def _families(path: Path) -> list[ModuleType]:
    modules = (registry.load("models", name) for name in registry.names("models"))
    return [module for module in modules if _holds(module.matches, path)]


def _holds(test: Callable[[Path], bool], path: Path) -> bool:
    """Whether a path passes a test, which a file too broken to be tested does not."""
    try:
        return test(path)
    except Exception:
        return False
