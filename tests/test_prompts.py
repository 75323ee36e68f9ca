"""Prompt sets: cleaning, splitting, limiting, and the shipped lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.world import SEEN_SCENES, UNSEEN_SCENES
from vader_nodes.vader_backend.prompts import BUILT_IN, Config, PromptSet, build, built_in_list


def no_file(name: str) -> str:
    raise AssertionError(f"no file should be read, but {name} was")


def typed(text: str, **settings: float) -> PromptSet:
    return build(Config(source="typed", text=text, **settings), no_file)  # type: ignore[arg-type]


def test_blank_lines_and_repetitions_are_dropped() -> None:
    assert typed("  a cat \n\n\t\na dog\na cat\n", held_out_fraction=0.0).train == ("a cat", "a dog")


@pytest.mark.parametrize("text", ["", "  \n\t\n"])
def test_blank_prompts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="prompt"):
        typed(text)


@pytest.mark.parametrize("count", [1, 2, 10, 31])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9])
def test_split_is_a_partition_that_leaves_something_to_train_on(count: int, fraction: float) -> None:
    lines = [f"prompt {i}" for i in range(count)]
    found = typed("\n".join(lines), held_out_fraction=fraction)
    assert sorted(found.train + found.held_out) == sorted(lines)
    assert len(found.held_out) == min(round(fraction * count), count - 1)


def test_split_and_limit_depend_on_the_seed_alone() -> None:
    text = "\n".join(f"prompt {i}" for i in range(40))
    assert typed(text, seed=3, limit=5) == typed(text, seed=3, limit=5)
    assert typed(text, seed=3).held_out != typed(text, seed=4).held_out
    assert typed(text, seed=3, limit=5).train != typed(text, seed=4, limit=5).train
    limited = typed(text, seed=3, limit=5)
    assert (len(limited.train), len(limited.held_out)) == (5, 5)
    assert set(limited.train) <= set(typed(text, seed=3).train)


def test_file_is_read_through_the_callers_reader() -> None:
    found = build(
        Config(source="file", file="mine.txt", held_out_fraction=0.0), {"mine.txt": "\ufeffa\nb\n"}.__getitem__
    )
    assert found.train == ("a", "b")


def test_a_second_file_is_held_out_whole() -> None:
    files = {"train.txt": "a\nb\n", "test.txt": "b\nc\nd\n"}
    found = build(Config(source="file", file="train.txt", held_out_file="test.txt"), files.__getitem__)
    assert (found.train, found.held_out) == (("a", "b"), ("c", "d"))


def test_stand_ins_say_that_they_are_our_own(root: Path) -> None:
    for path in (root / "vader_backend" / "prompts").glob("*.txt"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# Our own") == (path.stem != "activities"), path.name
        assert not any(line.startswith("#") for line in built_in_list(path.stem))


def test_unreadable_files_give_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))

    def read(name: str) -> str:
        return (tmp_path / name).read_text(encoding="utf-8")

    for name in ("", "missing.txt", "latin.txt", "."):
        with pytest.raises(InputError, match="file"):
            build(Config(source="file", file=name), read)


def test_unknown_source_lists_what_there_is() -> None:
    with pytest.raises(InputError, match="activities"):
        build(Config(source="activites"), no_file)


def test_activity_prompts_are_the_published_ones() -> None:
    lines = built_in_list("activities")
    assert len(lines) == len(set(lines)) == 45 * 3
    assert {"a cat riding a bike", "an ant washing dishes", "a kangaroo playing chess"} <= set(lines)


@pytest.mark.parametrize("source", BUILT_IN)
def test_built_in_sets_are_whole_and_held_out_prompts_unseen(source: str) -> None:
    found = build(Config(source=source), no_file)
    assert found.held_out
    assert not set(found.train) & set(found.held_out)
    assert bool(found.train) == (source != "mini_unseen")


def test_published_splits_are_kept() -> None:
    found = build(Config(source="hps_actions_to_activities", held_out_fraction=0.0), no_file)
    assert found.train == tuple(built_in_list("actions"))
    assert found.held_out == tuple(built_in_list("activities"))
    mini = build(Config(source="mini"), no_file)
    assert mini.train == tuple(s.caption for s in SEEN_SCENES)
    assert mini.held_out == tuple(s.caption for s in UNSEEN_SCENES)


def test_every_shipped_list_belongs_to_a_set(root: Path) -> None:
    shipped = list((root / "vader_backend" / "prompts").glob("*.txt"))
    used = {line for source in BUILT_IN for part in _parts(source) for line in part}
    assert len(shipped) >= 7
    for path in shipped:
        lines = built_in_list(path.stem)
        assert 25 <= len(lines) == len(set(lines)), path.name
        assert set(lines) <= used, path.name


def _parts(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = build(Config(source=source), no_file)
    return found.train, found.held_out
