"""A CLIP tokenizer whose merges cover the captions of the mini world; any other text still tokenizes, byte by byte.

The merges are found here, since the trainer of the `tokenizers` library breaks ties by chance, and
weights are of no use with another numbering of the words.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from ..world import ALL_SCENES

MAX_TOKENS = 24
_WORDS = "vivid pale clear hazy picture colors video of with the an and in at"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the rest of CLIP's tokenizer files, and load them."""
    merges = byte_pair_merges(caption_words())
    letters = byte_letters()
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), _START, _END]
    files = {
        "vocab.json": json.dumps({entry: i for i, entry in enumerate(dict.fromkeys(entries))}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
        "special_tokens_map.json": json.dumps(
            {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
        ),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def caption_words() -> list[str]:
    """Every word of the captions and a few others that describe pictures, sorted."""
    return sorted({word for scene in ALL_SCENES for word in scene.caption.split()} | set(_WORDS.split()))


def byte_pair_merges(words: list[str], end: str = "</w>") -> list[tuple[str, str]]:
    """Merge the most frequent pair, the alphabetically first among equals, until every word is one token.

    end: what marks a word's last letter; CLIP's mark.
    """
    spelled = [[*word[:-1], f"{word[-1]}{end}"] for word in words]
    merges = []
    while any(len(word) > 1 for word in spelled):
        counts = Counter(pair for word in spelled for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def byte_letters() -> list[str]:
    """The printable letter that stands for each of the 256 bytes in GPT-2's and CLIP's vocabularies, by byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
