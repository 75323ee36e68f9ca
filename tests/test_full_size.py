"""Networks of full size without weights: their sizes, and that a training step runs on them with fake tensors."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_flow import original_shapes
from torch import Tensor, nn
from vader_nodes.nodes.estimate import full_size as recognised
from vader_nodes.vader_backend import registry
from vader_nodes.vader_backend.generate import guidance_scale, noise_share
from vader_nodes.vader_backend.lora import LoraConfig, attached
from vader_nodes.vader_backend.memory.fake import DEVICE, fake_mode, make_fake
from vader_nodes.vader_backend.models._ltx_keys import transformer_config as ltx_config
from vader_nodes.vader_backend.models._stdit3 import Architecture
from vader_nodes.vader_backend.models._svd_keys import UNET as UNET_PREFIX
from vader_nodes.vader_backend.models._svd_keys import section, unet_config
from vader_nodes.vader_backend.models._videocrafter2_text import clip_weights
from vader_nodes.vader_backend.models._videocrafter2_unet import architecture as unet_architecture
from vader_nodes.vader_backend.models._wan_keys import transformer_config as wan_config
from vader_nodes.vader_backend.models.base import VideoModel
from vader_nodes.vader_backend.sampling import GradPlan, sample
from vader_nodes.vader_backend.stand_in import StandInTokenizer, size_of

FIXTURES = Path(__file__).parent / "fixtures"
PROMPT = "a red circle moving left"
MODELS = [(family, name) for family in registry.names("models") for name in registry.load("models", family).FULL_SIZE]
REWARDS = [
    kind
    for kind in registry.names("rewards")
    if "checkpoint" in {field.name for field in fields(registry.load("rewards", kind).Config)}
]


def family(kind: str, name: str, dtype: str = "float32") -> VideoModel:
    module = registry.load("models", kind)
    return module.full_size(name, module.Config(dtype=dtype))


def reward(kind: str, **settings: Any) -> Any:
    module = registry.load("rewards", kind)
    return module.full_size(module.Config(**settings))


def count(network: nn.Module) -> int:
    """Numbers in the state dict; weights that are shared count once."""
    held = {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in held.values())


# --- sizes -----------------------------------------------------------------------------------

UNET, TEXT, AUTOENCODER = 1_411_233_860, 340_387_840, 83_653_863
T5, UMT5 = 4_762_310_656, 5_680_910_336
WAN_2_1 = {"vae": 126_892_531, "text_encoder": UMT5}
SVD = {"denoiser": 1_524_623_082, "vae": 97_742_847, "image_encoder": 632_076_800}
COUNTS = {
    "ModelScope 1.7B": {"denoiser": UNET, "vae": AUTOENCODER, "text_encoder": TEXT},
    "VideoCrafter2": {"denoiser": 1_413_284_420, "vae": AUTOENCODER, "text_encoder": TEXT},
    "Open-Sora 1.2": {"denoiser": 1_208_872_772, "vae": 393_341_015, "text_encoder": T5},
    "Stable Video Diffusion, 14 frames": SVD,
    "Stable Video Diffusion XT, 25 frames": SVD,
    "Wan 2.1 T2V 1.3B": {"denoiser": 1_418_996_800, **WAN_2_1},
    "Wan 2.1 T2V 14B": {"denoiser": 14_288_491_584, **WAN_2_1},
    "Wan 2.1 I2V 14B": {"denoiser": 16_394_878_784, "image_encoder": 630_766_080, **WAN_2_1},
    "Wan 2.2 TI2V 5B": {"denoiser": 4_999_787_712, "vae": 704_688_668, "text_encoder": UMT5},
    "LTX-Video 2B": {"denoiser": 1_923_385_472, "vae": 419_193_905, "text_encoder": T5},
    "LTX-Video 13B": {"denoiser": 13_042_569_344, "vae": 1_246_913_778, "text_encoder": T5},
}
REWARD_COUNTS = {
    "aesthetic": [427_616_513, 927_969],
    "aesthetic_v25": [428_225_600, 1_321_185],
    "clipscore": [986_109_441],
    "hps": [986_109_441],
    "imagereward": [446_206_689],
    "pickscore": [986_109_441],
    "viclip": [427_590_145],
    "videomae": [86_534_800],
    "videoreward": [2_208_563_200],
    "vjepa": [633_666_944],
    "yolos": [127_798_368],
}


@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_every_published_model_has_its_size(kind: str, name: str) -> None:
    model = family(kind, name)
    assert {part: count(network) for part, network in model.parts().items()} == COUNTS[name]
    assert (model.name, model.fingerprint) == (name, "meta")
    model.check(model.defaults.video)


def unzipped(name: str) -> dict[str, Any]:
    return dict(json.loads(gzip.decompress((FIXTURES / f"{name}.json.gz").read_bytes())))


def on_meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def videocrafter2(prefix: str) -> dict[str, list[int]]:
    shapes = json.loads((FIXTURES / "videocrafter2_keys.json").read_text(encoding="utf-8"))
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def text_tower() -> dict[str, Any]:
    """What is read of VideoCrafter2's text encoder."""
    return {key: t.shape for key, t in clip_weights(on_meta(videocrafter2("cond_stage_model.model."))).items()}


def total(shapes: dict[str, Any]) -> int:
    return sum(map(math.prod, shapes.values()))


def test_sizes_are_those_of_the_published_files() -> None:
    for name, parts in {
        "VideoCrafter2": {
            "denoiser": videocrafter2("model.diffusion_model."),
            "vae": videocrafter2("first_stage_model."),
            "text_encoder": text_tower(),
        },
        "Open-Sora 1.2": {
            "denoiser": unzipped("opensora_keys")["transformer"],
            "vae": unzipped("opensora_keys")["vae"],
        },
        "Stable Video Diffusion, 14 frames": {"denoiser": unzipped("svd_keys")["unet"]},
        "Wan 2.1 T2V 1.3B": {
            "denoiser": original_shapes("wan2.1 t2v 1.3B"),
            "vae": original_shapes("wan2.1 vae"),
        },
        "Wan 2.1 I2V 14B": {"denoiser": original_shapes("wan2.1 i2v 14B")},
        "Wan 2.2 TI2V 5B": {"denoiser": original_shapes("wan2.2 ti2v 5B"), "vae": original_shapes("wan2.2 vae")},
        "LTX-Video 2B": {"denoiser": original_shapes("ltx 2B"), "vae": original_shapes("ltx vae 0.9.0")},
        "LTX-Video 13B": {"denoiser": original_shapes("ltx 13B"), "vae": original_shapes("ltx vae 0.9.5")},
    }.items():
        assert {part: total(shapes) for part, shapes in parts.items()}.items() <= COUNTS[name].items(), name
    clips, vjepa = unzipped("clip_keys"), unzipped("vjepa_keys")
    found = {"hps": clips["hpsv2"]["keys"], "viclip": clips["viclip"]["keys"], "vjepa": vjepa["keys"]}
    assert {kind: [total(shapes)] for kind, shapes in found.items()}.items() <= REWARD_COUNTS.items()


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(
    ("kind", "name", "read"),
    [
        ("videocrafter2", "VideoCrafter2",
         lambda: unet_architecture(on_meta(videocrafter2("model.diffusion_model.")))),
        ("svd", "Stable Video Diffusion, 14 frames",
         lambda: unet_config(section(on_meta(unzipped("svd_keys")["unet"]), UNET_PREFIX))),
        ("wan", "Wan 2.1 T2V 1.3B", lambda: wan_config(original_shapes("wan2.1 t2v 1.3B"))),
        ("wan", "Wan 2.1 I2V 14B", lambda: wan_config(original_shapes("wan2.1 i2v 14B"))),
        ("wan", "Wan 2.2 TI2V 5B", lambda: wan_config(original_shapes("wan2.2 ti2v 5B"))),
        ("ltx", "LTX-Video 2B", lambda: ltx_config(original_shapes("ltx 2B"), 32)),
        ("ltx", "LTX-Video 13B", lambda: ltx_config(original_shapes("ltx 13B"), 32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_denoiser_is_the_one_that_is_read_from_its_file(
    kind: str, name: str, read: Callable[[], dict[str, Any]]
) -> None:
    told, config = read(), family(kind, name).denoiser.config
    assert {key: plain(config[key]) for key in told} == {key: plain(value) for key, value in told.items()}


def test_open_sora_is_the_one_that_is_read_from_its_file() -> None:
    assert family("opensora", "Open-Sora 1.2").denoiser.arch == Architecture.of(
        unzipped("opensora_keys")["transformer"]
    )


def test_everything_lies_on_the_meta_device_and_is_frozen() -> None:
    networks = [*family("svd", "Stable Video Diffusion, 14 frames").parts().values(), *reward("vjepa").networks()]
    for network in networks:
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_precision_is_that_of_a_loaded_model() -> None:
    wan = family("wan", "Wan 2.1 T2V 1.3B", "bfloat16").denoiser.state_dict()
    exact = {name for name, tensor in wan.items() if tensor.dtype == torch.float32}
    assert "scale_shift_table" in exact
    assert {tensor.dtype for name, tensor in wan.items() if name not in exact} == {torch.bfloat16}
    assert "blocks.0.attn1.to_q.weight" not in exact
    hps = reward("hps", dtype="float16").networks()[0]
    assert (hps.logit_scale.dtype, hps.visual_projection.weight.dtype) == (torch.float32, torch.float16)


def test_a_checkpoint_tells_the_size_of_a_reward() -> None:
    def size(kind: str, checkpoint: str) -> int:
        return count(reward(kind, checkpoint=checkpoint).networks()[0])

    assert size("yolos", "yolos-tiny") < size("yolos", "hustvl/yolos-small") < size("yolos", "yolos-base")
    assert size("vjepa", "vitl16.pth.tar") < size("vjepa", "vjepa2-vitg-fpc64-256") < size("vjepa", "vith16.pth.tar")
    assert size("clipscore", "CLIP-ViT-L-14") == size("aesthetic", "clip-vit-large-patch14")
    assert size_of("ViT-H.pt", {"vit-l": 1, "vit-h": 2}, 3) == 2
    assert size_of("other.pt", {"vit-l": 1}, 3) == 3


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("damo-vilab/text-to-video-ms-1.7b", "ModelScope 1.7B"),
        ("checkpoints/videocrafter2.ckpt", "VideoCrafter2"),
        ("OpenSora-v1.2", "Open-Sora 1.2"),
        ("stabilityai/stable-video-diffusion-img2vid", "Stable Video Diffusion, 14 frames"),
        ("stabilityai/stable-video-diffusion-img2vid-xt-1-1", "Stable Video Diffusion XT, 25 frames"),
        ("checkpoints/svd.safetensors", "Stable Video Diffusion, 14 frames"),
        ("checkpoints/svd_xt.safetensors", "Stable Video Diffusion XT, 25 frames"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan 2.1 T2V 1.3B"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan 2.1 T2V 14B"),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan 2.1 I2V 14B"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Wan 2.2 TI2V 5B"),
        ("diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "Wan 2.1 T2V 1.3B"),
        ("diffusion_models/Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", "Wan 2.1 T2V 14B"),
        ("diffusion_models/wan2.1_i2v_480p_14B_fp16.safetensors", "Wan 2.1 I2V 14B"),
        ("diffusion_models/wan2.2_ti2v_5B_fp16.safetensors", "Wan 2.2 TI2V 5B"),
        ("Lightricks/LTX-Video", "LTX-Video 2B"),
        ("diffusion_models/ltx-video-2b-v0.9.5.safetensors", "LTX-Video 2B"),
        ("diffusion_models/ltxv-13b-0.9.7-dev.safetensors", "LTX-Video 13B"),
    ],
)
def test_published_files_are_known_by_their_names(checkpoint: str, name: str) -> None:
    found = recognised(checkpoint)
    assert found is not None
    assert name in found[0].FULL_SIZE
    assert found[1] == name


def checkpoints(root: Path) -> Iterator[tuple[str, str]]:
    """Workflow and checkpoint of every shipped workflow that needs a published model."""
    for path in sorted((root / "workflows" / "api").glob("*.json")):
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            if node["class_type"] == "VaderLoadVideoModel":
                checkpoint = node["inputs"].get("hub_id") or node["inputs"]["checkpoint"]
                if not checkpoint.startswith("mini/"):
                    yield path.stem, checkpoint


def test_the_models_of_all_shipped_workflows_are_known(root: Path) -> None:
    found = list(checkpoints(root))
    assert len(found) > 10
    for workflow, checkpoint in found:
        known = recognised(checkpoint)
        assert known is not None, checkpoint
        key = known[0].__name__.rpartition(".")[2]
        others = set(registry.names("models")) - {key}
        assert not any(other in workflow for other in others), (workflow, checkpoint, key)


# --- the stand-in tokenizer ------------------------------------------------------------------


def test_the_stand_in_answers_as_a_tokenizer_does() -> None:
    words = StandInTokenizer(6)
    padded = words(["a b", "a b c d e f g"], padding="max_length", truncation=True, return_tensors="pt")
    assert padded.input_ids.shape == padded.attention_mask.shape == (2, 6)
    assert padded.attention_mask.sum(1).tolist() == [4, 6]
    assert padded.input_ids.argmax(1).tolist() == [3, 5]  # where the texts end
    assert words("a b", add_special_tokens=False).input_ids == [2, 2]
    assert [len(row) for row in words(["a", "a b c"], truncation=True, max_length=4).input_ids] == [3, 4]
    assert words(["a", "a b c"], padding=True, return_tensors="pt").input_ids.shape == (2, 5)
    assert words.decode([2, 2]) == ""


def test_special_words_keep_their_places() -> None:
    words = StandInTokenizer(100, ("<|x|>", "<|y|>"))
    x, y = words.convert_tokens_to_ids(["<|x|>", "<|y|>"])  # type: ignore[misc]
    assert words("a<|x|>b c <|y|>", add_special_tokens=False).input_ids == [2, x, 2, 2, y]
    assert words.convert_tokens_to_ids("word") == 2


# --- a training step on fake tensors ---------------------------------------------------------

QUICK = {"VideoCrafter2", "Open-Sora 1.2"}
STEPS = [pytest.param(kind, name, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for kind, name in MODELS]


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_a_step_of_published_size_runs_on_fake_tensors(kind: str, name: str) -> None:
    model, mode = family(kind, name, "float16" if kind in ("modelscope", "svd") else "bfloat16"), fake_mode()
    for network in model.parts().values():
        make_fake(network, mode, DEVICE)
    video = model.defaults.video
    images = torch.zeros(1, 3, video.height, video.width) if "image_encoder" in model.parts() else None
    cond = model.encode([PROMPT], video, images=images)
    assert model.truncated(PROMPT) == ""
    z = torch.randn(model.latent_shape(video, 1))
    with attached(model, LoraConfig(), seed=0) as parameters:
        latents = sample(
            model, z, cond, model.process.schedule(2, video), GradPlan.last_k(2, 1),
            guidance=guidance_scale(model, 0, video), eta=noise_share(model, -1), noise=lambda i: torch.randn_like(z),
        ).latents  # fmt: skip
        frame = model.decode(latents, [0])
        frame.mean().backward()
        assert latents.shape == z.shape
        assert frame.shape[:3] == (1, 1, 3)
        assert 0 <= video.height - frame.shape[3] < 8
        assert parameters
        assert all(parameter.grad is not None for parameter in parameters.values())


@pytest.mark.parametrize("kind", REWARDS)
def test_the_score_of_a_published_reward_reaches_fake_pixels(kind: str) -> None:
    scorer, mode = reward(kind, dtype="bfloat16"), fake_mode()
    assert [count(network) for network in scorer.networks()] == REWARD_COUNTS[kind]
    for network in scorer.networks():
        make_fake(network, mode, DEVICE)
    indices = scorer.frames.pick(16, torch.Generator().manual_seed(0))
    with mode:
        video: Tensor = torch.empty(2, len(indices), 3, 320, 512, requires_grad=True)
    scores = scorer(video, [PROMPT, "a dog"], indices)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    assert scores.requires_grad
    scores.mean().backward()
    assert video.grad is not None
    assert video.grad.shape == video.shape
