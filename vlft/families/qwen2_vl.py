"""The family Qwen2-VL. Sizes are from config.json of Qwen/Qwen2-VL-2B-Instruct and Qwen2-VL-7B-Instruct."""

from vlft.families.configs import TextNames, VisionNames
from vlft.families.family import ATTENTION, BLOCK, DENSE_LAYER, Family, Shape
from vlft.families.layout import ParameterNames

_MERGER = r"model\.visual\.merger\.mlp\.(0|2)"
_VISION = {
    "embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def _text(width: int, inner: int, depth: int, heads: int, kv_heads: int, sections: list[int], **more: int) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections}
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 32768, "rope_parameters": rope, **more,
    }  # fmt: skip


QWEN2_VL = Family(
    model_type="qwen2_vl",
    label="Qwen2-VL",
    model_class="Qwen2VLForConditionalGeneration",
    config_class="Qwen2VLConfig",
    processor_class="Qwen2VLProcessor",
    image_processor_class="Qwen2VLImageProcessor",
    video_processor_class="Qwen2VLVideoProcessor",
    vision_names=VisionNames(width="embed_dim", out="hidden_size"),
    text_names=TextNames(),
    parameter_names=ParameterNames(mlp=("fc1", "fc2"), merger=("ln_q", "mlp.0", "mlp.2"), attention_bias=True),
    lora_targets={
        "language": DENSE_LAYER,
        "vision": BLOCK + r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
        "merger": _MERGER,
    },
    attention_targets={
        "language": ATTENTION,
        "vision": BLOCK + r"attn\.(qkv|proj)",
        "merger": _MERGER,  # a merger has no attention, only these two linears
    },
    published=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    video_time="index",
    video_rule="qwen-vl-utils",
    box_unit="0-1000",
    box_style="tokens",
    pixels=(4 * 28 * 28, 16384 * 28 * 28),
    scaling=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    tiny=Shape(
        text=_text(64, 128, 2, 4, 2, [2, 3, 3]),
        vision=_VISION | {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": 64},
        tied=True,
        dtype="float32",
        std=0.1,  # with transformers' 0.02 such a small model gives nearly the same answer to every prompt
    ),
    shapes={
        "qwen2-vl-2b": Shape(
            text=_text(1536, 8960, 28, 12, 2, [16, 24, 24], vocab_size=151936),
            vision=_VISION | {"hidden_size": 1536},
            tied=True,
        ),
        "qwen2-vl-7b": Shape(
            text=_text(3584, 18944, 28, 28, 4, [16, 24, 24], vocab_size=152064),
            vision=_VISION | {"hidden_size": 3584},
            tied=False,
        ),
    },
)  # fmt: skip
