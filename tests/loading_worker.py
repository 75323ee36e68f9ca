"""Measures in a process of its own how much memory loading takes, relative to the size of what is loaded.

Usage: loading_worker.py FOLDER SIZE STORED:LOADED ...
Writes networks of SIZE million weights into FOLDER and loads them on every path, from the first precision of each
pair into the second. Prints a line of JSON per load. Linux only.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import T5Config, T5EncoderModel
from vader_nodes.vader_backend.loading import DTYPES, load_frozen
from vader_nodes.vader_backend.models._single_file import build_from, read_weights

WIDTH = 1024
LAYER = 16 * WIDTH**2  # weights of two attentions and a feed-forward layer four times as wide
FILE = "diffusion_pytorch_model.safetensors"


def wan_config(weights: int) -> dict[str, Any]:
    sizes = {"num_attention_heads": WIDTH // 128, "attention_head_dim": 128, "ffn_dim": 4 * WIDTH}
    return {**sizes, "num_layers": max(1, weights // LAYER)}


def t5_config(weights: int) -> T5Config:
    sizes = {"d_model": WIDTH, "d_kv": 64, "num_heads": WIDTH // 64, "d_ff": 4 * WIDTH, "vocab_size": 8 * WIDTH}
    return T5Config(**sizes, num_layers=max(1, weights // LAYER), feed_forward_proj="gated-gelu")


def write(folder: Path, weights: int, stored: set[str]) -> None:
    """Folders wan_<dtype> and t5_<dtype>, and pickles wan_<dtype>.ckpt."""
    wan, t5 = WanTransformer3DModel(**wan_config(weights)), T5EncoderModel(t5_config(weights))
    for name in stored:
        wan.to(DTYPES[name]).save_pretrained(folder / f"wan_{name}")
        t5.to(DTYPES[name]).save_pretrained(folder / f"t5_{name}")
        torch.save({"state_dict": wan.state_dict()}, folder / f"wan_{name}.ckpt")
    for path in folder.glob("**/*.*"):  # memory that waits to be written to disk cannot be given back
        with path.open("rb") as file:
            os.fsync(file.fileno())


def paths(folder: Path, weights: int, stored: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Every way into the library, by name."""
    wan, t5 = folder / f"wan_{stored}", folder / f"t5_{stored}"
    yield "diffusers folder", partial(load_frozen, WanTransformer3DModel, wan, dtype, "network")
    yield "transformers folder", partial(load_frozen, T5EncoderModel, t5, dtype, "network")
    for name, path in (("single file", wan / FILE), ("pickle", wan.with_suffix(".ckpt"))):

        def load(path: Path = path) -> nn.Module:
            tensors = read_weights(path, dtype, "network")
            return build_from(WanTransformer3DModel, wan_config(weights), tensors, dtype, "network", path)

        yield name, load


def memory(field: str) -> int:
    """Bytes in the process's status: VmRSS is resident now, VmHWM the most that was since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def used(network: nn.Module) -> int:
    """Bytes of all weights; each is read once, so that those which are only mapped from disk become resident."""
    tensors = {tensor.data_ptr(): tensor for tensor in network.state_dict().values()}
    for tensor in tensors.values():
        tensor.max()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measure(load: Callable[[], nn.Module]) -> dict[str, float]:
    """The most that was resident while loading and using a network, and what stays, relative to its size."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    network = load()
    size = used(network)
    peak, after = memory("VmHWM") - before, memory("VmRSS") - before
    return {"megabytes": size / 1e6, "peak": peak / size, "after": after / size}


def main(folder: Path, weights: int, pairs: list[list[str]]) -> None:
    torch.set_num_threads(1)
    write(folder, weights, {stored for stored, _ in pairs})
    for stored, loaded in pairs:
        for name, load in paths(folder, weights, stored, DTYPES[loaded]):
            print(json.dumps({"path": name, "pair": f"{stored}:{loaded}", **measure(load)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), round(float(sys.argv[2]) * 1e6), [pair.split(":") for pair in sys.argv[3:]])
