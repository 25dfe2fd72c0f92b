"""A second family, to prove that one is a record and nothing else: nothing of vlft knows of it.

It stands on Qwen3-VL's classes in transformers, which differ from Qwen2-VL's in all that a family may say: names in
config.json, names of modules and in files, a patch of 16 pixels, heads that are not width / heads wide, and a second
list of mergers whose features go into the first language layers. Only its stills and texts are used: what its videos
become is another story.
"""

from __future__ import annotations

from dataclasses import replace

from vlft.families import DEFAULT, Shape
from vlft.families.sizes import TextNames, VisionNames

_LAYER = r"model\.language_model\.layers\.\d+\."
_BLOCK = r"model\.visual\.blocks\.\d+\."
_MERGER = r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"

SECOND = replace(
    DEFAULT,
    model_type="qwen3_vl",
    label="Second-VL",
    model_class="Qwen3VLForConditionalGeneration",
    config_class="Qwen3VLConfig",
    processor_class="Qwen3VLProcessor",
    video_processor_class="Qwen3VLVideoProcessor",
    vision_names=VisionNames(
        width="hidden_size", out="out_hidden_size", inner="intermediate_size", more_mergers="deepstack_visual_indexes"
    ),
    text_names=TextNames(head_dim="head_dim"),
    tower_prefixes=(("model.visual.deepstack_merger_list.", "merger"), *DEFAULT.tower_prefixes),
    lora_targets={
        "language": _LAYER + r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
        "vision": _BLOCK + r"(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        "merger": _MERGER,
    },
    attention_targets={
        "language": _LAYER + r"self_attn\.(q|k|v|o)_proj",
        "vision": _BLOCK + r"attn\.(qkv|proj)",
        "merger": _MERGER,
    },
    features=frozenset({"deepstack"}),
    published=(),
    box_style="json",
    scaling=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    tiny=Shape(
        text={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        vision={
            "hidden_size": 32, "intermediate_size": 80, "depth": 2, "num_heads": 2, "out_hidden_size": 48,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        tied=True,
        dtype="float32",
        std=0.1,
    ),
    shapes={},
)  # fmt: skip
