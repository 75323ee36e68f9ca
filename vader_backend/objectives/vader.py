"""VADER: maximise a reward by its gradient through the last denoising steps.

Source: Algorithm 1 and section 4 of the paper. Section 4's R(i_k) for a random frame k is the
reward's own frame choice, or the one set here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import InputError, check, option
from ..generate import guidance_scale, initial_noise, noise_share, start_images
from ..models.base import VideoModel
from ..placement import encode
from ..prompts import PromptSet
from ..rewards.base import Reward
from ..rng import generator
from ..rollout_cache import CachedRollout, relative_error
from ..sampling import GradPlan, sample
from ..types import FrameSpec, Rollout, VideoSpec
from .base import Batch, Validation

_COMPARE_EVERY = 25  # steps between two rollouts that are also run in full
TRUNCATIONS = ("last_k", "random_k", "random_start", "from_step", "uniform")


@dataclass(frozen=True)
class Config:
    """How gradients flow; 0, and an eta of -1, stand for the model family's published value."""

    sampling_steps: int = option(
        0, "Denoising steps T of each rollout; 0 takes the model's published number.", low=0, high=1000
    )
    guidance: float = option(
        0.0,
        "Classifier-free guidance; both branches get gradient. 1 = none, 0 = the model's.",
        low=0.0,
        high=100.0,
        step=0.1,
    )
    eta: float = option(
        -1.0, "Fresh noise per step: 0 = DDIM, 1 = as much as DDPM, -1 = the model's published value.",
        low=-1.0, high=1.0, step=0.05,
    )  # fmt: skip
    truncation: str = option(
        "last_k",
        "Which steps are differentiated: the last K; K random ones; all from a random one on; all from a given one "
        "on; K evenly spread ones.",
        choices=TRUNCATIONS,
    )  # fmt: skip
    k: int = option(
        1,
        "K: number of differentiated denoising steps (last_k, random_k, uniform). 1 is the paper's choice.",
        low=1,
        high=1000,
    )
    from_step: int = option(
        0, "First differentiated step for the truncation from_step; 0 is the noisiest.", low=0, high=999
    )
    stop_input: bool = option(False, "Detach the denoiser's input in each differentiated step (DRTune).")
    reward_frames: str = option(
        "reward", "Frames that are decoded and scored: the reward's own, random, evenly spaced, the first, or all.",
        choices=("reward", "random", "even", "first", "all"),
    )  # fmt: skip
    frame_count: int = option(1, "Number of frames for random, even and first.", low=1, high=1024)
    evaluations: int = option(
        1,
        "Optimizer updates per rollout, each with other frames and other noise in the differentiated steps; the steps "
        "before these, most of the work, are not run again.",
        low=1,
        high=64,
    )
    rollout_interval: int = option(
        1,
        "Run the denoiser at every n-th step before the differentiated ones, and at the first two; its last prediction "
        "serves between. 1 = at every step. The report tells how far videos are off.",
        low=1,
        high=100,
    )
    negative_prompt: str = option("", "What the videos should not show.", multiline=True)

    def check(self, sampling_steps: int) -> None:
        """Raises InputError where K or from_step does not fit the number of steps, or a value its range."""
        check(self)
        if self.truncation in ("last_k", "random_k", "uniform") and not 1 <= self.k <= sampling_steps:
            raise InputError(
                f"K is {self.k}; with {sampling_steps} sampling steps it must be between 1 and {sampling_steps}."
            )
        if self.truncation == "from_step" and self.from_step >= sampling_steps:
            raise InputError(
                f"from_step is {self.from_step}; with {sampling_steps} sampling steps it must be below that."
            )


def build(
    config: Config,
    model: VideoModel,
    reward: Reward,
    prompts: PromptSet,
    video: VideoSpec,
    *,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> Vader:
    """Check everything and encode the prompts once.

    Raises:
        InputError: see `check_inputs`.
    """
    check_inputs(config, model, reward, prompts)
    return Vader(config, model, reward, prompts, video, seed, on_step)


def check_inputs(config: Config, model: VideoModel, reward: Reward, prompts: PromptSet) -> None:
    """Refuse what cannot be trained; takes no time.

    Raises:
        InputError: a setting does not fit the model, the reward has no gradient, or there is no prompt.
    """
    config.check(config.sampling_steps or model.defaults.steps)
    if not reward.differentiable:
        raise InputError(
            f"The reward {reward.name} has no gradient, so VADER cannot train on it; use a differentiable reward, "
            "or keep this one for Score Video."
        )
    if not prompts.train:
        raise InputError("There is no prompt to train on; add one to the Prompts node.")


@dataclass
class Vader:
    """See `vader_backend.objectives.base.Objective`."""

    config: Config
    model: VideoModel
    reward: Reward
    prompts: PromptSet
    video: VideoSpec
    seed: int
    on_step: Callable[[], None] | None = None
    validation_count: int = 4

    def __post_init__(self) -> None:
        steps = self.config.sampling_steps or self.model.defaults.steps
        self.schedule = self.model.process.schedule(steps, self.video)
        self.guidance = guidance_scale(self.model, self.config.guidance, self.video)
        self.eta = noise_share(self.model, self.config.eta)
        train, held_out = len(self.prompts.train), len(self.prompts.held_out)
        first = range(min(held_out or train, self.validation_count))
        self._validation_rows = [train + i for i in first] if held_out else list(first)
        used = self.prompts.select(range(train), first if held_out else ())
        self._texts = used.texts
        images = start_images(used.images, self.video)
        self._cond = encode(self.model, self._texts, self.video, negative=self.config.negative_prompt, images=images)
        own = self.reward.frames
        chosen = self.config.reward_frames
        self._prefixes: dict[tuple[tuple[int | str, ...], ...], Rollout] = {}
        self.frames = own if chosen == "reward" else FrameSpec(chosen, self.config.frame_count)  # type: ignore[arg-type]

    def collect(self, step: int, size: int) -> list[Batch]:
        rows = tuple(self._row(step * size + i) for i in range(size))
        self._prefixes.clear()
        return [Batch(step, tuple(range(size)), rows, turn) for turn in range(self.config.evaluations)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        keys = [(self.seed, "train", batch.step, number) for number in batch.numbers]
        turn = ("turn", batch.turn) if batch.turn else ()
        latents = self._rollout(batch.rows, keys, self._plan(batch.step), turn)
        metrics = self._compared(batch, keys, latents.detach())
        indices = self.frames.pick(self.video.frames, generator(self.seed, "frames", batch.step, *turn))
        video = self.model.decode(latents, indices)
        rewards = self.reward(video, [self._texts[row] for row in batch.rows], indices)
        return -rewards.mean(), {"reward": rewards.detach(), **metrics}

    def after_update(self, step: int) -> None:
        """Nothing to do: every update samples anew."""

    @torch.no_grad()
    def validate(self, size: int) -> Validation:
        numbers = range(len(self._validation_rows))
        found = [self._validated(numbers[i : i + size]) for i in numbers[::size]]
        return Validation(
            torch.cat([one.video_BTCHW for one in found]),
            tuple(text for one in found for text in one.prompts),
            torch.cat([one.rewards for one in found]),
        )

    def _validated(self, numbers: Sequence[int]) -> Validation:
        rows = [self._validation_rows[number] for number in numbers]
        keys = [(self.seed, "validate", number) for number in numbers]
        latents = self._rollout(rows, keys, GradPlan.none(len(self.schedule)))
        video = self.model.decode(latents, range(self.video.frames))
        texts = tuple(self._texts[row] for row in rows)
        frames = self.reward.frames.report(self.video.frames)
        return Validation(video.cpu(), texts, self.reward(video[:, list(frames)], texts, frames).cpu())

    @torch.no_grad()
    def _compared(self, batch: Batch, keys: Sequence[tuple[int | str, ...]], latents: Tensor) -> dict[str, Tensor]:
        """Now and then, how far a rollout with cached predictions is off."""
        if self.config.rollout_interval == 1 or batch.turn or batch.step % _COMPARE_EVERY:
            return {}
        full = self._rollout(batch.rows, keys, GradPlan.none(len(self.schedule)))
        return {"rollout_error": relative_error(latents, full)}

    def _rollout(
        self,
        rows: Sequence[int],
        keys: Sequence[tuple[int | str, ...]],
        plan: GradPlan,
        turn: tuple[int | str, ...] = (),
    ) -> Tensor:
        """The last latents; the steps before the first differentiated one are shared by the turns of a batch."""
        cond = self._cond.select(rows).to(self.model.device)
        trained = any(plan.steps)
        interval = self.config.rollout_interval if trained else 1
        first = plan.steps.index(True) if trained and self.config.evaluations > 1 else 0

        def run(end: int | None, after: tuple[int, Rollout] | None, late: tuple[int | str, ...]) -> Rollout:
            denoiser = CachedRollout(self.model, interval) if interval > 1 else self.model
            return sample(
                denoiser, start, cond, self.schedule, plan, guidance=self.guidance, eta=self.eta,
                noise=lambda i: initial_noise(self.model, self.video, [(*key, i, *late) for key in keys]),
                on_step=self._tick, end=end, after=after,
            )  # fmt: skip

        start = initial_noise(self.model, self.video, keys)
        if not first:
            return run(None, None, turn).latents
        known = tuple(keys)
        if known not in self._prefixes:
            self._prefixes[known] = run(first, None, ())
        return run(None, (first, self._prefixes[known]), turn).latents

    def _tick(self, i: int, z: Tensor) -> None:
        on_step = self.on_step
        if on_step is not None:
            on_step()
            if z.requires_grad:  # again when the backward pass has come to this step
                z.register_hook(lambda grad: on_step())

    def _plan(self, step: int) -> GradPlan:
        total, config = len(self.schedule), self.config
        rng = generator(self.seed, "plan", step)
        if config.truncation == "last_k":
            return GradPlan.last_k(total, config.k, stop_input=config.stop_input)
        if config.truncation == "random_k":
            return GradPlan.random_k(total, config.k, rng, stop_input=config.stop_input)
        if config.truncation == "random_start":
            return GradPlan.random_start(total, rng, stop_input=config.stop_input)
        if config.truncation == "from_step":
            return GradPlan.from_step(total, config.from_step, stop_input=config.stop_input)
        return GradPlan.uniform(total, config.k, stop_input=config.stop_input)

    def _row(self, position: int) -> int:
        """Every training prompt once per round, each round in an order of its own."""
        turn, place = divmod(position, len(self.prompts.train))
        order = torch.randperm(len(self.prompts.train), generator=generator(self.seed, "prompts", turn))
        return int(order[place])
