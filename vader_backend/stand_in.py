"""What stands in for a checkpoint that is not there: its tokenizer, and a choice of size by its name.

Networks of full size without weights (see `loading.build_empty`) serve to predict memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from transformers import BatchEncoding

T = TypeVar("T")
_PAD, _START, _WORD, _END = range(4)  # the highest id ends a text, as CLIP wants it


class StandInTokenizer:
    """Takes the place of a tokenizer of transformers; a text has a token per word, whatever the word says."""

    def __init__(self, length: int, special: Sequence[str] = ()) -> None:
        """Args:
        length: the most tokens that the network takes.
        special: words that have ids of their own.
        """
        self.model_max_length = length
        self._ids = {word: _END + 1 + i for i, word in enumerate(special)}
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})") if special else None

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """input_ids and attention_mask of one text, or of several, as the real ones give them."""
        limit = max_length or self.model_max_length
        rows = [self._row(one, limit if truncation else None, add_special_tokens) for one in _listed(text)]
        longest = limit if padding == "max_length" else max(map(len, rows)) if padding else 0
        masks = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        rows = [row + [_PAD] * (longest - len(row)) for row in rows]
        single = isinstance(text, str) and return_tensors is None
        data = {"input_ids": rows[0] if single else rows, "attention_mask": masks[0] if single else masks}
        return BatchEncoding(data, tensor_type=return_tensors)

    def decode(self, ids: Sequence[int]) -> str:
        """Nothing: ids do not tell words."""
        return ""

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of special words, and the one of all others."""
        found = [self._ids.get(token, _WORD) for token in _listed(tokens)]
        return found[0] if isinstance(tokens, str) else found

    def _row(self, text: str, limit: int | None, add_special_tokens: bool) -> list[int]:
        ids = [i for piece in self._pieces(text) for i in self._of(piece)]
        if not add_special_tokens:
            return ids[:limit]
        return [_START, *(ids if limit is None else ids[: limit - 2]), _END]

    def _pieces(self, text: str) -> list[str]:
        return [text] if self._special is None else self._special.split(text)

    def _of(self, piece: str) -> list[int]:
        return [self._ids[piece]] if piece in self._ids else [_WORD] * len(piece.split())


def tokenizer(length: int, special: Sequence[str] = ()) -> Any:
    """See `StandInTokenizer`; typed so that it fits wherever a tokenizer of transformers does."""
    return StandInTokenizer(length, special)


def size_of(checkpoint: str, sizes: Mapping[str, T], otherwise: T) -> T:
    """The size whose name is a part of a checkpoint's name."""
    return next((size for name, size in sizes.items() if name in checkpoint.lower()), otherwise)


def _listed(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)
