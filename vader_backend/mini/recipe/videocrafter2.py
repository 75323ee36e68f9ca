"""The mini VideoCrafter2: the mini ModelScope's denoiser and text encoder, widened and trained on as VideoCrafter2's.

Written as model.safetensors in the key layout of the published model.ckpt, with a tokenizer beside
it. It has VideoCrafter2's own process: at its noisiest time some of the mean brightness of a plain
picture is left. Noise whose mean varies too hides it, so that sampling from pure noise does not
fall back to grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ...checkpoint import atomic_path
from ...models import modelscope
from ...models._videocrafter2_text import build_text_encoder, tokenize
from ...models._videocrafter2_unet import make_unet
from ...models.videocrafter2 import Config, VideoCrafter2, build, make_process
from ...rng import generator
from ..world import SEEN_SCENES, UNSEEN_SCENES, random_scenes
from .fit import SEED, fit
from .image_autoencoder import load_image_autoencoder
from .text_to_video import BATCH, DROP_TEXT, encoded_renders, judge_captions, noisy_times
from .tokenizer import save_tokenizer
from .videocrafter2_keys import original_tensors, text_tensors
from .widen import in_front, widen

STEPS = 4000
TRAVEL = 25.0  # pixels in a second: the faster the motion, the fewer frames per second
OFFSET = 0.15  # deviation of what offset noise adds
_NAME = "videocrafter2"
_FLOOR = 0.03
_WIDTHS = (64, 64, 64)
_NARROW = 32  # channels of the mini ModelScope's first level


def videocrafter2(work: Path, weights: Path) -> dict[str, Any]:
    """Train it, write the checkpoint, and judge it as it was written."""
    folder = weights / _NAME
    source = modelscope.build(modelscope.Config(str(weights / "modelscope")))
    model = start(source, load_image_autoencoder(work), save_tokenizer(folder / "tokenizer"))
    train_videocrafter2(model, source.vae, work)
    save_videocrafter2(model, folder)
    return judge_videocrafter2(folder)


def start(source: modelscope.ModelScope, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> VideoCrafter2:
    """An untrained VideoCrafter2 that knows what the mini ModelScope knows, as far as the layout lets it.

    Its text encoder has other heads and activations, its denoiser predicts noise instead of v.
    """
    torch.manual_seed(SEED)
    text_encoder = start_text_encoder(source.text_encoder)
    return VideoCrafter2("mini", start_unet(source.denoiser), vae, text_encoder, tokenizer, make_process())


def start_text_encoder(source: CLIPTextModel) -> CLIPTextModel:
    """The same weights in VideoCrafter2's tower."""
    tensors = {name.removeprefix("text_model."): tensor.clone() for name, tensor in source.state_dict().items()}
    return build_text_encoder(text_tensors(tensors), torch.float32, Path("the mini ModelScope"))


def start_unet(source: UNet3DConditionModel) -> UNet3DConditionModel:
    """The same denoiser with a wider first level, so that no norm has a group of one channel, and told the fps.

    The embedding of the fps starts at zero; the last level is narrower and starts afresh.
    """
    config = {name: value for name, value in source.config.items() if not name.startswith("_")}
    unet = make_unet(**{**config, "block_out_channels": _WIDTHS, "norm_num_groups": 32})
    widen(unet, source.state_dict(), _places)
    last = unet.time_embedding.fps.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return unet


def _places(name: str, count: int) -> Tensor:
    """Where the old inputs lie among the new ones."""
    places = in_front(name, count)
    if name == "time_embedding.linear_1.weight":
        return 2 * places  # the cosines, then the sines, of twice as many frequencies
    if name.startswith(("up_blocks.2.resnets.1.norm1", "up_blocks.2.resnets.1.conv")):
        return places + _NARROW * (places >= _NARROW)  # two first levels side by side
    return places


def train_videocrafter2(model: VideoCrafter2, encoder: AutoencoderKL, work: Path, steps: int = STEPS) -> None:
    """Train denoiser and text encoder in place, on renders of seen scenes, encoded once.

    Divided by the signal's power, an error of the noise counts as the same error of v would: else
    the noisiest times, where the words are heard, would have no weight. The floor bounds it.

    Args:
        encoder: gives the latents; the mini ModelScope's is the fastest of those that give the same.
    """
    process = make_process()
    trained = nn.ModuleDict({"unet": model.denoiser, "text_encoder": model.text_encoder}).requires_grad_(True)
    latents, scenes, speed = encoded_renders(encoder, generator(SEED, _NAME, "pool"))
    tokens = tokenize(model.tokenizer, [*(scene.caption for scene in scenes), ""], model.context)

    def loss(step: int, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=rng)
        x0, t = latents[rows].float(), noisy_times(rng)
        noise = offset_noise(x0.shape, rng)
        blank = torch.rand(BATCH, generator=rng) < DROP_TEXT
        text = model.text_encoder(input_ids=torch.where(blank[:, None], tokens[-1], tokens[rows])).last_hidden_state
        z, fps = process.add_noise(x0, noise, t), TRAVEL / speed[rows]
        output = model.denoiser(z, t, text, timestep_cond=fps).sample.float()
        signal = process.add_noise(torch.ones(BATCH), torch.zeros(BATCH), t)
        error = (output - noise).square().mean((1, 2, 3, 4))
        return (error / (signal.square() + _FLOOR)).mean()

    fit(_NAME, trained, loss, steps=steps, learning_rate=1e-3, work=work)


def offset_noise(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Unit noise and, for each sample and channel, a little more that is the same everywhere."""
    return torch.randn(shape, generator=rng) + OFFSET * torch.randn(*shape[:2], 1, 1, 1, generator=rng)


def save_videocrafter2(model: VideoCrafter2, folder: Path) -> None:
    """Write model.safetensors in the original key layout, weights in float16."""
    tensors = {key: tensor.half().contiguous() for key, tensor in original_tensors(model).items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)


def judge_videocrafter2(folder: Path, samples: int = 96) -> dict[str, dict[str, float]]:
    """What the oracle reads from samples of seen and as many unseen captions."""
    pools = {"seen": SEEN_SCENES, "unseen": UNSEEN_SCENES}
    scenes = {name: random_scenes(samples, generator(SEED, _NAME, "judge"), pool) for name, pool in pools.items()}
    return judge_captions(build(Config(str(folder))), scenes)
