"""The smallest Open-Sora 1.2: random weights in the published layout; images shrink by 8, as in the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import T5Config, T5EncoderModel
from vader_nodes.vader_backend.models._opensora_vae import VideoAutoencoder
from vader_nodes.vader_backend.models._stdit3 import Architecture, STDiT3

TOKENS = 60
TINY = Architecture(
    width=16, depth=2, heads=2, mlp_width=32, channels=4, out_channels=8, patch=(1, 2, 2), text_tokens=TOKENS,
    text_width=12, normalized=True,
)  # fmt: skip
TINY_VAE = {
    "model_type": "VideoAutoencoderPipeline",
    "micro_frame_size": 17,
    "vae_2d": {"type": "VideoAutoencoderKL", "block_out_channels": [8] * 4, "layers_per_block": 1,
               "norm_num_groups": 4, "micro_batch_size": 4},
    "vae_temporal": {"type": "VAE_Temporal_SD", "filters": 8, "num_res_blocks": 1, "num_groups": 4,
                     "channel_multipliers": [1, 1, 2, 2]},
}  # fmt: skip


def save_tiny(folder: Path) -> None:
    """Write the four parts of a checkpoint."""
    torch.manual_seed(0)
    save_part(folder / "transformer", STDiT3(TINY), {"model_type": "STDiT3", "input_sq_size": 512})
    vae = VideoAutoencoder.from_config(TINY_VAE)
    vae.scale.copy_(torch.tensor([3.85, 2.32, 2.33, 3.06]).view_as(vae.scale))
    vae.shift.copy_(torch.tensor([-0.10, 0.34, 0.27, 0.98]).view_as(vae.shift))
    save_part(folder / "vae", vae, TINY_VAE)
    config = T5Config(
        vocab_size=64, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")


def save_tokenizer(folder: Path) -> None:
    """T5's tokenizer with a token per character."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:&"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in f"▁{letters}")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": TOKENS, **special})
    )


def save_part(folder: Path, network: nn.Module, config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def repack_as_shards(folder: Path) -> None:
    """The text encoder as it was published: a whole T5 in pickled shards, the tokenizer beside them."""
    text = T5EncoderModel.from_pretrained(folder / "text_encoder").state_dict()
    (folder / "text_encoder" / "model.safetensors").unlink()
    text["decoder.final_layer_norm.weight"] = torch.ones(12)
    names = sorted(text)
    for number, part in enumerate((names[:3], names[3:]), start=1):
        file = folder / "text_encoder" / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: text[name] for name in part}, file)
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / "text_encoder" / file.name)
    (folder / "tokenizer").rmdir()
