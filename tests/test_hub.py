"""Downloads from a hub of our own on the loopback: whole, stopped and taken up again, and refused."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from tiny import save_tiny, tiny_model
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, host
from vader_nodes.nodes.load import VaderLoadVideoModel
from vader_nodes.vader_backend import hub
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.files import weights
from vader_nodes.vader_backend.rewards import yolos

WEIGHTS = b"w" * 30_000_000  # huggingface_hub writes 10 MB at a time
FILES = {
    "model_index.json": b"{}",
    "unet/model.safetensors": WEIGHTS,
    "unet/model.fp16.safetensors": b"w",
    "unet/model.bin": b"pickle",
    "unet/pytorch_model.bin": b"pickle",
    "text_encoder/pytorch_model-00001-of-00001.bin": b"p",
    "text_encoder/training_args.bin": b"p",
    "all.safetensors": b"w",
    "pytorch_model.bin": b"pickle",
}
REVISION = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub's API that a download needs."""

    files = FILES
    pause = 0.0
    requests = 0

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        type(self).requests += 1
        name = self.path.partition("?")[0]
        if not name.startswith(("/api/models/org/net", "/org/net/resolve/")):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if name.startswith("/api/"):
            siblings = [{"rfilename": key, "size": len(value)} for key, value in self.files.items()]
            content = json.dumps({"id": "org/net", "sha": REVISION, "siblings": siblings}).encode()
        else:
            content = self.files[name.split(f"/{REVISION}/")[1]]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Content-Type", "application/json")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        for start in range(first, len(content) if body else 0, 1_000_000):
            time.sleep(self.pause)
            self.wfile.write(content[start : min(start + 1_000_000, len(content))])

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hub.files, Hub.pause, Hub.requests = FILES, 0.0, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield address
    server.shutdown()


@pytest.mark.usefixtures("address")
def test_a_download_brings_what_is_wanted_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = hub.download("org/net", tmp_path / "net", on_progress=lambda *now: seen.append(now))
    assert (folder / "unet" / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "model_index.json").exists()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = {"model_index.json", "unet/model.safetensors", "text_encoder/pytorch_model-00001-of-00001.bin"}
    assert files & FILES.keys() == wanted
    assert seen[-1] == (30_000_003, 30_000_003)
    before = Hub.requests
    hub.download("org/net", tmp_path / "net")
    assert Hub.requests == before


@pytest.mark.usefixtures("address")
def test_a_stopped_download_goes_on(tmp_path: Path) -> None:
    Hub.pause = 0.1

    def stop(done: int, total: int) -> None:
        if done > 5_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.download("org/net", tmp_path / "net", on_progress=stop)
    assert not (tmp_path / "net" / "unet" / "model.safetensors").exists()
    Hub.pause = 0.0
    hub.download("org/net", tmp_path / "net")
    assert (tmp_path / "net" / "unet" / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.usefixtures("address")
def test_the_node_downloads_a_model_and_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "original")
    paths = [path for path in (tmp_path / "original").rglob("*") if path.is_file()]
    Hub.files = {path.relative_to(tmp_path / "original").as_posix(): path.read_bytes() for path in paths}
    monkeypatch.setattr(host, "_alone", host.Alone(tmp_path))
    (model,) = VaderLoadVideoModel().load("mini/modelscope", hub_id="org/net")
    assert model.fingerprint == tiny_model(tmp_path / "again", torch.float32).fingerprint
    assert "org/net" in VaderLoadVideoModel.INPUT_TYPES()["required"]["checkpoint"][0]


@pytest.mark.usefixtures("address")
def test_a_model_of_no_known_family_is_refused_before_its_weights_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.files = {**FILES, "model_index.json": b'{"_class_name": "OtherPipeline"}'}
    monkeypatch.setattr(host, "_alone", host.Alone(tmp_path))
    with pytest.raises(InputError, match="net is of no known family"):
        VaderLoadVideoModel().load("mini/modelscope", hub_id="org/net")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_put_there_by_hand_is_taken_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the refusal of a download says; what a download left unfinished is not."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(host, "_alone", host.Alone(tmp_path))
    with pytest.raises(InputError, match="put its files into") as refused:
        VaderLoadVideoModel().load("mini/modelscope", hub_id="org/net")
    folder = tmp_path / "models" / "diffusers" / "org" / "net"
    assert str(folder) in str(refused.value)
    save_tiny(folder)
    (model,) = VaderLoadVideoModel().load("mini/modelscope", hub_id="org/net")
    assert model.name == "net"
    (folder / "unet" / "next.incomplete").write_bytes(b"w")
    with pytest.raises(InputError, match="cannot be downloaded"):
        VaderLoadVideoModel().load("mini/modelscope", hub_id="org/net")


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.usefixtures("address")
def test_a_reward_node_downloads_its_network_and_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool
) -> None:
    Hub.files = {path.name: path.read_bytes() for path in weights("detector").iterdir()}
    if pickled:
        torch.save(load(Hub.files.pop("model.safetensors")), tmp_path / "pytorch_model.bin")
        Hub.files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    monkeypatch.setattr(host, "_alone", host.Alone(tmp_path))
    monkeypatch.setattr(yolos, "HUB", {"checkpoint": ("org/net",)})
    node = NODE_CLASS_MAPPINGS["VaderRewardYolos"]
    assert "hub: org/net" in node.INPUT_TYPES()["optional"]["checkpoint"][0]
    (reward,) = node().make(checkpoint="hub: org/net")
    assert reward.description["weights"] == node().make()[0].description["weights"]
    assert (tmp_path / "models" / "reward_models" / "org" / "net" / "config.json").exists()
    assert "org/net" in node.INPUT_TYPES()["optional"]["checkpoint"][0]
    with pytest.raises(InputError, match="organisation/name"):
        node().make(checkpoint="hub: ../net")


@pytest.mark.usefixtures("address")
def test_a_repository_without_weights_is_refused(tmp_path: Path) -> None:
    Hub.files = {"config.json": b"{}", "training_args.bin": b"p"}
    with pytest.raises(InputError, match=r"org/net has neither a \.safetensors file nor a pytorch_model\.bin"):
        hub.download("org/net", tmp_path / "net")


@pytest.mark.usefixtures("address")
def test_an_unknown_repository_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"org/other cannot be downloaded .* put its files into"):
        hub.download("org/other", tmp_path / "other")


def test_without_network_the_message_says_where_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"org/net cannot be downloaded .* put its files into"):
        hub.download("org/net", tmp_path / "net")


@pytest.mark.parametrize("name", ["net", "../net", "org/net/more", "org/..", "https://host/org/net"])
def test_what_is_no_repository_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="organisation/name"):
        hub.download(name, tmp_path)
