"""Training in a real ComfyUI server: cancelling and going on, one run after the other, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import pytest
from comfyui.graphs import TRAIN, checked, core, files, run_folder, sampling, steps, training
from tiny_graph import SMALL, node
from vader_nodes.tools.comfyui import Server
from vader_nodes.tools.comfyui_client import Event, Prompt, Run

LONG = training("cancelled", steps=4, sampling_steps=100, preview_every=0, save_every=4)
MEGABYTE = 2**20
TOLERANCE = 25  # megabytes over seven runs; the allocator's noise is below 10, and one embedded denoiser has 16


@dataclass(frozen=True)
class Cancelled:
    """A training that was interrupted in its third step, when about a third of that step was over.

    before: the video of the base model, sampled before it. wait: seconds from the interrupt to the end of the
    run; step: seconds that a training step of 100 denoising steps takes.
    """

    before: bytes
    run: Run
    wait: float
    step: float


def interrupt_in_step_3(server: Server) -> tuple[Callable[[Event], None], list[float]]:
    """A watcher for `Client.run`, and the times at which it saw steps 1 and 2 end and interrupted."""
    times: list[float] = []

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["value"] / event.data["max"] * 4 >= len(times) + 1 < 3:
            times.append(event.at)
            if len(times) == 2:
                time.sleep((times[1] - times[0]) / 3)
                times.append(time.monotonic())
                server.client.interrupt()

    return watch, times


@pytest.fixture(scope="module")
def cancelled(comfy: Server) -> Cancelled:
    before = video(comfy, sampling("before"))
    watch, times = interrupt_in_step_3(comfy)
    run = comfy.client.run(LONG, watch)
    assert run.end is not None
    first, second, asked = times
    return Cancelled(before, run, run.end.at - asked, second - first)


def video(server: Server, prompt: Prompt) -> bytes:
    (file,) = files(server, checked(server.client.run(prompt)))
    return file.read_bytes()


def test_cancel_stops_within_a_denoising_step(cancelled: Cancelled) -> None:
    assert cancelled.run.end is not None
    assert cancelled.run.end.kind == "execution_interrupted"
    assert cancelled.run.of("execution_interrupted")[0]["node_id"] == TRAIN
    assert cancelled.wait < cancelled.step / 10  # of 100 denoising steps, and the backward pass


def test_nothing_is_left_of_a_cancelled_training(comfy: Server, cancelled: Cancelled) -> None:
    assert comfy.client.queue() == 0
    after = video(comfy, sampling("after", batch_size=7))  # the other batch size keeps ComfyUI from its cached result
    assert after == cancelled.before


def test_a_cancelled_training_goes_on_where_it_stopped(comfy: Server, cancelled: Cancelled) -> None:
    folder = run_folder(comfy, "cancelled")
    assert steps(folder) == [1, 2]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002.safetensors"]
    run = checked(comfy.client.run(LONG))
    assert run.ran >= {TRAIN}
    assert min(data["value"] / data["max"] for data in run.of("progress")) >= 2 / 4
    assert steps(folder) == [1, 2, 3, 4]
    assert (folder / "lora.safetensors").is_file()
    assert list((folder / "checkpoints").iterdir()) == []


def test_sampling_is_cancelled_too(comfy: Server) -> None:
    def watch(event: Event) -> None:
        if event.kind == "progress":
            comfy.client.interrupt()

    run = comfy.client.run(sampling("stopped", steps=1000), watch)
    assert run.end is not None
    assert run.end.kind == "execution_interrupted"
    assert max(data["value"] for data in run.of("progress")) < 500


def test_two_trainings_and_a_core_workflow_run_one_after_the_other(comfy: Server) -> None:
    prompts = [training("first"), training("second", k=2), core("after_training")]
    with comfy.client.session() as session:
        runs = [session.wait(name) for name in [session.post(prompt) for prompt in prompts]]
    for run in runs:
        checked(run)
    assert steps(run_folder(comfy, "first")) == steps(run_folder(comfy, "second")) == [1, 2]
    assert [file.is_file() for file in files(comfy, runs[2])] == [True]


def embedded(name: str, **settings: Any) -> Prompt:
    """A training of the embedded model on videos of its own size."""
    prompt = training(name, **dict.fromkeys(SMALL, 0), **settings)
    return {**prompt, "1": node("VaderLoadVideoModel", checkpoint="mini/modelscope")}


def growth(server: Server, runs: Iterable[Callable[[], object]]) -> list[int]:
    """Resident megabytes of the server after each run, above those after the third."""
    process = psutil.Process(server.pid)
    sizes = []
    for run in runs:
        run()
        sizes.append(process.memory_info().rss // MEGABYTE)
    return [size - sizes[2] for size in sizes]


def test_ten_runs_do_not_grow_memory(comfy: Server) -> None:
    prompts = [embedded(f"run_{seed}", seed=seed, steps=1, sampling_steps=1) for seed in range(10)]
    grown = growth(comfy, [partial(comfy.client.run, prompt) for prompt in prompts])
    assert grown[-1] < TOLERANCE, grown


def test_ten_cancelled_runs_do_not_grow_memory(comfy: Server) -> None:
    def start_and_cancel(seed: int) -> None:
        prompt = embedded(f"stopped_{seed}", seed=seed, steps=100, sampling_steps=1)
        run = comfy.client.run(prompt, lambda event: comfy.client.interrupt() if event.kind == "progress" else None)
        assert run.of("execution_interrupted")

    grown = growth(comfy, [partial(start_and_cancel, seed) for seed in range(10)])
    assert grown[-1] < TOLERANCE, grown
