"""The smallest ImageReward, Aesthetic V2.5 and VideoReward, with random weights, in the published files' layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import Qwen2Tokenizer, SiglipConfig, SiglipModel
from vader_nodes.vader_backend.registry import load

Shapes = Mapping[str, tuple[int, ...]]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "blue",
    "circle",
    "cross",
    "moving",
    "left",
    "up",
    "on",
    "black",
    "white",
    "background",
]
MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
TEMPLATE = "\nJudge it. {} looks\n{} moves\nPrompt - {{text_prompt}}\n{} fits\n".format(*MARKS)
NORM = {"VQ_mean": 3.5, "VQ_std": 2.0, "MQ_mean": 1.5, "MQ_std": 0.5, "TA_mean": -1.0, "TA_std": 4.0}
LORA = {"lora_enable": True, "lora_r": 2, "lora_alpha": 6, "use_rslora": False}
BASE: dict[str, Any] = {
    "model_type": "qwen2_vl", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "tie_word_embeddings": True, "use_sliding_window": False, "torch_dtype": "float32",
    "vision_config": {
        "depth": 2, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": 16,
        "patch_size": 2, "spatial_merge_size": 2, "spatial_patch_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip


def drawn(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; those of norms lie around 1."""
    rng = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes.items():
        fan = math.prod(shape[1:]) if len(shape) > 1 else 16
        result[name] = torch.randn(shape, generator=rng) / fan**0.5
        if ("norm" in name.lower() or "ln_q" in name) and name.endswith("weight"):
            result[name] += 1
    return result


# --- ImageReward -----------------------------------------------------------------------------


def blip_shapes(width: int = 128, text: int = 16, layers: int = 2, side: int = 3, patch: int = 4) -> Shapes:
    """Names and shapes in ImageReward.pt; the picture tower has width / 64 heads."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, width),
        "blip.visual_encoder.pos_embed": (1, side * side + 1, width),
        "blip.visual_encoder.patch_embed.proj.weight": (width, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (width,),
        **_pair("blip.visual_encoder.norm", width),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS), text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, text),
        **_pair("blip.text_encoder.embeddings.LayerNorm", text),
        "blip.vision_proj.weight": (8, width),
        "blip.text_proj.weight": (8, text),
    }
    for i in range(layers):
        block, layer = f"blip.visual_encoder.blocks.{i}", f"blip.text_encoder.encoder.layer.{i}"
        shapes |= {**_pair(f"{block}.norm1", width), **_pair(f"{block}.norm2", width)}
        for name, sizes in {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}.items():
            shapes |= _pair(f"{block}.{name}", *sizes)
        shapes |= {**_pair(f"{block}.mlp.fc1", 32, width), **_pair(f"{block}.mlp.fc2", width, 32)}
        for attention, source in {"attention": text, "crossattention": width}.items():
            shapes |= _pair(f"{layer}.{attention}.self.query", text, text)
            shapes |= _pair(f"{layer}.{attention}.self.key", text, source)
            shapes |= _pair(f"{layer}.{attention}.self.value", text, source)
            shapes |= _pair(f"{layer}.{attention}.output.dense", text, text)
            shapes |= _pair(f"{layer}.{attention}.output.LayerNorm", text)
        shapes |= _pair(f"{layer}.intermediate.dense", 24, text)
        shapes |= {**_pair(f"{layer}.output.dense", text, 24), **_pair(f"{layer}.output.LayerNorm", text)}
    widths = (text, 12, 10, 8, 6, 1)
    for place, narrow, wide in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        shapes |= _pair(f"mlp.layers.{place}", wide, narrow)
    return shapes


def save_imagereward(folder: Path) -> Path:
    """ImageReward.pt, med_config.json and vocab.txt."""
    folder.mkdir(parents=True)
    tensors = drawn(blip_shapes(), 1)
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(tensors, folder / "ImageReward.pt")
    config = {
        "architectures": ["BertModel"], "hidden_act": "gelu", "hidden_size": 16, "intermediate_size": 24,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 40, "model_type": "bert", "num_attention_heads": 2,
        "num_hidden_layers": 2, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(WORDS),
        "encoder_width": 768, "add_cross_attention": True,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def _pair(name: str, wide: int, narrow: int | None = None) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (wide,) if narrow is None else (wide, narrow), f"{name}.bias": (wide,)}


# --- Aesthetic V2.5 --------------------------------------------------------------------------


def save_aesthetic_v25(folder: Path) -> Path:
    """siglip/, the whole model, and head.pth."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**tower, "vocab_size": 8, "max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 1}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "siglip")
    widths = (16, 12, 10, 8, 6, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for place, narrow, wide in zip((0, 2, 4, 6, 8), widths, widths[1:], strict=False):
        shapes |= _pair(f"scoring_head.{place}", wide, narrow)
    torch.save(drawn(shapes, 2), folder / "head.pth")
    return folder


# --- VideoReward -----------------------------------------------------------------------------


def save_videoreward(folder: Path, *, adapter: bool = False, outputs: int = 1) -> Path:
    """VideoReward/ as published, or as an adapter, and qwen/."""
    step, base = folder / "VideoReward" / "checkpoint-30", folder / "qwen"
    for path in (step, base, folder / "VideoReward" / "checkpoint-4"):
        path.mkdir(parents=True)
    words = save_qwen_tokenizer(base)
    (base / "config.json").write_text(json.dumps(BASE))
    told = {
        "data_config": {"max_frame_pixels": 2304, "prompt_template_type": "detailed_special", "fps": 2.0},
        "model_config": {"use_special_tokens": True, "reward_token": "special", "output_dim": outputs},
        "peft_lora_config": LORA,
        "inference_config": NORM,
    }
    (folder / "VideoReward" / "model_config.json").write_text(json.dumps(told))
    source = f'"""Not run."""\nraise SystemExit\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = """{TEMPLATE}"""\n'
    (folder / "VideoReward" / "prompt_template.py").write_text(source)
    plain = drawn(_qwen_shapes(BASE["vocab_size"]), 3)
    updates, head = drawn(_lora_shapes(), 4), drawn({"rm_head.weight": (outputs, 16)}, 5)
    if adapter:
        save_file(plain, base / "model.safetensors")
        save_file({_peft(k, default=False): v for k, v in updates.items()}, step / "adapter_model.safetensors")
        kept = {"model.embed_tokens.weight": plain["model.embed_tokens.weight"][:words], **head}
        torch.save({_peft(k): v for k, v in kept.items()}, step / "non_lora_state_dict.pth")
    else:
        plain["model.embed_tokens.weight"] = plain["model.embed_tokens.weight"][:words]
        plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
        torch.save({_peft(k): v for k, v in {**plain, **updates, **head}.items()}, step / "model.pth")
    return folder


def save_qwen_tokenizer(folder: Path) -> int:
    """Bytes as words, and Qwen2-VL's special ones; returns how many there are with the reward tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate([*letters, "<|endoftext|>"])}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    own = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(own, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer) + len(MARKS)


def _peft(name: str, *, default: bool = True) -> str:
    """As PEFT names it: the changed layers' own weights under base_layer, and their updates under an adapter."""
    if ".lora_" in name:
        return "base_model.model." + (name.replace(".weight", ".default.weight") if default else name)
    changed = name.rpartition(".")[0] in {key.partition(".lora_")[0] for key in _lora_shapes()}
    return "base_model.model." + (".base_layer.".join(name.rsplit(".", 1)) if changed else name)


def _lora_shapes() -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (wide, *rest) in _qwen_shapes(1).items():
        if name.startswith("model.layers.") and "_proj.weight" in name:
            layer = name.removesuffix(".weight")
            shapes |= {f"{layer}.lora_A.weight": (2, *rest), f"{layer}.lora_B.weight": (wide, 2)}
    return shapes


def _qwen_shapes(words: int) -> Shapes:
    """Qwen2-VL's names as published."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, 16), "model.norm.weight": (16,),
        "visual.patch_embed.proj.weight": (16, 3, 2, 2, 2), **_pair("visual.merger.ln_q", 16),
        **_pair("visual.merger.mlp.0", 64, 64), **_pair("visual.merger.mlp.2", 16, 64),
    }  # fmt: skip
    for i in range(2):
        block, layer = f"visual.blocks.{i}", f"model.layers.{i}"
        shapes |= {**_pair(f"{block}.norm1", 16), **_pair(f"{block}.norm2", 16)}
        shapes |= {**_pair(f"{block}.attn.qkv", 48, 16), **_pair(f"{block}.attn.proj", 16, 16)}
        shapes |= {**_pair(f"{block}.mlp.fc1", 32, 16), **_pair(f"{block}.mlp.fc2", 16, 32)}
        shapes |= {**_pair(f"{layer}.self_attn.q_proj", 16, 16), **_pair(f"{layer}.self_attn.k_proj", 8, 16)}
        shapes |= {**_pair(f"{layer}.self_attn.v_proj", 8, 16), f"{layer}.self_attn.o_proj.weight": (16, 16)}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    return shapes


# --- all three -------------------------------------------------------------------------------

SAVE: dict[str, Callable[[Path], Path]] = {
    "imagereward": save_imagereward,
    "aesthetic_v25": save_aesthetic_v25,
    "videoreward": save_videoreward,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "imagereward": {"checkpoint": ""},
    "aesthetic_v25": {"checkpoint": "siglip", "head": "head.pth"},
    "videoreward": {"checkpoint": "VideoReward", "base": "qwen", "dtype": "float32"},
}


def make(kind: str, folder: Path, **settings: Any) -> Any:
    """The reward on the files that SAVE wrote there."""
    module = load("rewards", kind)
    return module.build(module.Config(**{**SETTINGS[kind], **settings}), lambda name: folder / name)
