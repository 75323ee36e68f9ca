"""Reads frozen networks from disk: no network access, no pickled code, one sentence on whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import InputError
from .precision import chosen, convert, converted, kept_in_float32, stored_dtype

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")  # of checkpoints
_READABLE = (*SUFFIXES, ".tar", ".bin")  # V-JEPA is called .pth.tar, a part of T5 .bin
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError, TypeError, EOFError,
    SafetensorError, pickle.UnpicklingError,
)  # fmt: skip
_PARALLEL = "module."  # before every key that a distributed training saved
_BEGINNINGS = {
    b"PK\x03\x04": "a zip archive, such as PyTorch writes",
    b"\x80": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer to one",
    b"<": "a web page",
}
# What whole CLIP and T5 checkpoints hold beside the encoder that is read from them.
_SPARE = re.compile(
    r"position_ids$|^(text|visual)_projection\.|^lm_head\.|^decoder\.(block|embed_tokens|final_layer_norm)\."
)


def fingerprint(module: nn.Module) -> str:
    """Twelve hex digits that tell one set of weights from another: names, shapes and a few values of each.

    A network without weights (see `build_empty`) has "meta" instead.
    """
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        return "meta"
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
    except _UNREADABLE as error:
        raise checkpoint_error(what, folder, error) from error
    except Exception as error:
        plain = type(error) is Exception  # of the tokenizers library
        if plain or type(error).__module__.startswith(("safetensors", "json", "tokenizers", "huggingface_hub")):
            raise checkpoint_error(what, folder, error) from error
        raise


def checkpoint_error(what: str, folder: Path, error: Any) -> InputError:
    """The sentence on a checkpoint that cannot be read, with the first sentence of `error` as the reason."""
    return InputError(
        f"The {what} in {folder} cannot be read ({_reason(error)}). Download it again, or choose another checkpoint."
    )


def _reason(error: Any) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    if isinstance(error, IndexError | ZeroDivisionError) or "to unpack" in str(error):
        return "its weights have other shapes than expected"
    said = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(said[0].partition(". ")[0].split())[:200].rstrip(".")


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a .json file. Raises OSError or ValueError where there are none."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} holds no settings")
    return settings


def names_pipeline(folder: Path, pipelines: Collection[str]) -> bool:
    """Whether a folder's model_index.json names one of these diffusers pipelines."""
    try:
        return read_config(folder / "model_index.json").get("_class_name") in pipelines
    except (OSError, ValueError):
        return False


def load_frozen(cls: Any, folder: Path, dtype: torch.dtype, what: str) -> Any:
    """Load a diffusers or transformers class from a local folder: no network, no pickled code, nothing missing.

    Of a transformers class that has no .safetensors file, the tensors of pytorch_model*.bin are taken.

    Raises:
        InputError: the folder is missing, truncated, holds other pickles only, or its weights are not the class's own.
    """
    if not folder.is_dir():
        raise InputError(f"The {what} is missing: there is no folder {folder}. Download the whole checkpoint.")
    given, stored = _source(cls, folder, what)
    with reading(what, folder):
        # Two spellings of one option: transformers 5 and diffusers >= 0.40 warn about, but still take, torch_dtype.
        model, info = cls.from_pretrained(
            **given, torch_dtype=stored or dtype, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    _refuse_strange(
        what, folder, missing=info["missing_keys"], unknown=filter(_is_strange, info["unexpected_keys"]),
        misshapen=(key for key, *_ in info["mismatched_keys"]),
    )  # fmt: skip
    convert(model, dtype, kept_in_float32(cls, dtype))
    return model.eval().requires_grad_(False)


def _source(cls: Any, folder: Path, what: str) -> tuple[dict[str, Any], torch.dtype | None]:
    """Arguments of from_pretrained that say where the weights are, and the one precision of these, if it is one.

    Raises:
        InputError: see `load_frozen`.
    """
    files = sorted(folder.glob("*.safetensors"))
    tensors = {} if files else _pickled_weights(cls, folder, what)
    for file in files:
        with opened(file, what, "np"):
            pass
    with reading(what, folder):
        _refuse_other_kind(cls, folder)
        if files:
            whole = [file for file in files if "." not in file.stem]
            variant = None if whole else files[0].stem.partition(".")[2].partition("-")[0]  # such as fp16
            given = {"pretrained_model_name_or_path": folder, "use_safetensors": True, "variant": variant}
            return given, stored_dtype(whole or files)
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    given = {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    return given, found.pop() if len(found) == 1 else None


def _pickled_weights(cls: Any, folder: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a transformers folder without .safetensors files, in one file or in shards.

    Raises:
        InputError: it holds no such file, one that is more than tensors, or the class is not of transformers.
    """
    shards = sorted(folder.glob("pytorch_model*.bin")) if issubclass(cls, PreTrainedModel) else []
    if not shards:
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        held = f"; {pickles[0]} is a pickle, which is not loaded from such a folder" if pickles else ""
        raise InputError(f"The {what} in {folder} has no .safetensors file{held}. Download the safetensors version.")
    return {name: tensor for shard in shards for name, tensor in read_tensors(shard, what).items()}


def _refuse_other_kind(cls: Any, folder: Path) -> None:
    """Raises ValueError where config.json names another family of transformers: weights would be missed late.

    A tower may come from the folder of its whole model: clip_text_model from clip.
    """
    own = getattr(getattr(cls, "config_class", None), "model_type", "")
    path = folder / "config.json"
    told = json.loads(path.read_text(encoding="utf-8")).get("model_type", "") if own and path.is_file() else ""
    if told and told.partition("_")[0] != own.partition("_")[0]:
        raise ValueError(f"it holds a network of the kind {told}, not {own}")


def _refuse_strange(
    what: str, source: Path, *, missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str]
) -> None:
    """Raises InputError where any weight is missing, unknown or of another shape."""
    for problem, keys in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen)):
        if found := sorted(keys):
            raise checkpoint_error(what, source, f"weights {problem}: {len(found)}, such as {found[0]}")


def _is_strange(key: str) -> bool:
    return _SPARE.search(key) is None


def read_tensors(path: Path, what: str, parts: Collection[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a published checkpoint file, mapped from disk rather than copied.

    Where all keys begin with `module.`, as those of distributed training do, that is taken off.

    Args:
        path: a .safetensors file, or a pickled original (.ckpt, .pt, .pth), which is read with weights_only=True.
        parts: tables inside the pickle's own whose tensors are wanted too, as part/key.

    Raises:
        InputError: the file is missing, truncated, of another kind than its name says, or holds no tensors.
    """
    if not path.is_file():
        raise InputError(f"The {what} is missing: there is no file {path}. Download it again.")
    if path.suffix not in _READABLE:
        raise InputError(f"The {what} cannot be {path.name}; choose a file that ends in {', '.join(_READABLE)}.")
    content = _safetensors(path, what) if path.suffix == ".safetensors" else _pickled(path, what)
    for part, table in [(part, content.get(part)) for part in parts]:
        content |= {f"{part}/{key}": value for key, value in (table.items() if isinstance(table, dict) else ())}
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"The {what} in {path} holds no tensors; choose another checkpoint.")
    if all(key.startswith(_PARALLEL) for key in tensors):
        return {key.removeprefix(_PARALLEL): value for key, value in tensors.items()}
    return tensors


@contextmanager
def opened(path: Path, what: str, framework: str = "pt") -> Iterator[Any]:
    """A .safetensors file, open. Raises InputError where it is truncated, or a file of another kind under that name."""
    with reading(what, path):
        with path.open("rb") as raw:
            start = raw.read(32)
        kind = next((kind for begin, kind in _BEGINNINGS.items() if start.startswith(begin)), None)
        if kind is not None and start[8:9] != b"{":  # the header of a .safetensors file, after 8 bytes with its length
            raise ValueError(f"it is not a safetensors file but {kind}")
        try:
            content = safe_open(path, framework)
        except SafetensorError as error:
            raise ValueError("it is truncated or damaged") from error
        with content as file:
            yield file


def _safetensors(path: Path, what: str) -> dict[str, Any]:
    with opened(path, what) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _pickled(path: Path, what: str) -> dict[str, Any]:
    with reading(what, path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ValueError("it is no PyTorch file, or holds more than tensors and could run code") from error
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content if isinstance(content, dict) else {}


def build_frozen(
    make: Callable[[], nn.Module],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    what: str,
    source: Path,
    *,
    kept: Collection[str] = (),
) -> Any:
    """A network around tensors that are there already: built without weights, so that they are held only once.

    Args:
        make: makes the network; its parameters take no memory while it does.
        tensors: under the network's own names, nothing missing and nothing left over.
        kept: names of layers whose weights are held in float32 whatever `dtype` is.

    Raises:
        InputError: a tensor is missing, left over or of another shape.
    """
    with reading(what, source), init_empty_weights(include_buffers=False):
        module = make()
    wanted = module.state_dict()
    _refuse_strange(
        what, source, missing=wanted.keys() - tensors.keys(), unknown=tensors.keys() - wanted.keys(),
        misshapen=(key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape),
    )  # fmt: skip
    with reading(what, source):
        own = {key: converted(value, chosen(key, dtype, kept)) for key, value in tensors.items()}
        module.load_state_dict(own, assign=True)
    return module.eval().requires_grad_(False)


def build_empty(make: Callable[[], nn.Module], dtype: torch.dtype, *, kept: Collection[str] = ()) -> Any:
    """The network that `build_frozen` gives, without weights: parameters and buffers lie on the meta device.

    The arguments are those of `build_frozen`.
    """
    with torch.device("meta"):
        module = make().to("meta")
    convert(module, dtype, kept)
    return module.eval().requires_grad_(False)


def empty_from(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """`build_empty` of a diffusers or transformers class; the layers that the class keeps in float32 stay so.

    Args:
        config: keyword arguments of a diffusers class, or a transformers configuration.
    """
    return build_empty(
        lambda: cls(**config) if isinstance(config, dict) else cls(config), dtype, kept=kept_in_float32(cls, dtype)
    )
