"""The published sizes of CLIP that rewards are made of: OpenAI's ViT-L-14 and open_clip's ViT-H-14.

Sources: the configurations of openai/clip-vit-large-patch14 and of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Arguments of CLIPConfig.
VIT_L14: Mapping[str, Any] = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
}
VIT_H14: Mapping[str, Any] = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
SIZES = {"vit-h": VIT_H14, "vit_h": VIT_H14, "vit-l": VIT_L14, "vit_l": VIT_L14}  # by parts of their names
