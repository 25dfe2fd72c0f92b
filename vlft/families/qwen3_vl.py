"""The families Qwen3-VL and Qwen3-VL-MoE. Sizes are from config.json of Qwen/Qwen3-VL-*-Instruct and -Thinking."""

from dataclasses import replace
from typing import Any

from vlft.families.configs import TextNames, VisionNames
from vlft.families.family import ATTENTION, BLOCK, DENSE_LAYER, Family, Shape
from vlft.families.layout import ParameterNames

_MERGER = r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
#: Of 8B and larger models. 2B and 4B have a smaller tower.
VISION: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
}  # fmt: skip
SMALL_VISION = VISION | {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24}
TINY_VISION = VISION | {
    "hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 64,
}  # fmt: skip


def _text(width: int, depth: int, heads: int, kv_heads: int, head_dim: int, sections: list[int], **more: Any) -> dict:
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": sections, "mrope_interleaved": True}
    return {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 262144, "rope_parameters": rope, **more,
    }  # fmt: skip


def _shape(width: int, depth: int, heads: int, kv_heads: int, **text: Any) -> Shape:
    small = width < 4096 and "num_experts" not in text
    vision = SMALL_VISION | {"deepstack_visual_indexes": [5, 11, 17]} if small else VISION
    blocks = {"deepstack_visual_indexes": [5, 11, 17] if small else [8, 16, 24], "out_hidden_size": width}
    text = _text(width, depth, heads, kv_heads, 128, [24, 20, 20], vocab_size=151936, **text)
    return Shape(text=text, vision=vision | blocks, tied=small)


QWEN3_VL = Family(
    model_type="qwen3_vl",
    label="Qwen3-VL",
    model_class="Qwen3VLForConditionalGeneration",
    config_class="Qwen3VLConfig",
    processor_class="Qwen3VLProcessor",
    image_processor_class="Qwen2VLImageProcessor",
    video_processor_class="Qwen3VLVideoProcessor",
    vision_names=VisionNames(
        width="hidden_size", out="out_hidden_size", inner="intermediate_size", deepstack="deepstack_visual_indexes",
        positions="num_position_embeddings",
    ),
    text_names=TextNames(head_dim="head_dim"),
    parameter_names=ParameterNames(
        mlp=("linear_fc1", "linear_fc2"), merger=("norm", "linear_fc1", "linear_fc2"), patch_bias=True, head_norms=True,
    ),
    lora_targets={
        "language": DENSE_LAYER,
        "vision": BLOCK + r"(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        "merger": _MERGER,
    },
    attention_targets={
        "language": ATTENTION,
        "vision": BLOCK + r"attn\.(qkv|proj)",
        "merger": _MERGER,
    },
    features=frozenset({"deepstack", "interpolation"}),
    video_time="text",
    video_rule="processor",
    chat="bare",
    box_unit="0-1000",
    box_style="json",
    pixels=(64 * 32 * 32, 16384 * 32 * 32),
    scaling=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    tiny=Shape(
        text=_text(64, 3, 4, 2, 32, [6, 5, 5], intermediate_size=128),
        vision=TINY_VISION | {"deepstack_visual_indexes": [0, 1]},
        tied=True,
        dtype="float32",
        std=0.1,
    ),
    shapes={
        "qwen3-vl-2b": _shape(2048, 28, 16, 8, intermediate_size=6144),
        "qwen3-vl-4b": _shape(2560, 36, 32, 8, intermediate_size=9728),
        "qwen3-vl-8b": _shape(4096, 36, 32, 8, intermediate_size=12288),
        "qwen3-vl-32b": _shape(5120, 64, 64, 8, intermediate_size=25600),
    },
)  # fmt: skip

QWEN3_VL_MOE = replace(
    QWEN3_VL,
    model_type="qwen3_vl_moe",
    label="Qwen3-VL-MoE",
    model_class="Qwen3VLMoeForConditionalGeneration",
    config_class="Qwen3VLMoeConfig",
    text_names=TextNames(head_dim="head_dim", experts="num_experts", dense_layers="mlp_only_layers"),
    fused_mlps=None,
    features=QWEN3_VL.features | {"experts"},
    stored_experts=frozenset({"fused", "transposed"}),  # the hub's files are transposed, save_pretrained writes fused
    tiny=Shape(
        text=_text(
            64, 3, 4, 2, 32, [6, 5, 5], intermediate_size=128, moe_intermediate_size=24, num_experts=4,
            num_experts_per_tok=2, mlp_only_layers=[],
        ),
        vision=TINY_VISION | {"deepstack_visual_indexes": [0, 1]},
        tied=False,
        dtype="float32",
        std=0.1,
    ),
    shapes={
        name: _shape(
            width, depth, heads, 4, intermediate_size=inner, moe_intermediate_size=expert, num_experts=128,
            num_experts_per_tok=8, mlp_only_layers=[],
        )
        for name, width, depth, heads, inner, expert in (
            ("qwen3-vl-30b-a3b", 2048, 48, 32, 6144, 768),
            ("qwen3-vl-235b-a22b", 4096, 94, 64, 12288, 1536),
        )
    },
)  # fmt: skip
