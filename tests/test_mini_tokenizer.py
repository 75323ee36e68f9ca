"""The mini world's tokenizer: the same in every process, whole words, no text that it cannot take."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from vader_nodes.vader_backend.mini.recipe.tokenizer import byte_letters, byte_pair_merges, save_tokenizer
from vader_nodes.vader_backend.mini.world import ALL_SCENES


def test_every_word_of_a_caption_is_one_token(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    for scene in ALL_SCENES:
        assert len(tokenizer(scene.caption).input_ids) == len(scene.caption.split()) + 2


def test_other_text_survives(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    text = "a zebra, 7 ñandús & 日本"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).replace(" ", "") == text.replace(
        " ", ""
    )
    assert len(set(byte_letters())) == 256


def test_ties_are_broken_alphabetically() -> None:
    assert byte_pair_merges(["ab", "cd"]) == [("a", "b</w>"), ("c", "d</w>")]
    assert byte_pair_merges(["xab", "ab"])[0] == ("a", "b</w>")


def test_other_processes_write_the_same_files(tmp_path: Path, package_env: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer; "
        "save_tokenizer(Path(sys.argv[1]))"
    )
    digests = set()
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run([sys.executable, "-c", code, folder], check=True, env={**package_env, "PYTHONHASHSEED": seed})
        digests.add(hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest())
    assert len(digests) == 1
