"""The families Qwen3.5 and Qwen3.5-MoE; Qwen3.6 and Qwen3.8 have the same types.

Sizes are from config.json of Qwen/Qwen3.5-*, Qwen3.6-* and Qwen3.8-27B.
"""

from dataclasses import replace
from typing import Any

from vlft.families.configs import TextNames, VisionNames
from vlft.families.family import BLOCK, LAYER, Family, Shape
from vlft.families.qwen3_vl import QWEN3_VL, SMALL_VISION, TINY_VISION, VISION

_MERGER = r"model\.visual\.merger\.linear_fc[12]"
_MIXER = r"(self_attn\.(q|k|v|o)_proj|linear_attn\.(in_proj_(qkv|z|a|b)|out_proj)"
_MINIMAL_VISION = VISION | {"hidden_size": 768, "intermediate_size": 3072, "depth": 12, "num_heads": 12}


def _text(width: int, depth: int, heads: int, kv_heads: int, head_dim: int, sections: list[int], **more: Any) -> dict:
    rope = {
        "rope_type": "default", "rope_theta": 10000000.0, "mrope_section": sections, "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }  # fmt: skip
    kinds = ["full_attention" if place % 4 == 3 else "linear_attention" for place in range(depth)]
    return {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 262144, "rope_parameters": rope,
        "layer_types": kinds, "linear_conv_kernel_dim": 4, **more,
    }  # fmt: skip


def _shape(
    width: int, depth: int, heads: int, kv_heads: int, values: int, vision: dict, *, tied: bool = False, **text: Any
) -> Shape:
    text |= {
        "linear_num_key_heads": 16, "linear_num_value_heads": values, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "vocab_size": 248320,
    }  # fmt: skip
    text = _text(width, depth, heads, kv_heads, 256, [11, 11, 10], **text)
    return Shape(text=text, vision=vision | {"out_hidden_size": width}, tied=tied)


_TINY_TEXT = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip

QWEN3_5 = Family(
    model_type="qwen3_5",
    label="Qwen3.5",
    model_class="Qwen3_5ForConditionalGeneration",
    config_class="Qwen3_5Config",
    processor_class="Qwen3VLProcessor",
    tokenizer_class="Qwen3_5Tokenizer",
    image_processor_class="Qwen2VLImageProcessor",
    video_processor_class="Qwen3VLVideoProcessor",
    vision_names=VisionNames(
        width="hidden_size", out="out_hidden_size", inner="intermediate_size", positions="num_position_embeddings"
    ),
    text_names=TextNames(head_dim="head_dim", recurrent=True, query_gate=True, partial_rotary=True),
    parameter_names=QWEN3_VL.parameter_names,
    lora_targets={
        "language": LAYER + _MIXER + r"|mlp\.(gate|up|down)_proj)",
        "vision": QWEN3_VL.lora_targets["vision"],
        "merger": _MERGER,
    },
    attention_targets={
        "language": LAYER + _MIXER + ")",
        "vision": BLOCK + r"attn\.(qkv|proj)",
        "merger": _MERGER,
    },
    features=frozenset({"interpolation", "recurrent"}),
    norm="1 + w",
    carried=("mtp.",),
    video_time="text",
    video_rule="processor",
    chat="thoughts",
    box_unit="0-1000",
    box_style="json",
    pixels=QWEN3_VL.pixels,
    scaling=QWEN3_VL.scaling,
    tiny=Shape(
        text=_text(64, 4, 4, 2, 32, [2, 1, 1], intermediate_size=128, **_TINY_TEXT),
        vision=TINY_VISION,
        tied=True,
        dtype="float32",
        std=0.1,
    ),
    shapes={
        "qwen3.5-0.8b": _shape(1024, 24, 8, 2, 16, _MINIMAL_VISION, tied=True, intermediate_size=3584),
        "qwen3.5-2b": _shape(2048, 24, 8, 2, 16, SMALL_VISION, tied=True, intermediate_size=6144),
        "qwen3.5-4b": _shape(2560, 32, 16, 4, 32, SMALL_VISION, tied=True, intermediate_size=9216),
        "qwen3.5-9b": _shape(4096, 32, 16, 4, 32, VISION, intermediate_size=12288),
        "qwen3.5-27b": _shape(5120, 64, 24, 4, 48, VISION, intermediate_size=17408),
    },
)  # fmt: skip

QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe",
    label="Qwen3.5-MoE",
    model_class="Qwen3_5MoeForConditionalGeneration",
    config_class="Qwen3_5MoeConfig",
    text_names=TextNames(
        inner=None, head_dim="head_dim", recurrent=True, query_gate=True, partial_rotary=True, experts="num_experts",
        shared_expert="shared_expert_intermediate_size",
    ),
    lora_targets={
        **QWEN3_5.lora_targets,
        "language": LAYER + _MIXER + r"|mlp\.shared_expert\.(gate|up|down)_proj)",
    },
    fused_mlps=LAYER + r"mlp\.shared_expert",
    features=QWEN3_5.features | {"experts"},
    stored_experts=frozenset({"fused", "each"}),
    tiny=Shape(
        text=_text(
            64, 4, 4, 2, 32, [2, 1, 1], moe_intermediate_size=24, shared_expert_intermediate_size=32, num_experts=4,
            num_experts_per_tok=2, **_TINY_TEXT,
        ),
        vision=TINY_VISION,
        tied=False,
        dtype="float32",
        std=0.1,
    ),
    shapes={
        "qwen3.5-35b-a3b": _shape(
            2048, 40, 16, 2, 32, VISION, moe_intermediate_size=512, shared_expert_intermediate_size=512,
            num_experts=256, num_experts_per_tok=8,
        ),
    },
)  # fmt: skip
