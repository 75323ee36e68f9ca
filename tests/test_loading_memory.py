"""Loading holds no weight twice, whatever its precision on disk and in memory; converted weights are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tiny_flow import text_encoder
from tiny_wan import tiny_transformer
from transformers import T5EncoderModel
from vader_nodes.vader_backend.loading import DTYPES, load_frozen
from vader_nodes.vader_backend.models._single_file import build_from, read_weights
from vader_nodes.vader_backend.precision import converted, give_back, stored_dtype

WORKER = Path(__file__).parent / "loading_worker.py"
PAIRS = ("float32:float32", "float32:bfloat16", "float32:float16", "float16:float32")
LIMIT = 1.2  # of the loaded weights' size


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_loading_needs_little_more_than_the_weights(tmp_path: Path, package_env: dict[str, str]) -> None:
    # Freed blocks go back to the system at once: else a later load would hide in what an earlier one left.
    env = {**package_env, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), "35", *PAIRS], env=env, capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(PAIRS) * 4
    assert min(case["megabytes"] for case in found) > 60
    assert min(case["peak"] for case in found) > 0.9  # the measure sees the weights themselves
    assert not [case for case in found if case["peak"] > LIMIT]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", ["wan", "t5"])
def test_converted_weights_are_those_of_the_library(kind: str, stored: str, dtype: str, tmp_path: Path) -> None:
    network: Any = tiny_transformer() if kind == "wan" else text_encoder(umt5=False)
    network.to(DTYPES[stored]).save_pretrained(tmp_path)
    assert stored_dtype(tmp_path.glob("*.safetensors")) == DTYPES[stored]
    cls: Any = WanTransformer3DModel if kind == "wan" else T5EncoderModel
    expected = cls.from_pretrained(tmp_path, torch_dtype=DTYPES[dtype]).state_dict()
    found = load_frozen(cls, tmp_path, DTYPES[dtype], "network").state_dict()
    assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in expected.items()}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    file = next(tmp_path.glob("*.safetensors"))
    tensors = {key: t for key, t in read_weights(file, DTYPES[dtype], "network").items() if key in found}
    tensors |= dict.fromkeys(found.keys() - tensors.keys(), tensors.get("shared.weight"))
    config = dict(network.config) if kind == "wan" else network.config
    single = build_from(cls, config, tensors, DTYPES[dtype], "network", file).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in single.items())
    assert {key: t.dtype for key, t in single.items()} == {key: t.dtype for key, t in expected.items()}


@pytest.mark.parametrize("shard", ["10GB", "10KB"])
@pytest.mark.parametrize("kind", ["wan", "t5"])
def test_half_precision_is_taken_where_there_is_no_other(kind: str, shard: str, tmp_path: Path) -> None:
    """Some repositories have nothing but model.fp16.safetensors, or shards of it."""
    network: Any = tiny_transformer() if kind == "wan" else text_encoder(umt5=False)
    cls: Any = WanTransformer3DModel if kind == "wan" else T5EncoderModel
    network.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    assert all(".fp16" in path.name for path in tmp_path.glob("*.safetensors"))
    found = load_frozen(cls, tmp_path, torch.float32, "network").state_dict()
    expected = network.state_dict()
    assert all(torch.equal(found[key].float(), tensor.float()) for key, tensor in expected.items())


def test_files_of_several_precisions_have_none(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2).half()}, tmp_path / "mixed.safetensors")
    save_file({"a": torch.zeros(2).half(), "b": torch.zeros(2).long()}, tmp_path / "half.safetensors")
    assert stored_dtype([tmp_path / "mixed.safetensors"]) is None
    assert stored_dtype([tmp_path / "half.safetensors"]) == torch.float16
    assert stored_dtype(tmp_path.glob("*.safetensors")) is None


def test_what_is_given_back_keeps_its_values(tmp_path: Path) -> None:
    plain = torch.arange(1_000_000, dtype=torch.float32)
    save_file({"a": plain}, tmp_path / "a.safetensors")
    mapped = load_file(tmp_path / "a.safetensors")["a"]
    for tensor in (mapped, plain, plain[:0], plain.view(1000, 1000).T, torch.zeros(3, device="meta")):
        give_back(tensor)
    assert torch.equal(mapped, torch.arange(1_000_000, dtype=torch.float32))
    assert torch.equal(plain, mapped)
    assert torch.equal(converted(mapped, torch.float64), mapped.double())
    assert torch.equal(plain, mapped)
