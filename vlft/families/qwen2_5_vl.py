"""The family Qwen2.5-VL. Sizes are from config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct."""

from typing import Any

from vlft.families.configs import TextNames, VisionNames
from vlft.families.family import ATTENTION, BLOCK, DENSE_LAYER, LAYER, LAYER_NORMS, Family, Shape
from vlft.families.layout import ParameterNames

_MERGER = r"model\.visual\.merger\.mlp\.(0|2)"
_VISION = {
    "hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}  # fmt: skip


def _text(width: int, inner: int, depth: int, heads: int, kv_heads: int, sections: list[int], **more: int) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections}
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 128000, "rope_parameters": rope, **more,
    }  # fmt: skip


def _shape(width: int, inner: int, depth: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> Shape:
    text = _text(width, inner, depth, heads, kv_heads, [16, 24, 24], vocab_size=vocab)
    return Shape(text=text, vision=_VISION | {"out_hidden_size": width} | more, tied=vocab < 152000)


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    label="Qwen2.5-VL",
    model_class="Qwen2_5_VLForConditionalGeneration",
    config_class="Qwen2_5_VLConfig",
    processor_class="Qwen2_5_VLProcessor",
    image_processor_class="Qwen2VLImageProcessor",
    video_processor_class="Qwen2VLVideoProcessor",
    vision_names=VisionNames(
        width="hidden_size", out="out_hidden_size", inner="intermediate_size", mlp_linears=3, window="window_size",
        tokens_per_second="tokens_per_second",
    ),
    text_names=TextNames(),
    parameter_names=ParameterNames(
        mlp=("gate_proj", "up_proj", "down_proj"), merger=("ln_q", "mlp.0", "mlp.2"), vision_norm_bias=False,
        attention_bias=True,
    ),
    lora_targets={
        "language": DENSE_LAYER,
        "vision": BLOCK + r"(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
        "merger": _MERGER,
    },
    attention_targets={
        "language": ATTENTION,
        "vision": BLOCK + r"attn\.(qkv|proj)",
        "merger": _MERGER,
    },
    fused_norms=rf"{LAYER_NORMS}|{BLOCK}norm[12]|model\.visual\.merger\.ln_q",
    fused_mlps=rf"({LAYER}|{BLOCK})mlp",
    features=frozenset({"windows"}),
    published=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    video_time="seconds",
    video_rule="qwen-vl-utils",
    box_unit="pixels",
    box_style="json",
    pixels=(4 * 28 * 28, 16384 * 28 * 28),
    scaling=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    tiny=Shape(
        text=_text(64, 128, 2, 4, 2, [2, 3, 3]),
        vision=_VISION | {
            "hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2, "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        tied=True,
        dtype="float32",
        std=0.1,
    ),
    shapes={
        "qwen2.5-vl-3b": _shape(2048, 11008, 36, 16, 2, 151936),
        "qwen2.5-vl-7b": _shape(3584, 18944, 28, 28, 4, 152064),
        "qwen2.5-vl-32b": _shape(5120, 27648, 64, 40, 8, 152064, intermediate_size=3456),
        "qwen2.5-vl-72b": _shape(8192, 29568, 80, 64, 8, 152064, intermediate_size=3456),
    },
)  # fmt: skip
