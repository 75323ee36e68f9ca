"""The rewards on vision-language networks: ImageReward and VideoReward."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2VLConfig

from ...vader_backend.rewards import imagereward
from ...vader_backend.rewards._qwen2vl import build_network
from ...vader_backend.rewards._qwen2vl_pixels import patches
from .fixtures import Fixture


def image_reward(fixture: Fixture) -> dict[str, Tensor]:
    """Pixels and token ids to what the picture tower sees, and to scores."""
    network = imagereward.build_network(fixture.weights, fixture.config["med_config"], Path(fixture.name))
    pixels, ids, mask = (fixture.inputs[name] for name in ("pixels", "input_ids", "attention_mask"))
    return {"image_embeds": network.vision(pixels).last_hidden_state, "reward": network(pixels, ids, mask)}


def video_reward(fixture: Fixture) -> dict[str, Tensor]:
    """A video in [0, 1] to patches, and with several texts' token ids to the scores before they are normalised."""
    about, source = fixture.config, Path(fixture.name)
    config = Qwen2VLConfig.from_dict(about["qwen2_vl"])
    network = build_network(
        fixture.weights, config, about["peft_lora_config"], about["vocabulary"], torch.float32, source
    )
    video, tokens = fixture.inputs["video"], fixture.inputs["input_ids"]
    vision = network.visual.config
    cut, grid = patches(video, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    count, ids = len(tokens), about["token_ids"]
    return {
        "patches": cut,
        "logits": network(cut.repeat(count, 1), grid.expand(count, 3), tokens, ids["video"], ids["rewards"]),
    }


RUN = {"image_reward": image_reward, "video_reward": video_reward}
