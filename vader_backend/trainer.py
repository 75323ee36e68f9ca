"""The training loop: any objective, one or several processes, interruptible at any moment.

It stands on accelerate for processes and devices. The denoiser is not wrapped: the LoRA's
gradients, which are small, are summed over the processes as one flat tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from .checkpoint import CheckpointFolder
from .config import InputError, option
from .objectives.base import Batch, Objective, Validation
from .rng import generator

EIGHT_BIT = "AdamW 8-bit"
_GIVE_UP_AFTER = 5


@dataclass(frozen=True)
class TrainOptions:
    """How long, how fast and how often."""

    steps: int = option(100, "Optimizer steps.", low=1, high=100000)
    batch_size: int = option(1, "Videos per forward and process.", low=1, high=256)
    grad_accumulation_steps: int = option(1, "Forwards per optimizer step.", low=1, high=1024)
    learning_rate: float = option(
        0.0, "Learning rate of AdamW; 0 takes the model's published value.", low=0.0, high=1.0, step=1e-6
    )
    lr_schedule: str = option("constant", "Learning rate after the warm-up.", choices=("constant", "cosine"))
    warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.", low=0, high=100000)
    optimizer: str = option(
        "AdamW", "AdamW, or the same with its two moments held in 8 bits, for which bitsandbytes must be installed.",
        choices=("AdamW", EIGHT_BIT),
    )  # fmt: skip
    weight_decay: float = option(0.01, "AdamW's weight decay.", low=0.0, high=10.0, step=0.001)
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this norm; 0 = not clipped.", low=0.0, high=1000.0, step=0.1
    )
    ema_decay: float = option(
        0.0,
        "Above 0, the result is the moving average of the LoRA with this decay.",
        low=0.0,
        high=0.99999,
        step=0.0001,
    )
    save_every: int = option(25, "Steps between checkpoints; the last two are kept.", low=1, high=100000)
    preview_every: int = option(
        0, "Steps between previews and held-out rewards of fixed prompts; 0 = none.", low=0, high=100000
    )
    compile_rollout: bool = option(
        False,
        "Compile the denoiser for steps without gradient (torch.compile): minutes at the start, then less a step.",
    )
    seed: int = option(0, "Seed of the noise, the prompts' order and the LoRA's start.", low=0, high=2**53)

    def check(self) -> None:
        """Raises InputError where the optimizer's package is missing."""
        if self.optimizer == EIGHT_BIT and find_spec("bitsandbytes") is None:
            raise InputError(
                f"The optimizer {EIGHT_BIT} needs the package bitsandbytes; install it (python -m pip install "
                "bitsandbytes), or choose AdamW."
            )

    def new_optimizer(self, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """Over all parameters, at one rate."""
        kind = torch.optim.AdamW
        if self.optimizer == EIGHT_BIT:
            kind = import_module("bitsandbytes.optim").AdamW8bit
        return kind(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=self.weight_decay)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to try."""


@dataclass(frozen=True)
class Hooks:
    """What a host may listen to; each may raise to stop the training, whose state is then saved.

    progress(result so far, steps in all, metrics); preview(steps done, validation); on_sample_step() after
    each denoising step; should_stop() asks for an end after the current step.
    """

    progress: Callable[[TrainResult, int, dict[str, float]], None] = lambda result, total, metrics: None
    preview: Callable[[int, Validation], None] = lambda done, validation: None
    on_sample_step: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class TrainResult:
    """losses and rewards: one value per finished step; skipped: steps left out for a non-finite gradient.

    held_out: (step, mean reward of the previewed prompts) of every preview.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    stopped: bool = False


def new_accelerator(device: torch.device) -> Accelerator:
    """An accelerator of this run's own: accelerate keeps the settings of the first one in a process-wide state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="no", cpu=device.type == "cpu")


def train(
    parameters: dict[str, nn.Parameter],
    objective: Objective,
    options: TrainOptions,
    *,
    learning_rate: float,
    accelerator: Accelerator,
    hooks: Hooks | None = None,
    checkpoints: CheckpointFolder | None = None,
    loss_scaling: bool = False,
) -> tuple[TrainResult, dict[str, Tensor]]:
    """Run `options.steps` optimizer steps, going on from the newest checkpoint if there is one.

    Args:
        parameters: what is trained, by name.
        learning_rate: the rate after warm-up.
        loss_scaling: scale the loss, for networks whose frozen weights are float16.

    Returns:
        The curves, and the trained tensors by name (their moving average where one is kept).

    Raises:
        TrainingError: five steps in a row gave no finite gradient.
    """
    loop = _Loop(
        parameters, objective, options, learning_rate, accelerator, hooks or Hooks(), checkpoints, loss_scaling
    )
    loop.restore()
    try:
        loop.run()
    finally:
        loop.save()
    return loop.result, loop.ema or {name: p.detach() for name, p in parameters.items()}


class _Loop:
    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        objective: Objective,
        options: TrainOptions,
        learning_rate: float,
        accelerator: Accelerator,
        hooks: Hooks,
        checkpoints: CheckpointFolder | None,
        loss_scaling: bool,
    ) -> None:
        self.parameters = parameters
        self.objective = objective
        self.options = options
        self.accelerator = accelerator
        self.hooks = hooks
        self.checkpoints = checkpoints
        self.optimizer = options.new_optimizer(list(parameters.values()), learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=loss_scaling)
        self.ema = {n: p.detach().clone() for n, p in parameters.items()} if options.ema_decay else None
        self.result = TrainResult()
        self.failures = 0
        self._saved_step = -1
        self._between_steps = True  # False while the parameters are ahead of the step counter

    def run(self) -> None:
        size = self.options.batch_size * self.options.grad_accumulation_steps * self.accelerator.num_processes
        self._preview(first=True)
        while self.result.step < self.options.steps and not self.result.stopped:
            metrics: dict[str, float] = {}
            for batch in self.objective.collect(self.result.step, size):
                metrics = self._update(batch)
                self.objective.after_update(self.result.step)
            self.scheduler.step()
            self.result.step += 1
            self.result.losses.append(metrics["loss"])
            self.result.rewards.append(metrics.get("reward", math.nan))
            self._between_steps = True
            self.hooks.progress(self.result, self.options.steps, metrics)
            self._preview()
            if self.result.step % self.options.save_every == 0:
                self.save()

    def _update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; its metrics, averaged over all samples and processes."""
        sums: dict[str, Tensor] = {}
        micro_batches = batch.divide(
            self.accelerator.process_index, self.accelerator.num_processes, self.options.batch_size
        )
        for micro in micro_batches:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator(self.options.seed, "dropout", *micro.key).initial_seed())
                loss, metrics = self.objective.loss(micro)
                share = len(micro) / len(batch)
                if loss.requires_grad:
                    self.scaler.scale(loss * share).backward()
            parts = {"loss": loss.detach() * share, **{name: v.sum() / len(batch) for name, v in metrics.items()}}
            sums = {name: sums[name] + part if name in sums else part for name, part in parts.items()}
        averages = self._synchronise(sums)
        norm = self._gradient_norm()
        if self._finite(averages["loss"], norm):
            self._between_steps = False
            self.scaler.step(self.optimizer)
            self._follow()
        self.scaler.update() if self.scaler.is_enabled() else None
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **averages,
            "grad_norm": norm,
            "learning_rate": float(self.scheduler.get_last_lr()[0]),
            "skipped": self.result.skipped,
        }

    def _synchronise(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sum gradients, metrics and the wish to stop over the processes, in one exchange."""
        names = sorted(sums)
        parameters = list(self.parameters.values())
        stop = float(self.hooks.should_stop())
        extra = torch.stack(
            [*(sums[name].double() for name in names), torch.tensor(stop, dtype=torch.float64, device=self._device)]
        )
        if self.accelerator.num_processes > 1:
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            kind = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
            flat = torch.cat([*(g.flatten().to(kind) for g in grads), extra.to(kind)])
            flat = self.accelerator.reduce(flat, "sum")
            pieces = flat.split([*(p.numel() for p in parameters), len(extra)])
            for parameter, piece in zip(parameters, pieces, strict=False):
                parameter.grad = piece.view_as(parameter).to(parameter.dtype)
            extra = pieces[-1]
        *values, stop = extra.tolist()
        self.result.stopped = stop > 0
        return dict(zip(names, values, strict=True))

    def _gradient_norm(self) -> float:
        """The norm before clipping."""
        self.scaler.unscale_(self.optimizer) if self.scaler.is_enabled() else None
        limit = self.options.max_grad_norm or math.inf
        return float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def _finite(self, loss: float, norm: float) -> bool:
        if math.isfinite(loss) and math.isfinite(norm):
            self.failures = 0
            return True
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return True  # the loss scale was too high: the scaler skips this step itself and lowers it
        self.result.skipped += 1
        self.failures += 1
        if self.failures >= _GIVE_UP_AFTER:
            raise TrainingError(
                f"{_GIVE_UP_AFTER} steps in a row gave a loss or gradient that is not finite (loss {loss}, gradient "
                f"norm {norm}). Try a lower learning_rate, a smaller K, bfloat16 or float32 instead of "
                "float16 weights, or another reward; the last good state is saved."
            )
        return False

    @torch.no_grad()
    def _follow(self) -> None:
        if self.ema is not None:
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter, 1 - self.options.ema_decay)

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / (self.options.warmup_steps + 1))
        if self.options.lr_schedule == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.options.steps)))

    def _preview(self, *, first: bool = False) -> None:
        every, step = self.options.preview_every, self.result.step
        if not every or (step % every and step != self.options.steps) or first != (step == 0):
            return
        if self.accelerator.is_main_process:
            validation = self.objective.validate(self.options.batch_size)
            self.result.held_out.append((step, float(validation.rewards.mean())))
            self.hooks.preview(step, validation)

    def save(self) -> None:
        """Write a checkpoint of the last finished step, unless there is one already."""
        if self.checkpoints is None or not self.accelerator.is_main_process or not self._between_steps:
            return
        if self.result.step in (0, self._saved_step):
            return
        state: dict[str, Any] = {
            "step": self.result.step,
            "losses": self.result.losses,
            "rewards": self.result.rewards,
            "held_out": self.result.held_out,
            "skipped": self.result.skipped,
            "failures": self.failures,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema,
        }
        self.checkpoints.save(self.result.step, state)
        self._saved_step = self.result.step

    def restore(self) -> None:
        """Go on from the newest checkpoint; random draws are keyed by step, so the step number restores them."""
        found = self.checkpoints.load_newest() if self.checkpoints is not None else None
        if found is None:
            return
        _, state = found
        if set(state["parameters"]) != set(self.parameters):
            raise InputError(
                "The checkpoint in the run folder belongs to another LoRA; delete the run folder to start anew."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
                if self.ema is not None:
                    self.ema[name].copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        held_out = [(int(step), float(value)) for step, value in state["held_out"]]
        self.result = TrainResult(state["step"], state["losses"], state["rewards"], held_out, state["skipped"])
        self.failures = state["failures"]
        self._saved_step = self.result.step

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device
