"""What a program says to a ComfyUI server, and what it hears of a prompt that runs."""

from __future__ import annotations

import json
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from websocket import WebSocket, WebSocketTimeoutException, create_connection

Prompt = dict[str, dict[str, Any]]
_TEXT, _PREVIEW = 3, 4  # binary messages of server.py: BinaryEventTypes
_TIMEOUT = 60.0  # seconds; a server that trains on the CPU answers slowly
_ENDS = ("execution_success", "execution_error", "execution_interrupted")


@dataclass(frozen=True)
class Event:
    """One message; at: seconds of time.monotonic(), when it came."""

    kind: str
    data: dict[str, Any]
    at: float = field(default_factory=time.monotonic)


class Refused(RuntimeError):
    """POST /prompt was refused, or would run a part of the prompt only. errors: the server's node_errors."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(json.dumps(body, indent=1))
        self.errors: dict[str, dict[str, Any]] = body.get("node_errors", {})

    def details(self) -> str:
        """What a user reads, line by line."""
        found = [error for node in self.errors.values() for error in node["errors"]]
        return "\n".join(f"{error['message']}: {error['details']}" for error in found)


@dataclass
class Run:
    """The events of one prompt, in their order."""

    prompt_id: str
    events: list[Event] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of one kind."""
        return [event.data for event in self.events if event.kind == kind]

    @property
    def end(self) -> Event | None:
        """How it ended: execution_success, execution_error or execution_interrupted."""
        return next((event for event in self.events if event.kind in _ENDS), None)

    @property
    def error(self) -> str:
        """The sentence of the error dialog; empty where there was no error."""
        return "".join(data["exception_message"] for data in self.of("execution_error"))

    @property
    def ran(self) -> set[str]:
        """The ids of the nodes that were run, not taken from the cache."""
        return {data["node"] for data in self.of("executing") if data["node"] is not None}

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """What output nodes show, by node id."""
        return {data["node"]: data["output"] for data in self.of("executed") if data["output"]}


class Client:
    """Requests to the server at `address` (host:port)."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str) -> Any:
        return json.loads(self.text(path))

    def text(self, path: str) -> str:
        with urlopen(f"http://{self.address}{path}", timeout=_TIMEOUT) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = Request(f"http://{self.address}{path}", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310
            return json.loads(answer.read() or b"null")

    def system_stats(self) -> dict[str, Any]:
        return self.get("/system_stats")

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def queue(self) -> int:
        """How many prompts run or wait."""
        found = self.get("/queue")
        return len(found["queue_running"]) + len(found["queue_pending"])

    def history(self, prompt_id: str) -> dict[str, Any]:
        return self.get(f"/history/{prompt_id}")[prompt_id]

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """Unload models and forget cached results, as the front end's button does; done before the next prompt."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A websocket, as a browser holds one, and prompts posted on its behalf."""
        name = uuid.uuid4().hex
        connection = create_connection(f"ws://{self.address}/ws?clientId={name}", timeout=_TIMEOUT)
        try:
            connection.settimeout(1)
            connection.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            yield Session(self, connection, name)
        finally:
            connection.close()

    def run(self, prompt: Prompt, watch: Callable[[Event], None] | None = None, *, seconds: float = 120) -> Run:
        """Post a prompt and wait for its end; see `Session`."""
        with self.session() as session:
            return session.wait(session.post(prompt), watch, seconds=seconds)


class Session:
    def __init__(self, client: Client, connection: WebSocket, name: str) -> None:
        self.client = client
        self.connection = connection
        self.name = name
        self.runs: dict[str, Run] = {}
        self._running = ""

    def post(self, prompt: Prompt) -> str:
        """Queue a prompt; its id.

        Raises:
            Refused: the server found a mistake in any node.
        """
        try:
            answer = self.client.post("/prompt", {"prompt": prompt, "client_id": self.name})
        except HTTPError as error:
            raise Refused(json.loads(error.read())) from None
        if answer["node_errors"]:
            raise Refused(answer)
        self.runs[answer["prompt_id"]] = Run(answer["prompt_id"])
        return answer["prompt_id"]

    def wait(self, prompt_id: str, watch: Callable[[Event], None] | None = None, *, seconds: float = 120) -> Run:
        """Listen until the prompt has ended and the server is ready for the next one.

        Args:
            watch: called with each of its events.

        Raises:
            TimeoutError: it has not ended in time.
        """
        limit = time.monotonic() + seconds
        run = self.runs[prompt_id]
        while not (run.end and any(data["node"] is None for data in run.of("executing"))):
            if time.monotonic() > limit:
                raise TimeoutError(f"{prompt_id} has not ended after {seconds} s; last: {run.events[-3:]}")
            event = self._next()
            if event is not None and self._file(event) is run and watch is not None:
                watch(event)
        return run

    def _next(self) -> Event | None:
        try:
            message = self.connection.recv()
        except WebSocketTimeoutException:
            return None
        if isinstance(message, str):
            found = json.loads(message)
            return Event(found["type"], found["data"])
        return _binary(message)

    def _file(self, event: Event) -> Run | None:
        """Put an event to its prompt's; one that names none belongs to the prompt that runs."""
        if event.kind == "execution_start":
            self._running = event.data["prompt_id"]
        run = self.runs.get(event.data.get("prompt_id", self._running))
        if run is not None:
            run.events.append(event)
        return run


def _binary(message: bytes) -> Event | None:
    """progress_text {node, text}, or preview {node_id, prompt_id, ..., bytes}; None for any other kind."""
    kind, length = struct.unpack(">II", message[:8])
    head, rest = message[8 : 8 + length], message[8 + length :]
    if kind == _TEXT:
        return Event("progress_text", {"node": head.decode(), "text": rest.decode()})
    if kind == _PREVIEW:
        return Event("preview", {**json.loads(head), "bytes": len(rest)})
    return None
