"""Reads frozen networks from disk: no network access, no pickled code, one sentence on whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprint(module: nn.Module) -> str:
    """Twelve hex digits that tell one set of weights from another: names, shapes and a few values of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)][:16]
        digest.update(str([f"{v:.3g}" for v in sample.float().tolist()]).encode())
    return digest.hexdigest()[:12]


@contextmanager
def reading(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a checkpoint is read into one sentence.

    Raises:
        InputError: the checkpoint is missing, truncated or of another kind.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise checkpoint_error(what, folder, error) from error
    except Exception as error:
        if type(error).__module__.startswith(("safetensors", "json", "tokenizers", "huggingface_hub")):
            raise checkpoint_error(what, folder, error) from error
        raise


def checkpoint_error(what: str, folder: Path, error: Any) -> InputError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return InputError(
        f"The {what} in {folder} cannot be read ({reason}). Download it again, or choose another checkpoint."
    )


def names_pipeline(folder: Path, pipelines: Collection[str]) -> bool:
    """Whether a folder's model_index.json names one of these diffusers pipelines."""
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name") in pipelines
    except (OSError, ValueError, AttributeError):
        return False


def load_frozen(cls: Any, folder: Path, dtype: torch.dtype, what: str) -> Any:
    """Load a diffusers or transformers class from a local folder: safetensors only, no network, nothing missing.

    Raises:
        InputError: the folder is missing, truncated, holds a pickle only, or lacks weights of the class.
    """
    if not folder.is_dir():
        raise InputError(f"The {what} is missing: there is no folder {folder}. Download the whole checkpoint.")
    if not any(folder.glob("*.safetensors")):
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        held = f"; {pickles[0]} is a pickle, which is not loaded from such a folder" if pickles else ""
        raise InputError(f"The {what} in {folder} has no .safetensors file{held}. Download the safetensors version.")
    with reading(what, folder):
        # Two spellings of one option: transformers 5 and diffusers >= 0.40 warn about, but still take, torch_dtype.
        model, info = cls.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        missing = sorted(info["missing_keys"])
        if missing or info.get("mismatched_keys"):
            raise ValueError(f"{len(missing)} weights are missing or misshapen: {missing[:1]}")
    return model.eval().requires_grad_(False)


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Every tensor of a published checkpoint file, mapped from disk rather than copied.

    Args:
        path: a .safetensors file, or a pickled original (.ckpt, .pt, .pth), which is read with weights_only=True.

    Raises:
        InputError: the file is missing, truncated, of another kind than its name says, or holds no tensors.
    """
    if not path.is_file():
        raise InputError(f"The {what} is missing: there is no file {path}. Download it again.")
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise checkpoint_error(what, path, error) from error
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"The {what} in {path} holds no tensors; choose another checkpoint.")
    return tensors


def _safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _pickled(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content if isinstance(content, dict) else {}


def build_frozen(
    make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str, source: Path
) -> Any:
    """A network around tensors that are there already: built without weights, so that they are held only once.

    Args:
        make: makes the network; its parameters take no memory while it does.
        tensors: under the network's own names, nothing missing and nothing left over.

    Raises:
        InputError: a tensor is missing, left over or of another shape.
    """
    with init_empty_weights(include_buffers=False):
        module = make()
    wanted = module.state_dict()
    lacking, strange = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    misshapen = sorted(key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape)
    for problem, keys in (("missing", lacking), ("unknown", strange), ("of another shape", misshapen)):
        if keys:
            raise checkpoint_error(what, source, f"{len(keys)} weights are {problem}, such as {keys[0]}")
    own = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    module.load_state_dict(own, assign=True)
    return module.eval().requires_grad_(False)
