"""The record of one model family: names, words for what it does differently, and the sizes of its configs.

Data only. What a feature word means for a live model is in `vlft.model.adapt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vlft.errors import CheckpointError
from vlft.families.sizes import Sizes, TextNames, VisionNames, attention_configs, read_sizes, with_depth

TOWERS = ("vision", "merger", "language")

#: What a model does beside putting the vision tower's features into the embeddings. `deepstack`: features of earlier
#: vision blocks are added to the hidden states of the first language layers.
Feature = Literal["deepstack"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A config of one size, in the words of its family's config.json.

    Attributes:
        text: its `text_config`; without `vocab_size` the vocabulary is as small as the tokenizer allows.
        vision: its `vision_config`.
        tied: whether the head is the embedding.
        dtype: of stored weights.
        std: of random matrices.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tied: bool
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    std: float = 0.02

    def but(
        self, *, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, **more: Any
    ) -> Shape:
        """Another shape, with some entries of `text` and `vision`, or other attributes, replaced."""
        texts, visions = {**self.text, **(text or {})}, {**self.vision, **(vision or {})}
        return replace(self, text=texts, vision=visions, **more)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family, as it stands in transformers' modules and in published files.

    Attributes:
        model_type: `config.json`'s own word.
        label: how people call it.
        model_class, config_class: in transformers.
        processor_class, image_processor_class, video_processor_class: in transformers.
        vision_names, text_names: how its configs spell their sizes.
        tower_prefixes: (parameter-name prefix, tower) pairs; the first match wins.
        lora_targets: tower -> linear layers that LoRA may adapt, as a full-match regex over module names.
        attention_targets: the subset of `lora_targets` for `--lora_target attention`.
        fused_norms, fused_mlps: modules of the language model that fused kernels may stand in for where they compute
            the same, as full-match regexes over module names.
        features: see `Feature`.
        published: (prefix of a module name, prefix in published files) pairs; the first match wins.
        embedding, head: parameters that map ids to channels and channels to ids.
        image_pad, video_pad: token repeated once per merged patch.
        vision_start, vision_end: tokens around a picture or video.
        start_of_turn: token that opens a turn; the role and a line break follow.
        end_of_turn: token that closes a turn, and is trained with an answer.
        end_of_text: token that pads, and begins a text where a family has one for that.
        control_tokens: texts that become control ids; refused in user text because they would forge turns or media.
        box_unit: in which numbers the family reads and writes boxes: shares of 1000, or pixels of the resized picture.
        box_style: how: `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` with `<|object_ref_start|>`, or JSON lists.
        pixels: (least, most) of a picture and of a frame in the published preprocessor_config.json.
        scaling: mean and deviation of each colour there, in units of 0..1.
        tiny: sizes of a model that trains on a laptop in seconds.
        shapes: published sizes by short name.
    """

    model_type: str
    label: str
    model_class: str
    config_class: str
    processor_class: str
    image_processor_class: str
    video_processor_class: str
    vision_names: VisionNames
    text_names: TextNames
    tower_prefixes: tuple[tuple[str, str], ...]
    lora_targets: Mapping[str, str]
    attention_targets: Mapping[str, str]
    fused_norms: str
    fused_mlps: str
    features: frozenset[Feature] = frozenset()
    published: tuple[tuple[str, str], ...]
    embedding: str
    head: str
    image_pad: str
    video_pad: str
    vision_start: str
    vision_end: str
    start_of_turn: str
    end_of_turn: str
    end_of_text: str
    control_tokens: tuple[str, ...]
    box_unit: Literal["0-1000", "pixels"]
    box_style: Literal["tokens", "json"]
    pixels: tuple[int, int]
    scaling: tuple[tuple[float, ...], tuple[float, ...]]
    tiny: Shape
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @staticmethod
    def of(model_type: object, *, where: str = "the model") -> Family:
        """The family of a `config.model_type`.

        Raises:
            CheckpointError: not one of ours, or none at all; names the type and what is supported.
        """
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            reason = f" ({REFUSED[model_type]})" if isinstance(model_type, str) and model_type in REFUSED else ""
            raise CheckpointError(
                f"{where}: model_type is {model_type!r}, not a Qwen-VL this version trains{reason}. "
                f"Supported: {', '.join(f'{f.label} ({t!r})' for t, f in FAMILIES.items())}. "
                "Point --model_id at such a model, e.g. Qwen/Qwen2-VL-2B-Instruct."
            )
        return family

    def sizes(self, config: Any) -> Sizes:
        """The sizes in transformers' config of a model of this family.

        Raises:
            CheckpointError: one of them is no whole number of at least 1.
        """
        return read_sizes(config, self.vision_names, self.text_names)

    def with_depth(self, config: Any, blocks: int) -> Any:
        """A copy of a config whose two towers have so many blocks."""
        return with_depth(config, blocks, self.vision_names, self.text_names)

    def attention_configs(self, config: Any, tower: str) -> tuple[Any, ...]:
        """The parts of a config from which the modules of a tower ("vision" or "language") learn how to attend."""
        return attention_configs(config, tower)

    @property
    def factor(self) -> int:
        """Pixels of a merged patch's side; the sides of resized pictures are multiples of it."""
        vision, names = self.tiny.vision, self.vision_names
        return vision[names.patch] * vision[names.merge]

    @property
    def ends(self) -> tuple[str, str]:
        """Embedding and head, which a tied model has once."""
        return self.embedding, self.head

    @property
    def config_tokens(self) -> dict[str, str]:
        """Attribute of config.json -> the token whose id it is."""
        return {
            "image_token_id": self.image_pad,
            "video_token_id": self.video_pad,
            "vision_start_token_id": self.vision_start,
            "vision_end_token_id": self.vision_end,
        }

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


#: model_type -> family, and model_type -> why it is not trained. `vlft.families` fills both.
FAMILIES: dict[str, Family] = {}
REFUSED: dict[str, str] = {}


def sizes_of(config: Any) -> Sizes:
    """The sizes in transformers' config of a model, by its `model_type`.

    Raises:
        CheckpointError: not a family of ours, or as `Family.sizes`.
    """
    return Family.of(config.model_type).sizes(config)
