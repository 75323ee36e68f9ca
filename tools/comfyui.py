"""A real ComfyUI on loopback with this pack in it, in a base folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from .comfyui_client import Client
from .frontend import PACK

ROOT = Path(__file__).resolve().parents[1]
HOW_TO_GET_ONE = (
    "No ComfyUI was found: clone https://github.com/comfyanonymous/ComfyUI to ~/ComfyUI, or name its folder in "
    "COMFYUI_PATH and the Python that runs it in COMFYUI_PYTHON."
)
_LAUNCHER = Path(__file__).with_name("comfyui_main.py")
_START_SECONDS, _STOP_SECONDS = 180.0, 15.0
_LOG_TAIL = 40
_ONLY_COMFYUI_NEEDS = "comfyui_workflow_templates"


@dataclass(frozen=True)
class Installation:
    """folder: ComfyUI's own. python: the interpreter that has what it needs."""

    folder: Path
    python: Path


@dataclass(frozen=True)
class Server:
    """A running ComfyUI. base: its folder with models/, input/ and output/. log: all that it printed."""

    client: Client
    base: Path
    log: Path
    pid: int

    @property
    def output(self) -> Path:
        return self.base / "output"


def find() -> Installation | None:
    """The ComfyUI of COMFYUI_PATH, else of the usual places, else the one that this pack was cloned into.

    Raises:
        FileNotFoundError: COMFYUI_PATH or COMFYUI_PYTHON names something that is not there.
    """
    given = os.environ.get("COMFYUI_PATH")
    if given and not _is_comfyui(Path(given)):
        raise FileNotFoundError(f"COMFYUI_PATH is {given}, which holds no ComfyUI (main.py, comfy/); correct it.")
    home = Path.home()
    places = [Path(given)] if given else [home / "ComfyUI", home / "comfy" / "ComfyUI", *ROOT.parents]
    folder = next((place for place in places if _is_comfyui(place)), None)
    return Installation(folder, _python(folder)) if folder else None


@contextmanager
def serve(installation: Installation, base: Path) -> Iterator[Server]:
    """Run it with `base` as its base folder and this pack as its only one; it is stopped at the end.

    Raises:
        RuntimeError: it ended or did not answer; the message holds the end of its log.
    """
    _prepare(base)
    log = base / "comfyui.log"
    port = _free_port()
    with open(log, "wb") as file:
        process = subprocess.Popen(  # noqa: S603
            _command(installation, base, port), stdout=file, stderr=subprocess.STDOUT, cwd=base, env=_environment()
        )
    try:
        client = Client(f"127.0.0.1:{port}")
        _wait(client, process, log)
        yield Server(client, base, log, process.pid)
    finally:
        _stop(process)


def _is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def _python(folder: Path) -> Path:
    """COMFYUI_PYTHON, else that of a virtual environment in or beside ComfyUI that was made for it, else ours."""
    given = os.environ.get("COMFYUI_PYTHON")
    if given:
        found = shutil.which(given)
        if found is None:
            raise FileNotFoundError(f"COMFYUI_PYTHON is {given}, which cannot be run; correct it.")
        return Path(found)
    for place in (folder, folder.parent):
        for library, python in (("lib/*", "bin/python"), ("Lib", "Scripts/python.exe")):
            for module in place.glob(f"*venv*/{library}/site-packages/{_ONLY_COMFYUI_NEEDS}"):
                return place / module.relative_to(place).parts[0] / python
    return Path(sys.executable)


def _prepare(base: Path) -> None:
    for name in ("input", "output", "models", "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)


def _command(installation: Installation, base: Path, port: int) -> list[str]:
    return [
        str(installation.python), str(_LAUNCHER), str(installation.folder / "main.py"), "--cpu",
        "--base-directory", str(base), "--listen", "127.0.0.1", "--port", str(port),
        "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK, "--disable-auto-launch",
        "--database-url", f"sqlite:///{base / 'comfyui.db'}",
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def _wait(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with suppress(URLError, ConnectionError, TimeoutError):
            client.system_stats()
            return
        time.sleep(0.2)
    what = "did not answer" if process.poll() is None else f"ended with code {process.returncode}"
    raise RuntimeError(f"ComfyUI {what}; the end of its log:\n{tail(log)}")


def tail(log: Path, lines: int = _LOG_TAIL) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
