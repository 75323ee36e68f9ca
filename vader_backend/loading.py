"""Reads frozen networks from disk: no network access, no pickled code, one sentence on whatever goes wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
