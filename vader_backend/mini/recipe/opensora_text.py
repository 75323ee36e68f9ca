"""The mini Open-Sora's T5: a tokenizer whose words are the captions', and an encoder of two layers."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import T5Config, T5EncoderModel

from ...checkpoint import write_text
from ...models.opensora import scored
from .tokenizer import MAX_TOKENS, caption_words

WIDTH = 128
_SPACE = "▁"
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def save_t5_tokenizer(folder: Path) -> int:
    """Write tokenizer.json and its configuration.

    Each word of a caption, and of what Open-Sora adds to one, is a piece; other text falls apart into letters.

    Returns:
        The size of the vocabulary.
    """
    words = sorted({*caption_words(), *scored("").split()})
    letters = _SPACE + string.ascii_lowercase + string.digits + string.punctuation
    pieces = [(piece, 0.0) for piece in (_PAD, _END, _UNKNOWN)]
    pieces += [(_SPACE + word, -1.0) for word in words] + [(letter, -10.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "eos_token": _END,
        "pad_token": _PAD,
        "unk_token": _UNKNOWN,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return tokenizer.get_vocab_size()


def new_t5(vocabulary: int) -> T5EncoderModel:
    """Untrained, without dropout."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
