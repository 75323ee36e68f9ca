"""The program that the nodes run in: ComfyUI, or none.

The only file that touches ComfyUI. Without it the same functions fall back to torch, tqdm and a
base directory with models/, input/ and output/ as ComfyUI's.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..vader_backend.config import InputError, suggest
from ..vader_backend.runs import check_name, is_plain

REWARD_MODELS = "reward_models"
WEIGHTS = {".safetensors", ".pth", ".pt", ".tar"}  # .tar: V-JEPA is called .pth.tar
_PREVIEW_SECONDS = 2.0
_OLDER_NAMES = {"text_encoders": "clip", "diffusion_models": "unet"}  # of categories, still in use beside the new ones
_TOKENIZERS = ("comfy/sd1_tokenizer", "comfy/text_encoders/t5_tokenizer")


class Bar(Protocol):
    """A progress bar; it may raise where the user has cancelled."""

    def show(self, done: int, total: int, text: str, picture: Callable[[], Tensor] | None) -> None:
        """Show progress, a line of text, and a picture [3, H, W] that is only made where it can be seen."""
        ...

    def close(self) -> None: ...


class Alone:
    """No ComfyUI: plain folders under `base`, torch's own device, tqdm."""

    def __init__(self, base: Path | None = None) -> None:
        self.base = base or Path.cwd()

    def input(self) -> Path:
        return self.base / "input"

    def output(self) -> Path:
        return self.base / "output"

    def folders(self, category: str) -> list[Path]:
        """Where models of a category lie."""
        own = [self.base / "models" / name for name in (category, _OLDER_NAMES.get(category)) if name]
        return [*own, self.output() / "loras"] if category == "loras" else own

    def files(self, category: str) -> list[str]:
        """The names of a category's files, relative to its folders."""
        found = {p.relative_to(f).as_posix() for f in self.folders(category) for p in f.glob("**/*") if p.is_file()}
        return sorted(found)

    def program(self) -> Path:
        """Where ComfyUI's own files would lie."""
        return self.base

    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def make_room(self) -> None:
        """Nothing else holds memory."""

    def release(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def cancel(self) -> None:
        """Ctrl+C raises by itself."""

    def bar(self, label: str, node_id: str | None, *, plain: bool) -> Bar:
        return _Tqdm(label)

    def note(self, text: str, node_id: str | None) -> None:
        """There is no canvas; the graph runner prints what a node says."""

    def send(self, event: str, data: Any) -> None:
        """There is no browser."""


class Comfy:
    """Inside a running ComfyUI, whose modules are loaded already."""

    def __init__(self) -> None:
        self.paths = importlib.import_module("folder_paths")
        self.memory = importlib.import_module("comfy.model_management")

    def input(self) -> Path:
        return Path(self.paths.get_input_directory())

    def output(self) -> Path:
        return Path(self.paths.get_output_directory())

    def folders(self, category: str) -> list[Path]:
        return [Path(folder) for folder in self.paths.get_folder_paths(category)]

    def files(self, category: str) -> list[str]:
        return [name.replace("\\", "/") for name in self.paths.get_filename_list(category)]

    def program(self) -> Path:
        return Path(str(self.paths.__file__)).parent

    def device(self) -> torch.device:
        return self.memory.get_torch_device()

    def make_room(self) -> None:
        self.memory.unload_all_models()

    def release(self) -> None:
        self.memory.soft_empty_cache()

    def cancel(self) -> None:
        self.memory.throw_exception_if_processing_interrupted()

    def bar(self, label: str, node_id: str | None, *, plain: bool) -> Bar:
        return _ComfyBar(self, node_id, plain)

    def note(self, text: str, node_id: str | None) -> None:
        server = self._server()
        if node_id is not None and hasattr(server, "send_progress_text"):
            server.send_progress_text(text, node_id)

    def send(self, event: str, data: Any) -> None:
        server = self._server()
        if server is not None:
            server.send_sync(event, data)

    def serve(self, path: str, answer: Callable[[], Any]) -> None:
        """Answer GET requests for `path` with JSON."""
        server, web = self._server(), importlib.import_module("aiohttp").web
        if server is None or any(route.path == path for route in server.routes if isinstance(route, web.RouteDef)):
            return  # another copy of this pack answers

        async def reply(request: Any) -> Any:
            return web.json_response(answer())

        server.routes.get(path)(reply)

    @staticmethod
    def _server() -> Any:
        """The server, or None where ComfyUI's modules are used without one."""
        return getattr(importlib.import_module("server").PromptServer, "instance", None)

    def register(self) -> None:
        """Make reward_models a category, with the extensions that are offered."""
        folder = str(Path(self.paths.models_dir) / REWARD_MODELS)
        known, extensions = self.paths.folder_names_and_paths.get(REWARD_MODELS, ([], set()))
        folders = known if folder in known else [*known, folder]
        self.paths.folder_names_and_paths[REWARD_MODELS] = (folders, set(extensions) | WEIGHTS)


class _Tqdm:
    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def show(self, done: int, total: int, text: str, picture: Callable[[], Tensor] | None) -> None:
        if self.bar is None:
            tqdm = importlib.import_module("tqdm").tqdm
            self.bar = tqdm(desc=self.label, total=total, disable=not is_main(), dynamic_ncols=True, mininterval=1.0)
        if text:
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _ComfyBar:
    def __init__(self, host: Comfy, node_id: str | None, plain: bool) -> None:
        self.host = host
        self.node_id = node_id
        self.plain = plain
        self.bar = importlib.import_module("comfy.utils").ProgressBar(1, node_id)
        self._last_picture = 0.0

    def show(self, done: int, total: int, text: str, picture: Callable[[], Tensor] | None) -> None:
        preview = None
        if self.plain:
            text, picture = "", None
        if picture is not None and time.monotonic() - self._last_picture > _PREVIEW_SECONDS:
            preview = ("JPEG", _pil(picture()), 256)
            self._last_picture = time.monotonic()
        if text:
            self.host.note(text, self.node_id)
        self.bar.update_absolute(done, total, preview)

    def close(self) -> None:
        """ComfyUI takes the bar away itself."""


_alone = Alone()


def current() -> Alone | Comfy:
    """The program around us. ComfyUI has loaded its folder_paths long before it loads a pack."""
    if "folder_paths" in sys.modules and "comfy.model_management" in sys.modules:
        return Comfy()
    return _alone


def use_base_directory(base: Path) -> None:
    """Where models/, input/ and output/ lie without ComfyUI."""
    _alone.base = base


def register(routes: Mapping[str, Callable[[], Any]]) -> None:
    """Tell ComfyUI, where there is one, of folders that it does not know, and of what we answer at which address."""
    host = current()
    if isinstance(host, Comfy):
        host.register()
        for path, answer in routes.items():
            host.serve(path, answer)


def is_main() -> bool:
    """Whether this process prints and writes; under `accelerate launch` that is rank 0."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress(label: str, node_id: str | None, *, plain: bool = False) -> Iterator[Callable[..., None]]:
    """Yields show(done, total, text="", picture=None), which raises where the user has cancelled.

    Args:
        plain: the node shows text and pictures by itself, so the canvas draws the bar alone.
    """
    host = current()
    bar = host.bar(label, node_id, plain=plain)

    def show(done: int, total: int, text: str = "", picture: Callable[[], Tensor] | None = None) -> None:
        host.cancel()
        bar.show(done, total, text, picture)

    try:
        yield show
    finally:
        bar.close()


def note(text: str, node_id: str | None) -> None:
    """Write text onto the node, where there is a canvas."""
    current().note(text, node_id)


def send(event: str, data: Any) -> None:
    """Tell our part of the front end, where there is one."""
    current().send(event, data)


def cancel() -> None:
    """Raises where the user has cancelled."""
    current().cancel()


def files(category: str, suffixes: Iterable[str] = WEIGHTS) -> list[str]:
    """The names of a category's files, relative to its folders."""
    wanted = set(suffixes)
    return [name for name in current().files(category) if Path(name).suffix in wanted and is_plain(name)]


def subfolders(category: str) -> list[str]:
    """The names of a category's folders, at most two deep, without hidden ones."""
    found = {
        path.relative_to(folder).as_posix()
        for folder in current().folders(category)
        for pattern in ("*/", "*/*/")
        for path in folder.glob(pattern)
        if os.path.isdir(path)
    }
    return sorted(n for n in found if is_plain(n) and not any(part.startswith(".") for part in n.split("/")))


def checkpoints(category: str, marker: str) -> list[str]:
    """The names of a category's folders, at most two deep, that hold a file `marker`."""
    folders = current().folders(category)
    return [name for name in subfolders(category) if any((folder / name / marker).exists() for folder in folders)]


def tokenizers() -> list[Path]:
    """The folders of the tokenizers that ComfyUI brings, where there is a ComfyUI."""
    return [path for name in _TOKENIZERS if (path := current().program() / name).is_dir()]


def folder(category: str) -> Path:
    """Where new models of a category go."""
    return current().folders(category)[0]


def places(category: str) -> str:
    """Where a category's files lie, for messages."""
    return " or ".join(str(folder) for folder in current().folders(category))


def resolve(category: str, name: str, known: Callable[[], Sequence[str]] | None = None) -> Path:
    """The file or folder of that name in a category.

    Args:
        known: gives the names to propose where there is none of that name; by default the category's files.

    Raises:
        InputError: the name leaves the category's folders, or there is none of that name.
    """
    check_name(name, f"the name of a file in {category}")
    for folder in current().folders(category):
        if (folder / name).exists():
            return folder / name
    names = files(category) if known is None else known()
    others = f", or choose another: {suggest(name, names)}" if names else "."
    raise InputError(f"There is no {name!r} in {places(category)}; put it there{others}")


def read_input(name: str) -> str:
    """The text of a file in the input folder.

    Raises:
        InputError: the name leaves the folder. OSError or UnicodeDecodeError: it cannot be read.
    """
    check_name(name, "file")
    return (current().input() / name).read_text(encoding="utf-8")


def input_folder(name: str) -> Path:
    """A folder of the input folder. Raises InputError where it is none, or the name leaves the input folder."""
    check_name(name, "folder")
    path = current().input() / name
    if not path.is_dir():
        raise InputError(f"There is no folder {name!r} in {current().input()}; make it and put your files there.")
    return path


def new_file(prefix: str, suffix: str) -> Path:
    """The next free `<prefix>_<number><suffix>` in the output folder; nothing is created.

    Raises:
        InputError: the name leaves the output folder.
    """
    check_name(prefix, "filename_prefix")
    path = current().output() / prefix
    taken = [p.name.removeprefix(f"{path.name}_").removesuffix(suffix) for p in path.parent.glob(f"*{suffix}")]
    number = 1 + max((int(digits) for digits in taken if digits.isdecimal()), default=0)
    return path.with_name(f"{path.name}_{number:05}{suffix}")


def runs() -> Path:
    """The folder of all training runs."""
    return current().output() / "vader_runs"


def shown(path: Path) -> dict[str, str]:
    """How ComfyUI's front end finds a file of the output folder."""
    relative = path.relative_to(current().output())
    folder = relative.parent.as_posix()
    return {"filename": path.name, "subfolder": "" if folder == "." else folder, "type": "output"}


def _pil(picture_CHW: Tensor) -> Any:
    from PIL import Image

    pixels = (picture_CHW.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
