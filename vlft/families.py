"""The model families vlft trains: the only place that knows a model type's class, module and token names.

Everything else asks `Family.of(config.model_type)` (rule: ask the config, not the name).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlft.errors import CheckpointError

TOWERS = ("vision", "merger", "language")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of one model family, as they stand in transformers' modules and in published weight files.

    Attributes:
        model_type: `config.json`'s own word.
        label: how people call it.
        model_class: class in transformers.
        tower_prefixes: (parameter-name prefix, tower) pairs; the first match wins.
        lora_targets: tower -> linear layers that LoRA may adapt, as a full-match regex over module names.
        attention_targets: the subset of `lora_targets` for `--lora_target attention`.
        published: (prefix of a module name, prefix in published files) pairs; the first match wins.
        image_pad, video_pad: token repeated once per merged patch.
        end_of_turn: token that closes a turn, and is trained with an answer.
        control_tokens: texts that become control ids; refused in user text because they would forge turns or media.
        box_unit: in which numbers the family reads and writes boxes: shares of 1000, or pixels of the resized picture.
        box_style: how: `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` with `<|object_ref_start|>`, or JSON lists.
    """

    model_type: str
    label: str
    model_class: str
    tower_prefixes: tuple[tuple[str, str], ...]
    lora_targets: dict[str, str]
    attention_targets: dict[str, str]
    published: tuple[tuple[str, str], ...]
    image_pad: str
    video_pad: str
    end_of_turn: str
    control_tokens: tuple[str, ...]
    box_unit: Literal["0-1000", "pixels"]
    box_style: Literal["tokens", "json"]

    @staticmethod
    def of(model_type: object, *, where: str = "the model") -> Family:
        """The family of a `config.model_type`.

        Raises:
            CheckpointError: not one of ours, or none at all; names the type and what is supported.
        """
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise CheckpointError(
                f"{where}: model_type is {model_type!r}, not a Qwen-VL this version trains. "
                f"Supported: {', '.join(f'{f.label} ({t!r})' for t, f in FAMILIES.items())}. "
                "Point --model_id at such a model, e.g. Qwen/Qwen2-VL-2B-Instruct."
            )
        return family

    def tower_of(self, parameter: str) -> str:
        """The tower (`vision`, `merger` or `language`) a parameter or module name of transformers belongs to.

        Raises:
            KeyError: to none of them.
        """
        for prefix, tower in self.tower_prefixes:
            if parameter.startswith(prefix):
                return tower
        raise KeyError(f"{parameter!r} belongs to no tower of {self.label}")

    def published_name(self, parameter: str) -> str:
        """The name a parameter has in published weight files (`model.visual.x` -> `visual.x`)."""
        for ours, theirs in self.published:
            if parameter.startswith(ours):
                return theirs + parameter[len(ours) :]
        return parameter


_QWEN2_LANGUAGE = r"model\.language_model\.layers\.\d+\."
_QWEN2_VISION = r"model\.visual\.blocks\.\d+\."

FAMILIES = {
    "qwen2_vl": Family(
        model_type="qwen2_vl",
        label="Qwen2-VL",
        model_class="Qwen2VLForConditionalGeneration",
        tower_prefixes=(
            ("model.visual.merger.", "merger"),
            ("model.visual.", "vision"),
            ("model.language_model.", "language"),
            ("lm_head.", "language"),
        ),
        lora_targets={
            "language": _QWEN2_LANGUAGE + r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
            "vision": _QWEN2_VISION + r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
            "merger": r"model\.visual\.merger\.mlp\.(0|2)",
        },
        attention_targets={
            "language": _QWEN2_LANGUAGE + r"self_attn\.(q|k|v|o)_proj",
            "vision": _QWEN2_VISION + r"attn\.(qkv|proj)",
            "merger": r"model\.visual\.merger\.mlp\.(0|2)",  # it has no attention: its two linears are all there is
        },
        published=(("model.visual.", "visual."), ("model.language_model.", "model.")),
        image_pad="<|image_pad|>",
        video_pad="<|video_pad|>",
        end_of_turn="<|im_end|>",
        control_tokens=(
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ),
        box_unit="0-1000",
        box_style="tokens",
    ),
}
