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
from torch import Tensor

from .align import Settings
from .lora import attached
from .memory._wrapping import Depth, wrapped
from .memory.fake import DEVICE, HOST, fake_copy, fake_mode, fused_attention, make_fake, moving
from .memory.options import MemoryConfig, tricks
from .memory.tracker import MemoryTracker, tensors_of
from .models.base import VideoModel
from .objectives.base import Batch
from .placement import residents
from .prompts import PromptSet
from .registry import load
from .rewards.base import Reward
from .types import VideoSpec

ALLOWANCE = 1.08  # fragments of the allocator, workspaces of kernels
PHASES = ("encode", "rollout", "differentiated steps", "decode", "reward", "backward")


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device.

    peak: the most at any moment. phases: the most in each part of a step; `backward` recomputes what was
    checkpointed. resident: what lies there between the steps. host: the most in main memory, for networks that wait
    there and graphs that were offloaded.
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
    video = settings.video.resolve(model)
    mode = fake_mode()
    model, reward = fake_copy((model, reward), (*model.parts().values(), *reward.networks()), mode)
    device, tracker, host = torch.device(DEVICE), MemoryTracker(DEVICE), MemoryTracker(HOST)
    with ExitStack() as stack:
        stack.enter_context(moving())
        stack.enter_context(attached(model, settings.lora, seed=0))
        make_fake(model.denoiser, mode)
        stack.enter_context(tricks(model, reward.networks(), memory, device, HOST))
        stack.enter_context(_watched(model, tracker))
        host.add(tensors_of([*model.parts().values(), *reward.networks()]))
        for entered in (fused_attention(), host, tracker):
            stack.enter_context(entered)
        _step(model, reward, settings, video, tracker)
    return Estimate(tracker.peak, dict(tracker.phases), tracker.phases["resident"], host.peak)


def _step(model: VideoModel, reward: Reward, settings: Settings, video: VideoSpec, tracker: MemoryTracker) -> None:
    size = settings.train.batch_size
    from_images = "image_encoder" in model.parts()
    images = tuple(torch.zeros(3, video.height, video.width) for _ in range(size)) if from_images else ()
    prompts = PromptSet(("a video",) * size, (), images)
    for network in residents(model):
        network.to(DEVICE)
    tracker.add(tensors_of(residents(model)))
    with tracker.phase("encode"):
        objective = load("objectives", settings.method).build(
            _shortened(settings.objective, model), model, _Watched(reward, tracker), prompts, video, seed=0
        )
    for network in reward.networks():
        network.to(DEVICE)
    tracker.add(tensors_of(reward.networks()))
    trained = [p for p in model.denoiser.parameters() if p.requires_grad]
    state = [torch.empty_like(p) for p in trained for _ in range(3 if settings.train.ema_decay else 2)]
    with tracker.phase("resident"):
        pass
    loss, _ = objective.loss(Batch(0, tuple(range(size)), tuple(range(size))))
    with tracker.phase("backward"):
        loss.backward()
    del loss, state


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
