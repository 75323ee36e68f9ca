"""Predicts the device memory of a training step without running it: the real step on tensors without content.

Works on any machine, for models of any size. What kernels, CUDA and its allocator take for themselves is not
counted; ALLOWANCE stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from .align import Settings
from .lora import attached
from .memory.fake import DEVICE, HOST, fake_copy, fake_mode, fused_attention, make_fake, moving
from .memory.options import MemoryConfig, tricks
from .memory.tracker import MemoryTracker, tensors_of
from .models.base import VideoModel
from .objectives.base import Batch
from .placement import PROMPTS_AT_A_TIME, lent, residents
from .prompts import PromptSet
from .registry import load
from .rewards.base import Reward
from .trainer import EIGHT_BIT, TrainOptions
from .wrapping import Depth, wrapped

ALLOWANCE = 1.08  # fragments of the allocator, workspaces of kernels
PHASES = ("encode", "rollout", "differentiated steps", "decode", "reward", "backward")
PREVIEW = "preview"  # the phase of a training that makes any


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device.

    peak: the most at any moment. phases: the most in each part of a step; `backward` recomputes what was
    checkpointed, and PREVIEW is one where the training makes any. resident: what lies there between the steps.
    host: the most in main memory, for networks that wait there and graphs that were offloaded.
    """

    peak: int
    phases: Mapping[str, int]
    resident: int
    host: int

    def fits(self, gigabytes: float) -> bool:
        """Whether a card of so many GB (10^9 bytes) has the room, with ALLOWANCE."""
        return self.peak * ALLOWANCE <= gigabytes * 1e9


def estimate(
    model: VideoModel,
    reward: Reward,
    settings: Settings,
    memory: MemoryConfig,
) -> Estimate:
    """Predict one optimizer step.

    The rollout is shortened to one step without gradient beside the differentiated ones: all such steps are alike.
    Model and reward may be without weights (`full_size` of their modules); they stay as they are.

    Raises:
        InputError: the settings do not fit the model.
    """
    settings.check()
    mode = fake_mode()
    model, reward = fake_copy((model, reward), (*model.parts().values(), *reward.networks()), mode)
    tracker = MemoryTracker(DEVICE, HOST)
    with moving(), fused_attention(), attached(model, settings.lora, seed=0):
        make_fake(model.denoiser, mode)
        tracker.add(tensors_of([*model.parts().values(), *reward.networks()]))
        return _step(model, reward, settings, memory, torch.device(DEVICE), HOST, tracker)


def measure(
    model: VideoModel, reward: Reward, settings: Settings, memory: MemoryConfig, device: torch.device
) -> Estimate:
    """The same step in earnest, on `device`; the networks lie in main memory before and after.

    On CUDA the peak is the allocator's own; elsewhere live tensors are counted. Main memory is not.
    """
    settings.check()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with attached(model, settings.lora, seed=0):
        found = _step(model, reward, settings, memory, device, "cpu", MemoryTracker(device.type))
    return replace(found, peak=torch.cuda.max_memory_allocated(device)) if cuda else found


def _step(
    model: VideoModel,
    reward: Reward,
    settings: Settings,
    memory: MemoryConfig,
    device: torch.device,
    host: str,
    tracker: MemoryTracker,
) -> Estimate:
    """One step in the order in which `align` places networks; `host` is main memory."""
    size = settings.train.batch_size
    count = max(size, PROMPTS_AT_A_TIME)
    video = settings.video.resolve(model)
    from_images = "image_encoder" in model.parts()
    images = tuple(torch.zeros(3, video.height, video.width) for _ in range(count)) if from_images else ()
    prompts = PromptSet(("a video",) * count, (), images)
    with ExitStack() as stack:
        stack.enter_context(tricks(model, reward.networks(), memory, device, host))
        stack.enter_context(_watched(model, tracker))
        stack.enter_context(tracker)
        stack.enter_context(_placed(residents(model), device, tracker))
        with _encoding(model, device, tracker):
            objective = load("objectives", settings.method).build(
                _shortened(settings.objective, model), model, _Watched(reward, tracker), prompts, video, seed=0
            )
        stack.enter_context(_placed(reward.networks(), device, tracker))
        trained = [p for p in model.denoiser.parameters() if p.requires_grad]
        state = _optimizer_state(trained, settings.train)
        with tracker.phase("resident"):
            pass
        loss, _ = objective.loss(Batch(0, tuple(range(size)), tuple(range(size))))
        with tracker.phase("backward"):
            loss.backward()
        del loss
        for parameter in trained:
            parameter.grad = None
        if settings.train.preview_every:
            with tracker.phase(PREVIEW, whole=True):
                objective.validate(size)
        del state
    phases = dict(tracker.phases)
    main_memory = tracker.counts[host].peak if host in tracker.counts and host != device.type else 0
    return Estimate(tracker.main.peak, phases, phases["resident"], main_memory)


@contextmanager
def _placed(networks: Sequence[nn.Module], device: torch.device, tracker: MemoryTracker) -> Iterator[None]:
    with lent(networks, device):
        tracker.add(tensors_of(networks))
        yield


@contextmanager
def _encoding(model: VideoModel, device: torch.device, tracker: MemoryTracker) -> Iterator[None]:
    """The phase in which `placement.encode` has the encoders on the device, and the denoiser on the CPU.

    Where the device is a CPU, or is named so, they are counted as if that were another place.
    """
    encoders = [network for name, network in model.parts().items() if name not in ("denoiser", "vae")]

    def here(networks: Sequence[nn.Module]) -> list[Tensor]:
        return [tensor for tensor in tensors_of(networks) if tensor.device.type == device.type == "cpu"]

    with tracker.swapped(here([model.denoiser]), here(encoders)), tracker.phase("encode"):
        yield


def _optimizer_state(parameters: Sequence[Tensor], options: TrainOptions) -> list[Tensor]:
    """Two moments, and the moving average."""
    moments = torch.uint8 if options.optimizer == EIGHT_BIT else None
    kinds = [moments, moments, *([None] if options.ema_decay else [])]
    return [torch.empty_like(p, dtype=kind) for p in parameters for kind in kinds]


def _shortened(config: Any, model: VideoModel) -> Any:
    """As few sampling steps as show every kind of step."""
    total = config.sampling_steps or model.defaults.steps
    differentiated = {"random_start": total, "from_step": total - config.from_step}.get(config.truncation, config.k)
    config.check(total)
    steps = min(total, differentiated + 1)
    return replace(config, sampling_steps=steps, truncation="last_k", k=differentiated)


@contextmanager
def _watched(model: VideoModel, tracker: MemoryTracker) -> Iterator[None]:
    """Tells the tracker which part of the step is going on."""

    def predicting(predict: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(predict)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with tracker.phase("differentiated steps" if torch.is_grad_enabled() else "rollout"):
                return predict(*args, **kwargs)

        return wrapper

    def decoding(decode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(decode)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with tracker.phase("decode"):
                return decode(*args, **kwargs)

        return wrapper

    with wrapped(model, "predict", Depth.WATCH, predicting), wrapped(model, "decode", Depth.WATCH, decoding):
        yield


class _Watched:
    """A reward that tells the tracker when it is asked."""

    def __init__(self, reward: Reward, tracker: MemoryTracker) -> None:
        self.reward = reward
        self.tracker = tracker

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        with self.tracker.phase("reward"):
            return self.reward(video_BTCHW, prompts, indices)
