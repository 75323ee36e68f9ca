"""The inputs of the rewards on CLIP: folders and single files to choose from, and the names that workflows hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from vader_nodes.nodes import NODE_CLASS_MAPPINGS

SAVED = ["checkpoint", "frames", "frame_choice"]  # the first inputs of workflows that were saved before


HUB = {
    "Hps": [],
    "Pickscore": ["hub: yuvalkirstain/PickScore_v1"],
    "Clipscore": ["hub: openai/clip-vit-large-patch14"],
}


@pytest.mark.parametrize("name", HUB)
def test_folders_and_files_are_offered(empty_base: Path, name: str) -> None:
    folder = empty_base / "models" / "reward_models"
    for file in ("clip/config.json", "clip/model.safetensors", "HPS_v2_compressed.pt", "notes.txt"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    inputs = NODE_CLASS_MAPPINGS[f"VaderReward{name}"].INPUT_TYPES()["optional"]
    assert inputs["checkpoint"][0] == ["mini/clip", "clip", "HPS_v2_compressed.pt", *HUB[name]]
    assert list(inputs) == [*SAVED, "fit", "tokenizer", "dtype"]


def test_new_inputs_come_after_those_of_saved_workflows() -> None:
    inputs = NODE_CLASS_MAPPINGS["VaderRewardAesthetic"].INPUT_TYPES()["optional"]
    assert list(inputs) == [*SAVED, "head", "fit", "dtype"]
