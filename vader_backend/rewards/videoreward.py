"""How good a video looks, how well it moves and how well it fits its prompt: VideoReward, on Qwen2-VL.

Source: Liu et al. 2025, Improving Video Generation with Human Feedback, repository KwaiVGI/VideoAlign. Its own code
takes video files, two frames for each second; here frames are tensors, and the gradient reaches their pixels.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from ..config import InputError, check, option
from ..loading import DTYPES, fingerprint, reading
from ..mini.files import locate as embedded
from ..stand_in import tokenizer as stand_in_tokenizer
from ..types import FrameSpec
from ._fit import scaled
from ._images import check_frames, precision, widened
from ._qwen2vl import WHAT, RewardNetwork, about, empty_network, load_network, newest
from ._qwen2vl_pixels import fitted, patches
from .base import SingleReward

TITLE = "VideoReward"
MARKERS = {"checkpoint": "model_config.json", "base": "config.json"}
ASPECTS = {"visual quality": "VQ", "motion quality": "MQ", "text alignment": "TA"}  # in the order of the text
_OVERALL = "overall"
_MARKS = tuple(f"<|{short}_reward|>" for short in ASPECTS.values())
VIDEO = "<|video_pad|>"
_TEMPLATE, _TEMPLATE_FILE = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN", "prompt_template.py"
_PLAIN_FILE = "prompt_template.txt"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|>{VIDEO}<|vision_end|>{{text}}<|im_end|>\n<|im_start|>assistant\n"
)
_TOLD = {"data_config": {"max_frame_pixels": 448 * 448}}  # taken for model_config.json where there is none
_WORDS = 820  # the published text has some 4100 letters, an English token about 5
_MOST_TOKENS = 32768  # of a text
_FEWEST_TOKENS = 128  # of two frames, to which small videos are enlarged


@dataclass(frozen=True)
class Config:
    """checkpoint: VideoReward; base: the Qwen2-VL that it was made of."""

    checkpoint: str = option(
        "mini/videoreward",
        "Folder of KwaiVGI/VideoReward, with prompt_template.py of github.com/KwaiVGI/VideoAlign in it.",
    )
    base: str = option("mini/videoreward/qwen2vl", "Folder of Qwen/Qwen2-VL-2B-Instruct.")
    aspect: str = option(
        _OVERALL, "What is scored; overall is the sum of the three others.", choices=(_OVERALL, *ASPECTS)
    )
    frames: int = option(
        4, "Frames of each video, evenly spread; published: two for each second, but at least 4.", low=2, high=768
    )
    dtype: str = precision()


def build(config: Config, locate: Callable[[str], Path] = embedded) -> QwenVideoReward:
    """Load the network, its words and the text around a prompt.

    Raises:
        InputError: a file is missing, truncated or of another kind, or the two folders do not belong together.
    """
    check(config)
    folder, base = locate(config.checkpoint), locate(config.base)
    told, text = about(folder), read_template(folder)
    tokenizer = read_tokenizer(next((path for path in (newest(folder) / "tokenizer", base) if path.is_dir()), base))
    network = load_network(folder, base, len(tokenizer), DTYPES[config.dtype])
    return QwenVideoReward(config, network, tokenizer, text, told)


def full_size(config: Config) -> QwenVideoReward:
    """The published network without weights, and a text about as long as the published one that says nothing."""
    check(config)
    template = " ".join(["word"] * _WORDS + ["{text_prompt}", *_MARKS])
    words = stand_in_tokenizer(_MOST_TOKENS, (VIDEO, *_MARKS))
    return QwenVideoReward(config, empty_network(DTYPES[config.dtype]), words, template, _TOLD)


class QwenVideoReward(SingleReward):
    """See the module."""

    name = "videoreward"

    def __init__(
        self, config: Config, network: RewardNetwork, tokenizer: Qwen2Tokenizer, template: str, told: dict[str, Any]
    ) -> None:
        """Args:
        template: the text around a prompt, with {text_prompt} in its place.
        told: see `about`.
        """
        self.frames = FrameSpec("even", config.frames, exact=True)
        self.aspect = config.aspect
        self.network = network
        self.tokenizer = tokenizer
        self.template = template
        self.most_pixels = int(told["data_config"]["max_frame_pixels"])
        norm = told.get("inference_config") or {}
        self.mean = [float(norm.get(f"{short}_mean", 0)) for short in ASPECTS.values()]
        self.std = [float(norm.get(f"{short}_std", 1)) for short in ASPECTS.values()]
        self.description = {"kind": self.name, **asdict(config), "weights": [fingerprint(network)]}
        self._tokens: dict[str, list[int]] = {}

    def networks(self) -> Sequence[nn.Module]:
        return (self.network,)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        return self._chosen(self.aspects(video_BTCHW, prompts))

    def parts(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> dict[str, Tensor]:
        """The reward, and every aspect of it."""
        scores_B3 = self.aspects(video_BTCHW, prompts)
        each = {f"{self.name} {aspect}": scores_B3[:, i] for i, aspect in enumerate(ASPECTS)}
        return {self.name: self._chosen(scores_B3), **each}

    def aspects(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3] in float32, as deviations from the mean of the published videos; of longer videos some frames.

        Raises:
            InputError: see `check_frames`; or a video is too narrow, or a prompt holds a word of the network's own.
        """
        check_frames(self.name, video_BTCHW, fewest=2)
        video = video_BTCHW[:, self.frames.pick(video_BTCHW.shape[1])]
        scores_B3 = widened(self.network(*self.inputs(video, prompts), *self.ids()))
        return (scores_B3 - scores_B3.new_tensor(self.mean)) / scores_B3.new_tensor(self.std)

    def inputs(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Patches, grids and tokens of videos whose frames all count; see `RewardNetwork.forward`."""
        patches_ND, grids_B3 = self.pixels(video_BTCHW)
        places = int(grids_B3[0].prod()) // self.network.visual.spatial_merge_size**2
        return patches_ND, grids_B3, self.tokens(prompts, places).to(patches_ND.device)

    def ids(self) -> tuple[int, list[int]]:
        """Those of the video's token and of the reward tokens."""
        video, *marks = self.tokenizer.convert_tokens_to_ids([VIDEO, *_MARKS])
        return video, marks

    def pixels(self, video_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """What the picture tower takes; see `patches`."""
        config, weight = self.network.visual.config, next(self.network.parameters())
        factor = config.patch_size * config.spatial_merge_size
        height, width = video_BTCHW.shape[-2:]
        fewest = min(_FEWEST_TOKENS * factor**2, self.most_pixels)
        size = fitted(height, width, factor, fewest, self.most_pixels)
        resized = scaled(video_BTCHW.flatten(0, 1), *size).unflatten(0, video_BTCHW.shape[:2])
        cut, grids = patches(resized, config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
        return cut.to(weight.device, weight.dtype), grids.to(weight.device)

    def tokens(self, prompts: Sequence[str], places: int) -> Tensor:
        """Ids [B, L] with `places` of them for the video; shorter rows are filled up at their end.

        Raises:
            InputError: a prompt holds a word of the network's own.
        """
        video, _ = self.ids()
        rows = []
        for prompt in prompts:
            if prompt not in self._tokens:
                self._tokens[prompt] = self._encode(prompt)
            row = self._tokens[prompt]
            at = row.index(video)
            rows.append(torch.tensor([*row[:at], *[video] * places, *row[at + 1 :]]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer(CHAT.replace("{text}", self.template.replace("{text_prompt}", prompt))).input_ids
        for word in (VIDEO, *_MARKS):
            if ids.count(self.tokenizer.convert_tokens_to_ids(word)) != 1:
                raise InputError(f"A prompt holds {word}, which is a word of VideoReward's own; take it out.")
        return ids

    def _chosen(self, scores_B3: Tensor) -> Tensor:
        return scores_B3.sum(1) if self.aspect == _OVERALL else scores_B3[:, list(ASPECTS).index(self.aspect)]


def read_template(folder: Path) -> str:
    """The text that the network was trained to read: prompt_template.txt, or in the published file, which is not run.

    Raises:
        InputError: both files are missing, or the file does not hold that text.
    """
    path = next((folder / name for name in (_PLAIN_FILE, _TEMPLATE_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"VideoReward's network reads a fixed text around each prompt: put {_TEMPLATE_FILE} of github.com/KwaiVGI/"
            f"VideoAlign into {folder}."
        )
    with reading(WHAT, path):
        told = path.read_text(encoding="utf-8")
        text = told if path.name == _PLAIN_FILE else _assigned(told)
        if not isinstance(text, str) or any(text.count(word) != 1 for word in ("{text_prompt}", *_MARKS)):
            raise ValueError("its text lacks the prompt or a reward token")
    return text


def _assigned(source: str) -> Any:
    """The constant that Python code gives to the template's name."""
    named = {t.id: line.value for line in ast.parse(source).body if isinstance(line, ast.Assign)
             for t in line.targets if isinstance(t, ast.Name)}  # fmt: skip
    return ast.literal_eval(named[_TEMPLATE])


def read_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Qwen2-VL's, with the reward tokens added.

    Raises:
        InputError: a file is missing or of another tokenizer.
    """
    with reading("tokenizer", folder):
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise ValueError("it has neither vocab.json nor tokenizer.json")
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        if VIDEO not in tokenizer.get_vocab():
            raise ValueError("it is not that of Qwen2-VL")
        tokenizer.add_tokens(list(_MARKS), special_tokens=True)
    return tokenizer
