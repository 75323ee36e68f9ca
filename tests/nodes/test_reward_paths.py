"""Names of a reward's files keep to their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from rewards import every
from vader_nodes.nodes import NODE_CLASS_MAPPINGS
from vader_nodes.nodes.rewards import RewardNode, locate
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.files import weights


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "mini/../recipe", "mini//etc/hostname"]
)
def test_a_name_that_leaves_the_folder(name: str, empty_base: Path) -> None:
    (empty_base / "models" / "reward_models").mkdir(parents=True)
    (empty_base / "models" / "secret").touch()
    with pytest.raises(InputError, match=r"enter a plain name|no embedded weights"):
        locate(name)


def test_every_field_that_names_files_keeps_to_the_folder(empty_base: Path) -> None:
    (empty_base / "models" / "reward_models").mkdir(parents=True)
    every.save_all(empty_base / "models" / "reward_models")
    nodes = {cls.key: cls for cls in NODE_CLASS_MAPPINGS.values() if issubclass(cls, RewardNode)}
    for kind in every.NETWORKS:
        optional = nodes[kind].INPUT_TYPES()["optional"]
        for field in {*every.path_fields(kind), "tokenizer"} & optional.keys():
            with pytest.raises(InputError, match=r"is '\.\./secret'; enter a plain name"):
                nodes[kind]().make(**{**every.SETTINGS[kind], field: "../secret"})
        assert nodes[kind]().make(**every.SETTINGS[kind])[0].name == kind


def test_embedded_weights_are_found_by_plain_names() -> None:
    assert weights("clip").is_dir()
    for name in ("/etc/hostname", "../recipe", "", "clip/../clip"):
        with pytest.raises(InputError, match="no embedded weights"):
            weights(name)
