"""Our types in ComfyUI's own nodes, and theirs in ours."""

from __future__ import annotations

from comfyui.graphs import SAMPLE, TRAIN, checked, files, sampling, training
from PIL import Image
from safetensors import safe_open
from tiny_graph import node
from vader_nodes.tools.comfyui import Server
from vader_nodes.tools.comfyui_client import Prompt
from vader_nodes.vader_backend.video_file import read_mp4


def scored(images: Prompt, link: list[object]) -> Prompt:
    """Score Video on images of another node, as one video of one prompt."""
    return {
        **images,
        "20": node("VaderPrompts", source="typed", text="a red circle", held_out_fraction=0.0),
        "21": node("VaderRewardAesthetic"),
        "22": node("VaderScoreVideo", images=link, prompts=["20", 0], reward=["21", 0]),
    }


def test_core_nodes_save_our_lora_and_plot_our_losses(comfy: Server) -> None:
    prompt = training("core", steps=3)
    prompt["11"] = node("SaveLoRA", lora=[TRAIN, 0], prefix="loras/by_core")
    prompt["12"] = node("LossGraphNode", loss=[TRAIN, 1], filename_prefix="loss")
    run = checked(comfy.client.run(prompt))
    assert run.outputs["12"]["images"]
    assert [file for file in files(comfy, run) if not file.is_file()] == []
    (ours,), (theirs,) = ((comfy.output / "loras").glob(f"{name}_*.safetensors") for name in ("core", "by_core"))
    with safe_open(ours, "pt") as mine, safe_open(theirs, "pt") as other:
        assert set(mine.keys()) == set(other.keys())
    checked(comfy.client.run(sampling("by_core", lora_name=theirs.name)))


def test_core_nodes_save_our_frames_as_video(comfy: Server) -> None:
    prompt = sampling("core", height=16, width=16)  # core cannot read a video of 8x8 pixels
    prompt["11"] = node("CreateVideo", images=[SAMPLE, 0], fps=8.0)
    prompt["12"] = node("SaveVideo", video=["11", 0], filename_prefix="core/video", format="mp4", codec="h264")
    run = checked(comfy.client.run(prompt))
    (file,) = (comfy.output / "core").glob("video_*.mp4")
    assert len(read_mp4(file)) == 3
    back: Prompt = {
        "1": node("LoadVideo", file=f"core/{file.name} [output]"),
        "2": node("GetVideoComponents", video=["1", 0]),
    }
    run = checked(comfy.client.run(scored(back, ["2", 0])))
    assert "aesthetic" in run.outputs["22"]["text"][0]


def test_a_core_node_loads_images_for_our_score(comfy: Server) -> None:
    Image.new("RGB", (16, 16), "red").save(comfy.base / "input" / "red.png")
    run = checked(comfy.client.run(scored({"1": node("LoadImage", image="red.png")}, ["1", 0])))
    assert run.outputs["22"]["text"][0].startswith("1 training prompts\n")
