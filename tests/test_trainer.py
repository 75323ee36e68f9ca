"""The loop: repeatable, resumable after SIGKILL, equal on two processes, and it gives up on non-finite gradients."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Brightness, tiny_model
from torch import Tensor
from vader_nodes.vader_backend.align import AlignResult, Settings, align
from vader_nodes.vader_backend.generate import VideoConfig
from vader_nodes.vader_backend.lora import LoraConfig, attached
from vader_nodes.vader_backend.memory.options import MemoryConfig
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.rewards.base import SingleReward
from vader_nodes.vader_backend.trainer import Hooks, TrainingError, TrainOptions, new_accelerator, train

PROMPTS = PromptSet(("a red circle", "a blue square", "a green cross"), ("a white triangle",))
WORKER = Path(__file__).parent / "train_worker.py"


def settings(**options: object) -> Settings:
    lora = LoraConfig(rank=2, dropout=float(options.pop("dropout", 0.0)))  # type: ignore[arg-type]
    objective = vader.Config(sampling_steps=3, guidance=2.0, k=1, reward_frames="random", frame_count=2)
    values = {"steps": 4, "learning_rate": 0.02, "batch_size": 2, "save_every": 2} | options
    return Settings(objective, lora=lora, train=TrainOptions(**values), video=VideoConfig(3, 8, 8))  # type: ignore[arg-type]


def run(folder: Path, chosen: Settings, hooks: Hooks | None = None, reward: object = None) -> AlignResult:
    model = tiny_model(folder, torch.float32)
    return align(model, reward or Brightness(), PROMPTS, chosen, root=folder / "runs", hooks=hooks)  # type: ignore[arg-type]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_same_seed_same_lora_and_another_seed_another(tmp_path: Path) -> None:
    first, second, other = (
        run(tmp_path / name, settings(seed=seed, dropout=0.1)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_same(first.lora, second.lora)
    assert first.losses == second.losses
    assert any(not torch.equal(first.lora[name], other.lora[name]) for name in first.lora)


def test_training_raises_the_reward_and_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
    seen: list[float] = []
    hooks = Hooks(preview=lambda done, validation: seen.append(float(validation.rewards.mean())))
    chosen = settings(steps=12, learning_rate=0.05, preview_every=12)
    align(model, Brightness(), PROMPTS, chosen, root=tmp_path / "runs", hooks=hooks)  # type: ignore[arg-type]
    assert seen[-1] > seen[0]
    assert_same(before, model.denoiser.state_dict())
    assert not any(p.requires_grad for p in model.denoiser.parameters())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_previews_are_made_a_batch_at_a_time_and_do_not_depend_on_it(tmp_path: Path, size: int) -> None:
    model = tiny_model(tmp_path)
    seen: list[int] = []

    class Counted(Brightness):
        def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
            seen.append(len(video_BTCHW))
            return super().__call__(video_BTCHW, prompts, indices)

    chosen = settings()
    prompts = replace(PROMPTS, held_out=("a white triangle", "a blue cross", "a red square"))
    made = vader.build(chosen.objective, model, Counted(), prompts, chosen.video.resolve(model), seed=0)  # type: ignore[arg-type]
    parts, whole = made.validate(size), made.validate(4)
    assert seen == {1: [1, 1, 1, 3], 2: [2, 1, 3], 3: [3, 3]}[size]
    assert parts.prompts == whole.prompts == prompts.held_out
    for one, other in ((parts.video_BTCHW, whole.video_BTCHW), (parts.rewards, whole.rewards)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_run_is_found_again_with_other_memory_settings_that_leave_the_result(tmp_path: Path) -> None:
    """ModelScope's decoder is not taken in tiles, as it normalizes over the whole picture."""
    model = tiny_model(tmp_path, torch.float32)

    def trained(**memory: Any) -> AlignResult:
        return align(
            model,
            Brightness(),
            PROMPTS,
            settings(),
            root=tmp_path / "runs",
            memory=MemoryConfig(**memory),  # type: ignore[arg-type]
        )

    trained(decode_tile=512, gradient_checkpointing=True)
    assert trained(decode_tile=256, stepwise=True).reused
    assert not trained(weight_storage="float8").reused


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    split = gradient_of(tmp_path, batch_size=1, accumulation=4)
    whole = gradient_of(tmp_path, batch_size=4, accumulation=1)
    for name, gradient in whole.items():
        assert (split[name] - gradient).abs().max() <= 1e-9 * max(float(g.abs().max()) for g in whole.values())


def gradient_of(folder: Path, batch_size: int, accumulation: int) -> dict[str, Tensor]:
    """The summed gradient of the first update, in float64."""
    model = tiny_model(folder)
    found: dict[str, Tensor] = {}
    chosen = settings(batch_size=batch_size, grad_accumulation_steps=accumulation, steps=1, max_grad_norm=0.0)
    with attached(model, chosen.lora, seed=0) as parameters:
        for parameter in parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
        objective = vader.build(chosen.objective, model, Brightness(), PROMPTS, chosen.video.resolve(model), seed=0)
        accelerator = new_accelerator(model.device)
        train(parameters, objective, chosen.train, learning_rate=0.1, accelerator=accelerator)
    return found


def test_a_finished_run_is_reused(tmp_path: Path) -> None:
    first = run(tmp_path, settings())
    calls: list[int] = []
    again = run(tmp_path, settings(), Hooks(progress=lambda result, total, metrics: calls.append(result.step)))
    assert again.reused
    assert not calls
    assert_same(first.lora, again.lora)
    other = run(tmp_path, settings(learning_rate=0.03))
    assert not other.reused
    assert other.folder != first.folder


def test_what_was_chosen_at_loading_makes_another_run(tmp_path: Path) -> None:
    chosen = settings(steps=1)
    model = tiny_model(tmp_path, torch.float32)
    folders = []
    for sampler, weight in (("ddim", 1.0), ("dpm++2m", 1.0), ("ddim", 2.0)):
        model.settings = {"sampler": sampler}
        model.vae.decoder.conv_out.bias.data.fill_(weight)
        result = align(model, Brightness(), PROMPTS, chosen, root=tmp_path / "runs")  # type: ignore[arg-type]
        assert not result.reused
        folders.append(result.folder)
    assert len(set(folders)) == 3


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt, which is a BaseException in new versions."""


def test_a_cancelled_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", settings(steps=6, ema_decay=0.5, save_every=100))
    ticks = 0

    def cancel() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3 * 3 + 2:  # within the fourth rollout
            raise Cancelled

    with pytest.raises(Cancelled):
        run(tmp_path / "parts", settings(steps=6, ema_decay=0.5, save_every=100), Hooks(on_sample_step=cancel))
    resumed = run(tmp_path / "parts", settings(steps=6, ema_decay=0.5, save_every=100))
    assert_same(whole.lora, resumed.lora)
    assert whole.losses == resumed.losses
    lines = [json.loads(line) for line in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_two_trainings_in_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    alone = run(tmp_path / "a", settings(seed=3))
    run(tmp_path / "b", settings(seed=4))
    assert_same(alone.lora, run(tmp_path / "c", settings(seed=3)).lora)


class Broken(SingleReward):
    """Gives NaN from the given call on."""

    name = "broken"
    description = {"kind": "broken"}

    def __init__(self, calls: range) -> None:
        self.calls = calls
        self.count = -1

    def networks(self) -> list[torch.nn.Module]:
        return []

    def __call__(self, video_BTCHW: Tensor, prompts: object, indices: object) -> Tensor:
        self.count += 1
        return video_BTCHW.mean((1, 2, 3, 4)) * (float("nan") if self.count in self.calls else 1.0)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    result = run(tmp_path, settings(steps=8), reward=Broken(range(2, 6)))
    assert result.skipped == 4
    assert all(tensor.isfinite().all() for tensor in result.lora.values())
    assert any(tensor.any() for name, tensor in result.lora.items() if "lora_B" in name)


def test_five_in_a_row_stop_the_training_with_advice(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="learning_rate"):
        run(tmp_path, settings(steps=30), reward=Broken(range(3, 100)))


def test_float16_weights_train_with_loss_scaling(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, torch.float16)
    result = align(model, Brightness(), PROMPTS, settings(), root=tmp_path / "runs")  # type: ignore[arg-type]
    assert result.skipped == 0
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in result.lora.values())
    assert any(tensor.any() for name, tensor in result.lora.items() if "lora_B" in name)


def start_worker(*arguments: object, prefix: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    command = [*prefix, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def worker(folder: str) -> subprocess.Popen[str]:
        return start_worker("align", tmp_path / folder)

    whole = worker("whole")
    assert whole.wait(240) == 0, whole.stderr.read() if whole.stderr else ""
    kill_at = random.randint(2, 18)
    killed = worker("killed")
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith(f"step {kill_at}"):
            break
    time.sleep(random.random() * 0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    resumed = worker("killed")
    output, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    assert "step 1\n" not in output, f"killed at {kill_at}, but training began anew"
    digests = [(tmp_path / name / "digest").read_text() for name in ("whole", "killed")]
    assert digests[0] == digests[1], f"killed at step {kill_at}"


def test_two_processes_give_the_gradient_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = start_worker("gradient", tmp_path / "two", 1, prefix=launch)
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    one = start_worker("gradient", tmp_path / "one", 2)
    _, errors = one.communicate(timeout=300)
    assert one.returncode == 0, errors
    single = load_file(tmp_path / "one" / "gradient_0.safetensors")
    scale = max(float(g.abs().max()) for g in single.values())
    assert scale > 0
    for rank in (0, 1):
        double = load_file(tmp_path / "two" / f"gradient_{rank}.safetensors")
        assert set(single) == set(double)
        for name, gradient in single.items():
            assert (double[name] - gradient).abs().max() <= 1e-6 * scale, name


def test_a_cancel_is_heard_at_every_denoising_step_and_again_on_the_way_back(tmp_path: Path) -> None:
    calls: list[int] = []
    chosen = settings(steps=1, batch_size=1)
    whole = replace(chosen, objective=replace(chosen.objective, k=3))
    run(tmp_path / "one", chosen, Hooks(on_sample_step=lambda: calls.append(1)))
    assert len(calls) == 3 + 1
    calls.clear()
    run(tmp_path / "all", whole, Hooks(on_sample_step=lambda: calls.append(1)))
    assert len(calls) == 3 + 3

    def cancel() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cancelled", whole, Hooks(on_sample_step=cancel))
    assert len(calls) == 5
