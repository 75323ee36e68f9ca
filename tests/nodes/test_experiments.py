"""The paper's experiments: in the paper's size with its published settings, and in miniature from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_graph import quick
from vader_nodes.nodes import NODE_CLASS_MAPPINGS, graph, workflow
from vader_nodes.tools.workflow_sources import FOLDER, sources
from vader_nodes.vader_backend.video_file import read_mp4

Graph = dict[str, dict[str, Any]]

# steps: of sampling. batch: videos per optimizer step. "last_k" with K = 1 is the paper's own choice.
_ALL = {"truncation": "last_k", "k": 1, "learning_rate": 2e-4, "lr_schedule": "constant", "warmup_steps": 0,
        "max_grad_norm": 1, "rank": 16, "batch_size": 1, "stop_input": False, "reward_frames": "reward"}  # fmt: skip
_VC2 = {"height": 320, "width": 512, "frames": 12, "sampling_steps": 25, "guidance": 12, "eta": 1, "alpha": 8,
        "dropout": 0.01, "weight_decay": 0.01, "grad_accumulation_steps": 8, "steps": 450}  # fmt: skip
_OS = {"height": 276, "width": 368, "frames": 51, "sampling_steps": 30, "guidance": 7, "eta": 0, "alpha": 8,
       "dropout": 0.01, "weight_decay": 0.01, "grad_accumulation_steps": 8, "steps": 800}  # fmt: skip
_MS = {"height": 384, "width": 384, "frames": 16, "sampling_steps": 25, "guidance": 9, "eta": 0, "alpha": 16,
       "dropout": 0.1, "weight_decay": 0, "grad_accumulation_steps": 16, "steps": 10000 // 16}  # fmt: skip
_SVD = {**_VC2, "height": 576, "width": 1024, "frames": 14, "guidance": 3, "eta": 0}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "videocrafter2": ({"checkpoint": "checkpoints/videocrafter2.ckpt", "dtype": "float16"}, _VC2),
    "opensora": ({"checkpoint": "OpenSora-v1.2", "dtype": "bfloat16"}, _OS),
    "modelscope": (
        {"hub_id": "damo-vilab/text-to-video-ms-1.7b", "dtype": "float16", "sampler": "dpm++2m"},
        _MS,
    ),
    "svd": ({"hub_id": "stabilityai/stable-video-diffusion-img2vid", "dtype": "bfloat16"}, _SVD),
}
_AESTHETIC = "0.1 * (Aesthetic[sac+logos+ava1-l14-linearMSE.pth] to 10)"
_STRONGER = _AESTHETIC.replace("0.1", "0.15")  # 1.5 times as much
_HPS, _HPS_V21 = (f"1 * (Hps[{version}_compressed.pt] to 1)" for version in ("HPS_v2", "HPS_v2.1"))
_PICKSCORE = "0.01 * (Pickscore[PickScore_v1] to 100)"
_VICLIP = "1 * (Viclip[ViClip-InternVid-10M-FLT.pth] to 1)"
_ACTION = "Videomae[videomae-base-finetuned-kinetics]"
# name -> family, what is maximised, prompts
EXPERIMENTS = {
    "figure4_hps_aesthetic_videocrafter2": (
        "videocrafter2", f"0.5 * {_HPS_V21} + 0.5 * {_STRONGER}", "animals_in_clothes"
    ),
    "figure4_pickscore_videocrafter2": ("videocrafter2", _PICKSCORE, "animals_with_instruments"),
    "figure6_object_removal": ("videocrafter2", "Yolos[yolos-base]", "book_and_cup"),
    "figure7_pickscore_opensora": ("opensora", _PICKSCORE, "hps_actions_to_activities"),
    "figure7_hps_opensora": ("opensora", _HPS_V21, "hps_actions_to_activities"),
    "figure7_hps_modelscope": ("modelscope", _HPS, "hps_actions_to_activities"),
    "figure7_aesthetic_modelscope": ("modelscope", _AESTHETIC, "hps_actions_to_activities"),
    "figure10_action_modelscope": ("modelscope", _ACTION, "typed"),
    "table1_aesthetic_modelscope": ("modelscope", _AESTHETIC, "hps_actions_to_activities"),
    "table1_hps_modelscope": ("modelscope", _HPS, "hps_actions_to_activities"),
    "table1_action_modelscope": ("modelscope", _ACTION, "kinetics_actions"),
    "table1_aesthetic_svd": ("svd", _AESTHETIC, "folder"),
    "table3_viclip_aesthetic_videocrafter2": (
        "videocrafter2", f"0.5 * {_VICLIP} + 0.5 * {_STRONGER}", "hps_actions_to_activities"
    ),
    "table9_k1_k10_videocrafter2": (
        "videocrafter2", f"0.5 * {_HPS_V21} + 0.5 * {_STRONGER}", "animals_in_clothes"
    ),
}  # fmt: skip


def shipped(name: str, variant: str) -> Graph:
    graph: Graph = json.loads((FOLDER / "api" / f"vader_{name}_{variant}.json").read_text(encoding="utf-8"))
    return graph


def keys(data: Graph, class_type: str) -> list[str]:
    return [key for key, entry in data.items() if entry["class_type"] == class_type]


def only(data: Graph, class_type: str) -> dict[str, Any]:
    (key,) = keys(data, class_type)
    inputs: dict[str, Any] = data[key]["inputs"]
    return inputs


def stated(inputs: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    return {key: inputs[key] for key in wanted}


def formula(data: Graph, key: str) -> str:
    """What the reward at a node adds up to."""
    kind, inputs = data[key]["class_type"].removeprefix("VaderReward"), data[key]["inputs"]
    if kind == "Towards":
        return f"{inputs['weight']:g} * ({formula(data, inputs['reward'][0])} to {inputs['target']:g})"
    if kind == "VaderCombineRewards":
        parts = [number for number in (1, 2, 3, 4) if f"reward_{number}" in inputs]
        return " + ".join(f"{inputs[f'weight_{n}']:g} * {formula(data, inputs[f'reward_{n}'][0])}" for n in parts)
    return f"{kind}[{inputs.get('head') or inputs['checkpoint']}]"


def test_every_experiment_has_both_variants() -> None:
    found = {name for name in sources() if name.startswith("vader_")}
    assert found == {f"vader_{name}_{variant}" for name in EXPERIMENTS for variant in ("mini", "paper")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_paper_size_carries_the_published_settings(name: str) -> None:
    data = shipped(name, "paper")
    model, train = FAMILIES[EXPERIMENTS[name][0]]
    assert stated(only(data, "VaderLoadVideoModel"), model) == model
    for number, key in enumerate(keys(data, "VaderTrainLoRA")):
        wanted = {**_ALL, **train, "k": 1 if number == 0 else 10}  # the second is that of Table 9
        assert stated(data[key]["inputs"], wanted) == wanted
    shared = ("height", "width", "frames", "guidance", "eta")
    for key in keys(data, "VaderApplyLoRASample"):
        wanted = {**stated(train, dict.fromkeys(shared)), "steps": train["sampling_steps"]}
        assert stated(data[key]["inputs"], wanted) == wanted
    assert not [entry for entry in data.values() if "mini/" in str(entry["inputs"]) and "hub_id" not in entry["inputs"]]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_paper_size_trains_on_the_published_loss_and_prompts(name: str) -> None:
    data = shipped(name, "paper")
    _, maximised, source = EXPERIMENTS[name]
    for key in keys(data, "VaderTrainLoRA"):
        assert formula(data, data[key]["inputs"]["reward"][0]) == maximised
        assert data[data[key]["inputs"]["prompts"][0]]["inputs"]["source"] == source
    for entry in data.values():
        if "frame_choice" in entry["inputs"] and entry["class_type"] not in (
            "VaderRewardViclip",
            "VaderRewardVideomae",
        ):
            assert (entry["inputs"]["frames"], entry["inputs"]["frame_choice"]) == (1, "random")


def test_details_of_the_paper() -> None:
    assert len(keys(shipped("table9_k1_k10_videocrafter2", "paper"), "VaderTrainLoRA")) == 2
    dogs = only(shipped("table1_aesthetic_svd", "paper"), "VaderImagePrompts")
    assert (dogs["folder"], dogs["held_out_folder"]) == ("labrador_retriever", "maltese")
    books = only(shipped("figure6_object_removal", "paper"), "VaderRewardYolos")
    assert (books["target"], books["mode"], books["height"], books["antialias"]) == ("book", "remove", 512, False)
    donuts = only(shipped("figure10_action_modelscope", "paper"), "VaderPrompts")
    assert donuts["text"] == "A person eating donuts"
    squares = {"VaderRewardPickscore": "crop", "VaderRewardHps": "squash", "VaderRewardViclip": "squash"}
    table = shipped("table3_viclip_aesthetic_videocrafter2", "paper")
    assert {name: only(table, name)["fit"] for name in squares} == squares
    assert only(shipped("table1_action_modelscope", "paper"), "VaderRewardVideomae")["fit"] == "squash"


def test_a_figure_and_a_table_of_the_same_training_share_it() -> None:
    """Their Train nodes and all that leads there are equal, so that a finished run is found again."""
    for pair in ("hps_modelscope", "aesthetic_modelscope"):
        for variant in ("mini", "paper"):
            trainings = []
            for name in (f"figure7_{pair}", f"table1_{pair}"):
                data = shipped(name, variant)
                (train,) = keys(data, "VaderTrainLoRA")
                trainings.append(above(data, train))
            assert trainings[0] == trainings[1]


def above(data: Graph, key: str) -> dict[str, Any]:
    """A node and what it is linked to, nested."""
    entry = data[key]
    inputs = {k: above(data, v[0]) if isinstance(v, list) else v for k, v in entry["inputs"].items()}
    return {"class_type": entry["class_type"], "inputs": inputs}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_miniatures_run_from_end_to_end(name: str, empty_base: Path) -> None:
    data = quick(shipped(name, "mini"))
    with torch.inference_mode():  # as ComfyUI runs nodes
        results = graph.run(workflow.parse(data), NODE_CLASS_MAPPINGS, lambda line: None)
    for key in keys(data, "VaderTrainLoRA"):
        lora, losses, _ = results[key]
        assert len(losses["loss"]) == 2
        assert torch.tensor(losses["loss"]).isfinite().all()
        assert any(tensor.abs().max() > 0 for part, tensor in lora.items() if "lora_B" in part)
    for key in keys(data, "VaderScoreVideo"):
        rows = [line.split("  ")[0] for line in results[key][0].splitlines()]
        assert {"vividness", "oracle"} < set(rows)
    (video, *_) = (empty_base / "output" / f"vader_{name}_mini").glob("*.mp4")
    assert len(read_mp4(video)) >= 8
